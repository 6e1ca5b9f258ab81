"""What is put in place whole or not at all: a file over a file, a folder over a folder.

Beside NAME lie, while it is written or after a kill: `.NAME.partial`, which nobody needs; `.NAME.replaced`, the old
folder, whole, in the one moment in which a system that can't exchange two names has no NAME; `.NAME.lock`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from moelab.errors import UserError

PARTIAL, REPLACED = ".partial", ".replaced"

logger = logging.getLogger("moelab")

# Linux 3.15: include/uapi/linux/fs.h, fcntl.h; rename(2).
_AT_FDCWD, _RENAME_EXCHANGE = -100, 1 << 1
# What file systems answer that can't exchange: NFS and old FUSE, old kernels, a lower layer of overlayfs.
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV}


def partial(path: Path) -> Path:
    """Where `path` is written before it is whole, and what it was is deleted."""
    return path.with_name(f".{path.name}{PARTIAL}")


def lock_beside(path: Path) -> Path:
    """The lock of who writes the folder `path`."""
    return path.with_name(f".{path.name}.lock")


def check_output(path: Path, where: str = "", *, file: bool = False, read: Iterable[Path] = ()) -> None:
    """Before any work: raises UserError where nothing can be written in a folder `path`, or no `file`; makes nothing.

    `where`: the option or key that names it. `read`: files that a file is made of, and must not replace.
    """
    named, kind = f"{where} {path}".lstrip(), "file" if file else "folder"
    if os.path.exists(path) and not (path.is_file() if file else path.is_dir()):
        raise UserError(f"{named}: is {_what(path)}, and a {kind} is to be written there; {_ELSEWHERE}")
    if file and path.is_symlink() and os.readlink(path).startswith("/proc/"):  # /dev/stdout: it would be replaced
        raise UserError(f"{named}: leads to what a process has open, and a file is to be put there; name a file")
    if any(os.path.exists(one) and path.exists() and path.samefile(one) for one in read):
        raise UserError(f"{named}: is what is read, and would be lost; name another file")
    _check_room(path.parent if file else path, named, kind)


def check_place(path: Path, where: str = "", *, fresh: bool = True) -> None:
    """Before any work: raises UserError where `put_in_place` could put no folder at `path`; makes nothing.

    A folder that holds something is refused unless not `fresh`.
    """
    named = f"{where} {path}".lstrip()
    if path.is_symlink() or (os.path.exists(path) and not path.is_dir()):
        what = "a link" if path.is_symlink() else _what(path)
        raise UserError(f"{named}: is {what}, and a folder is to be put there; {_ELSEWHERE}")
    here = Path.cwd()
    if path.name in ("", "..") or path.resolve() in (here, *here.parents):
        raise UserError(f"{named}: a folder is to be put there whole, and one that you are in can't be; name a new one")
    _check_room(path.parent, named, "folder")
    if fresh and _holds_something(path):
        raise UserError(f"{named}: is there already, and is not written over; name another folder, or remove it")


_ELSEWHERE = "name another, or move it away"


def _what(path: Path) -> str:
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "no file"


def _check_room(folder: Path, named: str, kind: str) -> None:
    """Raises UserError where `folder`, there or to be made, takes no file; `named`: what is to be in it."""
    above = folder
    while not os.path.exists(above):
        if above.is_symlink():
            raise UserError(f"{named}: {above} is a link that leads nowhere; make what it leads to, or name another")
        above = above.parent
    try:
        with tempfile.TemporaryFile(dir=above):  # the system's own answer: who we are, read-only, full, no folder
            pass
    except OSError as error:
        raise UserError(f"{named}: can't be written, {above}: {error.strerror}; choose another {kind}") from error


def write_output(path: Path, content: bytes | str, where: str = "") -> None:
    """`write_file` of what a user named, the folders above it made. Raises UserError for what the system refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        named = f"{where} {path}".lstrip()
        raise UserError(f"{named}: can't be written ({error.strerror}); choose another place") from error


def write_file(path: Path, content: bytes | str) -> None:
    """Written beside, synced, renamed: a reader sees the old file or the new one, never half of one.

    Raises UserError where a folder lies in the file's place, OSError for what the system refuses.
    """
    if path.is_dir() and not path.is_symlink():
        raise UserError(f"{path}: is a folder, and a file of this name is to be written; move it away")
    data = content.encode() if isinstance(content, str) else content
    beside = partial(path)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW  # a link that lies there leads elsewhere
        with os.fdopen(os.open(beside, flags, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names no file
        with contextlib.suppress(OSError):  # a full disk needs the space
            beside.unlink()
        raise


def put_in_place(new: Path, target: Path) -> None:
    """The folder `new`, whose files are synced, becomes `target`; what stood there is deleted afterwards.

    There is always a `target`, the old or the new one, where system and file system can exchange two names. Elsewhere
    a kill between two renames leaves the old one in `.NAME.replaced`, for `recover`.
    """
    old = new
    if not _holds_something(target):
        new.rename(target)  # over nothing, or an empty folder
    elif not exchange(new, target):
        old = _replaced(target)
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
    sync(target.parent)
    if old.exists():
        discard(old, partial(target))


def discard(folder: Path, name: Path | None = None) -> None:
    """Delete a folder that a kill must not leave half deleted under its own name: it becomes `name` first."""
    name = partial(folder) if name is None else name
    if folder != name:
        shutil.rmtree(name, ignore_errors=True)
        folder.rename(name)
    shutil.rmtree(name, ignore_errors=True)


def recover(target: Path) -> None:
    """Undo what a killed writer of the folder `target` left beside it, and say so. The caller holds its lock."""
    old = _replaced(target)
    if old.exists() and not _holds_something(target):
        old.rename(target)
        logger.warning("%s: brought back; a killed command had moved it aside as %s", target, old.name)
    for left in (old, partial(target)):
        if left.is_dir():
            size = sum(path.stat().st_size for path in left.rglob("*") if path.is_file())
            discard(left, partial(target))
            logger.warning("%s: removed %s, %s that a killed command left", target, left.name, in_bytes(size))


def recover_all(parent: Path) -> None:
    """`recover` for whatever a killed writer left in this folder. The caller holds a lock on all of it."""
    for name in sorted({Path(left.name[1:]).stem for left in parent.glob(".*") if left.suffix in (PARTIAL, REPLACED)}):
        recover(parent / name)


def where_it_may_be(folder: Path) -> str:
    """For a reader's complaint that `folder` is not there: the end of a sentence, empty where nothing is known."""
    old = _replaced(folder)
    if not old.is_dir():
        return ""
    return (
        f"; a command that was killed while it replaced it left it whole as {old}: rename it, or run the command again"
    )


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where system or file system can't. Raises OSError for other failures."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    first, second = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, first, _AT_FDCWD, second, ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def sync(path: Path) -> None:
    """A file's content, or the names in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}{REPLACED}")


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def in_bytes(count: int) -> str:
    """ "1.5 GB", as a person reads it; GB is 10^9."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
