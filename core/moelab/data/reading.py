"""Finding and reading a user's files: paths relative to the config, and text that must really be text."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

from moelab.data.account import Account
from moelab.errors import DataError
from moelab.hub import dataset_path, is_dataset
from moelab.paths import Places, unresolved_hint, user_path
from moelab.safe_files import Reading, read_bytes

GLOB_CHARACTERS = "*?["
LARGEST = 4 << 30  # bytes of one text, which is held whole
READING = Reading(DataError, "mend it, or leave it out of data.source")
Key = TypeVar("Key")

logger = logging.getLogger("moelab")


def resolve_path(path: str, places: Places, account: Account | None = None) -> Path:
    """The file or folder `path` names, at the first place where it is; that others have it too is told.

    hf://datasets/... is a file or folder of a dataset on the Hugging Face hub (`moelab.hub`): the commit goes into the
    account.

    Raises DataError with the places that were tried.
    """
    tried = _candidates(path, places, (), account or Account())
    found = [candidate for candidate in tried if _exists(candidate)]
    if found:
        _tell_others(path, found)
        return found[0]
    raise DataError(
        f"data.source: no file or folder '{path}' (looked for {', '.join(map(str, tried))})" + unresolved_hint(path)
    )


def resolve_files(
    path: str, places: Places, patterns: Sequence[str] = ("**/*",), account: Account | None = None
) -> tuple[Path, list[Path]]:
    """A file, a glob, or a folder searched by `patterns` -> (the folder searched, its files in order).

    A name that exists is taken literally, brackets and all. Links keep their own names. What a folder holds and is not
    read (other names than the patterns', names that start with a dot, broken links, unreadable folders) goes into the
    account, as does the commit of a dataset on the Hugging Face hub (hf://datasets/...), of which only what is asked
    for is fetched. Raises DataError when nothing is found.
    """
    account = account or Account()
    roots = [_fixed_part(candidate) for candidate in _candidates(path, places, patterns, account)]
    named = [root for root, rest in roots if not rest and _exists(root)]
    for root in named:
        _tell_others(path, named)
        if root.is_file():
            return root.parent, [root]
        return root, _matches(root, patterns, path, account, tell=True)
    if not any(rest for _, rest in roots):
        resolve_path(path, places, account)  # raises, naming the places that were looked at
    for root, rest in roots[:-1]:
        if rest and any(matches(rest, below) for _, below in _walk(root, rest, Account())):
            return root, _matches(root, [rest], path, account)
    root, rest = roots[-1]
    return root, _matches(root, [rest], path, account)


def distinct_files(
    paths: Iterable[tuple[Key, str]], places: Places, patterns: Sequence[str], account: Account
) -> Iterator[tuple[Key, Path, Path]]:
    """(key, folder searched, file) of all paths; a file reached by two names is read under the first, and told."""
    seen: dict[Path, Path] = {}
    for key, path in paths:
        root, files = resolve_files(path, places, patterns, account)
        for file in files:
            first = seen.setdefault(file.resolve(), file)
            if first is not file:
                account.add("files read once, reached twice", f"{file}, also {first}", "name each file once")
                continue
            yield key, root, file


def _candidates(path: str, places: Places, patterns: Sequence[str], account: Account) -> list[Path]:
    given = user_path(path, "data.source")
    if is_dataset(path):
        found = dataset_path(path, patterns)
        account.commits[found.name] = found.commit
        return [found.path]
    return list(dict.fromkeys(folder / given for folder in places.of(path)))


def _tell_others(path: str, found: Sequence[Path]) -> None:
    if len(found) > 1:
        logger.warning("data.source: '%s' is in several places; %s is read, and not %s", path, *found[:2])


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _fixed_part(path: Path) -> tuple[Path, str]:
    """(what exists as it is spelled, or has no glob characters; the glob that is left)."""
    fixed = Path(path.parts[0])
    for number, part in enumerate(path.parts[1:], 1):
        if any(character in part for character in GLOB_CHARACTERS) and not _exists(fixed / part):
            return fixed, str(PurePosixPath(*path.parts[number:]))
        fixed /= part
    return fixed, ""


def _matches(root: Path, patterns: Sequence[str], path: str, account: Account, *, tell: bool = False) -> list[Path]:
    """`tell`: files of other names go into the account; of a glob's they don't, it says itself what it leaves out."""
    files, names = [], "' or '".join(patterns)
    deepest = "**/*" if len(patterns) > 1 else patterns[0]
    for file, below in sorted(_walk(root, deepest, account)):
        if any(matches(pattern, below) for pattern in patterns):
            files.append(file)
        elif tell:
            account.add(f"files left out, not '{names}'", below, "name them in data.source if they are wanted")
    if not files:
        raise DataError(f"data.source: no file matches '{path}' (searched {root} for '{names}'); mend the path")
    return files


def _walk(root: Path, pattern: str, account: Account) -> Iterator[tuple[Path, str]]:
    """(file, its path below `root`) of the files that `pattern` may reach; links to folders are followed once."""

    def unreadable(error: OSError) -> None:
        account.add(f"folders left out, {error.strerror}", str(error.filename), "make them readable, or name others")

    parts = PurePosixPath(pattern).parts
    entered: set[Path] = set()
    for here, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        above = Path(here).relative_to(root)
        if Path(here).resolve() in entered:  # a link back up, or a second link to the same folder
            folders.clear()
            continue
        entered.add(Path(here).resolve())
        for name in sorted(n for n in (*folders, *names) if n.startswith(".")):
            account.add("files left out, hidden by a dot", (above / name).as_posix(), "rename them if they are wanted")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "**" not in parts and len(above.parts) + 1 >= len(parts):
            for name in folders:
                if matches(pattern, (above / name).as_posix()):
                    account.add(f"folders left out, '{pattern}' names files", name, f"write {pattern}/**/* for theirs")
            folders.clear()
        for name in sorted(name for name in names if not name.startswith(".")):
            file, below = Path(here) / name, (above / name).as_posix()
            if file.is_file():
                yield file, below
            else:
                what = "links to nowhere" if file.is_symlink() else "no regular files"
                account.add(f"files left out, {what}", below, "mend them, or take them out")


def matches(pattern: str, below: str) -> bool:
    """Whether a path below the folder searched fits a glob, part by part; `**` stands for any number of folders."""
    return _parts_match(PurePosixPath(pattern).parts, PurePosixPath(below).parts)


def _parts_match(patterns: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_parts_match(patterns[1:], parts[skipped:]) for skipped in range(len(parts) + 1))
    if not parts:
        return False
    spelled = patterns[0].replace("[", "[[]")  # brackets are a choice of characters, or stand in the name
    if not any(re.match(fnmatch.translate(pattern), parts[0]) for pattern in (patterns[0], spelled)):
        return False
    return _parts_match(patterns[1:], parts[1:])


def read_text(path: Path) -> str:
    """A file's text, which must be UTF-8; its byte-order mark is left out. Raises DataError naming the file."""
    return decode_text(read_bytes(path, READING, LARGEST), str(path))


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 bytes -> text. Raises DataError for what is binary or in another encoding."""
    nul = data.find(b"\0")
    if nul >= 0:
        raise DataError(
            f"data.source: {where} is binary, not text (a NUL at byte {nul}); leave it out by a narrower path, "
            "say 'folder/**/*.txt', or convert it to UTF-8 if it is UTF-16"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.source: {where} is not UTF-8 text (byte {error.start}: 0x{data[error.start]:02x}); leave it out by "
            "a narrower path, say 'folder/**/*.txt', or convert it: iconv -f latin1 -t utf-8"
        ) from error
