"""One checkpoint under way: each process writes files of its own, and the main one makes them a checkpoint.

    begin    all together: the main process makes the folder beside, and says where
    write    each alone, in the background too: its tensors into its files, synced
    finish   all together: the checksums go to the main process, which writes the manifest and renames the folder

So a folder under its own name is whole, and lists the files of every process. What goes wrong on one of them is raised
on each, at the end.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelab.atomic import partial, put_in_place, sync
from moelab.checkpoint import STATE, shard_name
from moelab.errors import CheckpointError
from moelab.manifest import MANIFEST, manifest_bytes, plain_entry
from moelab.parallel.ranks import Ranks
from moelab.tensor_file import write_tensors
from moelab.training.limits import check_disk

Entry = dict[str, Any]


@dataclass(frozen=True)
class Held:
    """What one process writes of a tensor."""

    tensor: Tensor
    rows: tuple[int, int] | None = None  # (its first one, of how many) where others write other rows


class Staging:
    """Memory on the host for copies of what is written while the run goes on; kept from save to save."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def copies(self, own: Mapping[str, Mapping[str, Held]]) -> dict[str, dict[str, Held]]:
        """As `own`, of this moment. The copies before are overwritten."""
        found: dict[str, dict[str, Held]] = {}
        on_device = False
        for file, tensors in own.items():
            for name, held in tensors.items():
                buffer = self._buffers.get((file, name))
                if buffer is None or buffer.shape != held.tensor.shape or buffer.dtype != held.tensor.dtype:
                    pinned = held.tensor.device.type == "cuda"
                    buffer = torch.empty(held.tensor.shape, dtype=held.tensor.dtype, pin_memory=pinned)
                    self._buffers[file, name] = buffer
                buffer.copy_(held.tensor, non_blocking=True)
                on_device |= held.tensor.device.type == "cuda"
                found.setdefault(file, {})[name] = Held(buffer, held.rows)
        if on_device:
            torch.cuda.synchronize()
        return found


class Writing:
    """A checkpoint that becomes `folder` of the main process."""

    def __init__(
        self,
        folder: Path,
        own: Mapping[str, Mapping[str, Held]],
        state: Mapping[str, Any],
        files: Mapping[str, bytes],
        ranks: Ranks,
    ) -> None:
        """All ranks together. Raises CheckpointError where there is no room for it, or no folder can be made."""
        self._own, self._ranks = own, ranks
        self._small = {STATE: (json.dumps({**state, "manifest": MANIFEST}, indent=2) + "\n").encode(), **files}
        self._entries: dict[str, Entry] = {}
        self._error: str | None = None
        self._cause: Exception | None = None
        self._thread: threading.Thread | None = None
        sizes = ranks.gather({self._file(name): _bytes(tensors) for name, tensors in own.items()})
        error = None
        if ranks.main:
            try:
                check_disk(folder, {file: size for found in sizes for file, size in found.items()})
                shutil.rmtree(partial(folder), ignore_errors=True)
                partial(folder).mkdir(parents=True)
            except CheckpointError as problem:
                error = str(problem)
            except OSError as problem:
                error = _cant(folder, problem)
        self.folder, error = ranks.gather((folder, error))[0]
        self._beside = partial(self.folder)
        if error is not None:
            raise CheckpointError(error)

    def start(self) -> None:
        """Write in the background: nothing of `own` may change until it is done."""
        self._thread = threading.Thread(target=self.write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether this rank has written; `finish` then waits for no disk."""
        return self._thread is None or not self._thread.is_alive()

    def write(self) -> None:
        """This rank's files. What goes wrong is kept for `finish`."""
        try:
            for name, tensors in self._own.items():
                path = self._beside / self._file(name)
                entry = write_tensors(path, {key: held.tensor for key, held in tensors.items()}).entry()
                for key, held in tensors.items():
                    if held.rows is not None:
                        entry["tensors"][key]["rows"] = {"first": held.rows[0], "of": held.rows[1]}
                sync(path)
                self._entries[path.name] = entry
        except OSError as problem:
            self._error, self._cause = _cant(self.folder, problem), problem
        except Exception as problem:  # the others wait in `finish`, and in a thread nobody would hear of it
            self._error = f"{self.folder}: can't be written: {type(problem).__name__}: {problem}"
            self._cause = problem

    def finish(self) -> None:
        """All ranks together, when each has written: the folder is there under its name. Raises CheckpointError."""
        if self._thread is not None:
            self._thread.join()
        error = self._ranks.first(self._error)
        entries = self._ranks.gather(self._entries)
        if self._ranks.main and error is None:
            try:
                self._put_in_place({name: entry for found in entries for name, entry in found.items()})
            except OSError as problem:
                error, self._cause = _cant(self.folder, problem), problem
        error = self._ranks.gather(error)[0]
        if error is not None:
            if self._ranks.main:
                shutil.rmtree(self._beside, ignore_errors=True)
            raise CheckpointError(error) from self._cause

    def _put_in_place(self, entries: Mapping[str, Entry]) -> None:
        listed = {name: plain_entry(content) for name, content in self._small.items()} | dict(sorted(entries.items()))
        for name, content in {**self._small, MANIFEST: manifest_bytes(listed)}.items():
            (self._beside / name).write_bytes(content)
            sync(self._beside / name)
        sync(self._beside)
        put_in_place(self._beside, self.folder)

    def _file(self, name: str) -> str:
        return shard_name(name, self._ranks.rank, self._ranks.size)


def _cant(folder: Path, error: OSError) -> str:
    return f"{folder}: can't be written: {error}; free some space and go on with --resume"


def _bytes(tensors: Mapping[str, Held]) -> int:
    return sum(held.tensor.nbytes for held in tensors.values())
