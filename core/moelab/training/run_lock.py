"""One writer to a run folder: RUN/.lock says who, and notices when the folder is taken away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moelab.errors import RunFailure
from moelab.lock import LOCK, FileLock, hold_file


class RunLock:
    """Held from before the first write of a run to after its last; made by `hold`."""

    def __init__(self, folder: Path, lock: FileLock) -> None:
        self.folder, self._lock = folder, lock

    def check(self) -> None:
        """Raise RunFailure when the folder is gone, moved or replaced: nothing more may be written there."""
        if not self._lock.is_there():
            raise RunFailure(
                f"{self.folder}: the run folder was deleted, moved or taken by another run meanwhile; this run ends "
                "and writes nothing more"
            )
        self._lock.beat()


@contextmanager
def hold(folder: Path) -> Iterator[RunLock]:
    """Make `folder` if need be and lock it. Raises UserError naming the process that holds it."""
    made = not folder.exists()
    try:
        with hold_file(folder / LOCK, what=f"run_dir: {folder}", otherwise="choose another run_dir") as lock:
            yield RunLock(folder, lock)
    finally:
        if made:
            with contextlib.suppress(OSError):  # gone, or no longer empty: both are right
                folder.rmdir()  # refused before its first file was written
