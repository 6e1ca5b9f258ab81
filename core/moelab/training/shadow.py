"""Where the processes of a run that don't write it write: a folder of their own, which goes with them.

So every process runs the same loop, with the same files to look up what it did before, and decides the same; one of
them does it in the run's folder, is heard, and has observers.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from moelab.checkpoint import BEST, STATE
from moelab.parallel.ranks import Ranks
from moelab.training.run_folder import METRICS, SUMMARY

LOOKED_UP = (METRICS, SUMMARY, f"{BEST}/{STATE}")  # what a loop that goes on asks its folder for


@contextmanager
def writing_folder(run_dir: Path, ranks: Ranks, *, resume: bool) -> Iterator[Path]:
    """`run_dir` for the main process; for another one a copy of what a loop looks up there, and silence."""
    if ranks.main:
        yield run_dir
        return
    with TemporaryDirectory(prefix="moelab-rank-") as name, _silence():
        shadow = Path(name) / "run"
        for path in LOOKED_UP if resume else ():
            if (run_dir / path).is_file():
                (shadow / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(run_dir / path, shadow / path)
        yield shadow


@contextmanager
def _silence() -> Iterator[None]:
    """What this process would say, another one says."""
    logger = logging.getLogger("moelab")
    kept, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [logging.NullHandler()], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = kept, propagate
