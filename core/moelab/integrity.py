"""Is a checkpoint as it was written, and which of a run's is the newest that is?

Whoever reads a checkpoint's weights asks `verified`, whoever resumes a run `newest_whole`. All of the folder is read
and hashed, also what the reader has no use for: a disk that changed one file is not to be trusted with another.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from moelab.checkpoint import (
    CHECKPOINTS,
    CONFIG,
    MODEL,
    PICKLES,
    READING,
    STATE,
    TRAINING,
    checkpoints,
    newest_checkpoint,
    read_state,
    resolve_checkpoint,
    stored_tensors,
    tensor_files,
)
from moelab.errors import CheckpointError
from moelab.hf.files import READING as HF_READING
from moelab.manifest import MANIFEST, WHOLE, Manifest, Progress, Share, differences, read_manifest, unlisted
from moelab.printable import printable

logger = logging.getLogger("moelab")

_NEEDED = (MODEL, TRAINING, STATE, CONFIG)
_WEIGHTS = (".safetensors", *PICKLES)  # what could be taken for a part of a checkpoint that does not list it
_SETTLED = 1_000_000_000  # ns: a change as recent as this could leave the times that the system keeps as they are
_CURES = ("; use an earlier checkpoint, or restore it", f"; {READING.cure}", f"; {HF_READING.cure}")


@dataclass(frozen=True)
class Finding:
    """What was found of one checkpoint."""

    folder: Path
    problems: tuple[str, ...] = ()  # "FILE: what is wrong with it"; none: it can be used
    remarks: tuple[str, ...] = ()  # what should be known besides, a line each
    verifiable: bool = True  # False: an earlier version wrote it, so only its outlines were looked at
    files: int = 0
    tensors: int = 0
    nbytes: int = 0

    def summary(self) -> str:
        """The first problem, and how many more there are."""
        more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        return self.problems[0] + more


@dataclass(frozen=True)
class Choice:
    """Which checkpoint a run goes on from."""

    folder: Path | None = None  # None: it has none yet
    skipped: tuple[Finding, ...] = ()  # newer ones, which are damaged
    remarks: tuple[str, ...] = ()


class Look(Protocol):
    """Who looks at a checkpoint; `own`: of the very run that asks, so on a disk that all its processes see."""

    def __call__(self, folder: Path, *, own: bool) -> Finding: ...


Verify = bool | Look  # whether a checkpoint is compared with its checksums, or by whom; True: by this process


def inspect(
    folder: Path,
    progress: Progress = lambda nbytes: None,
    compare: Callable[[Path, Manifest, Progress], Iterable[str]] = differences,
) -> Finding:
    """Compare all of a checkpoint with its manifest. `progress` hears of the bytes that were read.

    `compare` reads the files and says what of them differs.
    """
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return _outlines(folder)
        problems = [f"{MANIFEST}: lists no {name}" for name in (STATE, CONFIG) if name not in manifest.files]
        problems += _without(MODEL, manifest) + _without(TRAINING, manifest)
        problems += compare(folder, manifest, progress)
        added = unlisted(folder, manifest)
        foreign = [name for name in added if name.endswith(_WEIGHTS)]
        problems += [f"{name}: is not of this checkpoint: {MANIFEST} does not list it; remove it" for name in foreign]
        if not problems:
            for name in (MODEL, TRAINING):
                stored_tensors(folder, name)  # that the files of several processes are of one whole
    except CheckpointError as error:
        return Finding(folder, (_short(error, folder),))
    except OSError as error:
        return Finding(folder, (f"can't be read: {error.strerror}",))
    remarks: tuple[str, ...] = ()
    if added:
        names = printable(", ".join(added[:5])) + (f" and {len(added) - 5} more" if len(added) > 5 else "")
        remarks = (f"{folder}: holds {names}, added after it was written: {MANIFEST} does not list it",)
    return Finding(
        folder, tuple(map(printable, problems)), remarks, True, len(manifest.files), manifest.tensors, manifest.nbytes
    )


def verified(path: Path, *, verify: Verify = True) -> Path:
    """The folder that holds the weights, as `resolve_checkpoint` says, when it is as it was written.

    Raises CheckpointError naming the file and the tensor that differ, and the checkpoint before it that is whole: no
    other is taken in its place. Not `verify`: nothing is compared, and that is said. A Hugging Face folder has no
    manifest to compare it with.
    """
    folder = (newest_checkpoint(path) if (path / CHECKPOINTS).is_dir() else None) or path
    if not any((folder / name).is_file() for name in (STATE, CONFIG, TRAINING)):
        return resolve_checkpoint(path)
    if not verify:
        logger.warning("%s: not verified, as asked", folder)
        return resolve_checkpoint(folder)
    finding = _looked(folder, verify, own=False)
    if finding.problems:
        raise CheckpointError(f"{folder}/{finding.summary()}; {_cure(folder, verify)}")
    for remark in finding.remarks:
        logger.warning(remark)
    return resolve_checkpoint(folder)


def newest_whole(run_dir: Path, *, verify: Verify = True) -> Choice:
    """The newest checkpoint of a run that is as it was written. Raises CheckpointError where all are damaged."""
    skipped: list[Finding] = []
    for folder in reversed(checkpoints(run_dir)):
        finding = Finding(folder, remarks=(f"{folder}: not verified, as asked",))
        if verify:
            finding = _looked(folder, verify, own=True)
        if not finding.problems:
            return Choice(folder, tuple(skipped), finding.remarks)
        skipped.append(finding)
    if skipped:
        reasons = "; ".join(f"{finding.folder.name}/{finding.summary()}" for finding in skipped)
        raise CheckpointError(
            f"{run_dir}: none of its {len(skipped)} checkpoints is as it was written: {reasons}; restore one from a "
            "copy, or begin anew with --force"
        )
    return Choice()


def _outlines(folder: Path) -> Finding:
    """Of a checkpoint without checksums: whether its files are there and whole as far as they say themselves."""
    problems = [f"{name}: is missing" for name in _NEEDED if not (folder / name).is_file()]
    if not problems:
        try:
            if read_state(folder).get("manifest"):
                problems.append(f"{MANIFEST}: is missing")
            for name in (MODEL, TRAINING):
                stored_tensors(folder, name)
        except CheckpointError as error:
            problems.append(_short(error, folder))
    remark = f"{folder}: can't be verified: it has no {MANIFEST}, as an earlier version of moelab wrote it"
    return Finding(folder, tuple(problems), () if problems else (remark,), verifiable=False)


def _without(name: str, manifest: Manifest) -> list[str]:
    try:
        tensor_files(name, manifest.files.keys())
    except CheckpointError as error:
        return [str(error)]
    return []


def _cure(folder: Path, verify: Verify) -> str:
    """Names the checkpoint to take instead, if there is one."""
    siblings = checkpoints(folder.parent.parent) if folder.parent.name == CHECKPOINTS else []
    for other in reversed([sibling for sibling in siblings if sibling.name < folder.name]):
        found = _looked(other, verify, own=False)
        if not found.problems:
            return f"use {other}, which is {'whole' if found.verifiable else 'older'}, or restore it"
    return "use an earlier checkpoint, or restore it"


def _short(error: CheckpointError, folder: Path) -> str:
    """A reader's complaint without the folder and the cure, which the caller has."""
    said = str(error).removeprefix(f"{folder}/")
    for cure in _CURES:
        said = said.removesuffix(cure)
    return said


