"""How the weights were made that a run starts from, and those that its config names beside them.

What is named, a reference to keep in mind, a model that rewards, counts as how it was made (`moelab.data.lineage`), not
as where it lies: runs of one recipe whose seeds each have a reference of their own are repetitions.
"""

from __future__ import annotations

from dataclasses import asdict

from moelab.checkpoint import STATE, newest_checkpoint, read_state
from moelab.config.interpolation import KeyPath, leaves
from moelab.config.run import RunConfig
from moelab.data.lineage import LINEAGE, READING, Lineage, lineage_of
from moelab.data.seen import DataRecord, history_of
from moelab.paths import folder_named
from moelab.records import Record
from moelab.training.start import Start

SECTIONS = ("model", "optimizer", "alignment")  # whose components may read weights


def named_weights(config: RunConfig) -> dict[KeyPath, Lineage]:
    """Every value that names a folder of weights which says how they were made: a checkpoint, or a run's newest.

    Raises CheckpointError where what it says is broken.
    """
    tree = asdict(config)
    found: dict[KeyPath, Lineage] = {}
    for path, value in leaves({section: tree[section] for section in SECTIONS}):
        folder = folder_named(value) if isinstance(value, str) and path[-1] != "name" else None
        if folder is None:
            continue
        weights = newest_checkpoint(folder) or folder
        if (weights / LINEAGE).is_file():
            found[path] = lineage_of(weights, value)
    return found


def starting_lineage(config: RunConfig, start: Start) -> Lineage | None:
    """How the weights of `train.init_from` were made; None where a run starts from random ones.

    A run that goes on knows it from its own checkpoint: the folder it once started from may be gone.
    """
    source = config.train.init_from
    if source is None or start.origin is None:
        return None
    if not start.origin.own:
        return lineage_of(start.origin.folder, source)
    state = Record(str(start.origin.folder / STATE), read_state(start.origin.folder), READING)
    return Lineage.from_record(state.record("lineage")) if "lineage" in state else Lineage.unknown(source)


def starting_history(config: RunConfig, start: Start) -> DataRecord:
    """What the weights that the run starts from were trained on, as far as is recorded beside them.

    Nothing of a run that goes on: its own checkpoint brings the record.
    """
    if start.origin is None or start.origin.own or config.train.init_from is None:
        return DataRecord()
    return history_of([start.origin.folder], [config.train.init_from])
