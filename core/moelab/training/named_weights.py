"""Weights that a config names beside `train.init_from`: a reference to keep in mind, a model that rewards.

They count as how they were made (`moelab.data.lineage`), not as where they lie: runs of one recipe whose seeds each
have a reference of their own are repetitions.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from moelab.checkpoint import newest_checkpoint
from moelab.config.interpolation import KeyPath, leaves
from moelab.config.run import RunConfig
from moelab.data.lineage import LINEAGE, Lineage, lineage_of

SECTIONS = ("model", "optimizer", "alignment")  # whose components may read weights


def named_weights(config: RunConfig) -> dict[KeyPath, Lineage]:
    """Every value that names a folder of weights which says how they were made: a checkpoint, or a run's newest.

    Raises CheckpointError where what it says is broken.
    """
    tree = asdict(config)
    found: dict[KeyPath, Lineage] = {}
    for path, value in leaves({section: tree[section] for section in SECTIONS}):
        if path[-1] == "name" or not isinstance(value, str) or not os.path.isdir(os.path.expanduser(value)):
            continue
        folder = Path(value).expanduser()
        weights = newest_checkpoint(folder) or folder
        if (weights / LINEAGE).is_file():
            found[path] = lineage_of(weights, value)
    return found