def _looked(folder: Path, verify: Verify, *, own: bool) -> Finding:
    if verify is not True:
        assert verify, "asked to look, and not to verify"
        return verify(folder, own=own)
    return inspect(folder, compare=lambda *_: share_differences(folder, WHOLE))


def share_differences(folder: Path, share: Share) -> tuple[str, ...]:
    """What differs from its manifest in a share of a checkpoint's bytes, the rest of it unread.

    Or what it was a moment ago, if no file has been touched since: a command asks several times.
    """
    try:
        states = [(path.name, _state(path)) for path in sorted(folder.iterdir())]
        if not states or time.time_ns() - max(state.st_ctime_ns for _, state in states) < _SETTLED:
            return _differences(folder, share)
        stamps = tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in states)
        return _known_differences(folder, share, stamps)
    except CheckpointError as error:
        return (_short(error, folder),)
    except OSError as error:
        return (f"can't be read: {error.strerror}",)


def _differences(folder: Path, share: Share) -> tuple[str, ...]:
    manifest = read_manifest(folder)
    return () if manifest is None else tuple(differences(folder, manifest, share=share))


def _state(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError:  # a link that leads nowhere, as an editor's lock is
        return path.lstat()


@lru_cache(maxsize=64)
def _known_differences(
    folder: Path, share: Share, stamps: tuple[tuple[str, int, int, int, int], ...]
) -> tuple[str, ...]:
    return _differences(folder, share)
