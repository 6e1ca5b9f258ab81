"""A checkpoint that all processes of a launch go on from is compared with its checksums once: each reads a share of it.

The first one says what came of it, so that all decide alike. They talk through torchrun's store: what a run is made of
may be said by its checkpoint, which is read before the processes have joined.
"""

from __future__ import annotations

import json
from pathlib import Path

from moelab import launcher
from moelab.integrity import Finding, Verify, inspect, share_differences
from moelab.records import Record
from moelab.safe_files import Reading, an_object, parse_json


def in_shares(verify: Verify) -> Verify:
    """For what all processes that torchrun started do alike: `verify` with each its share; otherwise as it is."""
    return look if verify is True and launcher.has_agent() else verify


def look(folder: Path, *, own: bool) -> Finding:
    """A `Look`, by all of them together.

    A run's `own` folder lies on a disk that all see. What else they start from each machine may have a copy of, so
    there the processes of a machine read all of it.
    """
    share = (launcher.rank(), launcher.world()) if own else launcher.machine_share()
    told = launcher.exchange(json.dumps({"problems": share_differences(folder, share)}))
    problems = dict.fromkeys(problem for text in told for problem in _said(text).listed("problems", str))
    found = ""
    if launcher.rank() == 0:
        finding = inspect(folder, compare=lambda *_: problems)
        found = json.dumps({**vars(finding), "folder": str(folder)})
    said = _said(launcher.exchange(found)[0])
    return Finding(
        folder,
        tuple(said.listed("problems", str)),
        tuple(said.listed("remarks", str)),
        said.flag("verifiable"),
        *(said.integer(key) for key in ("files", "tensors", "nbytes")),
    )


def _said(text: str) -> Record:
    where, reading = "another process", Reading()
    return Record(where, an_object(parse_json(text, where, reading), where, reading), reading)
