"""Finding and reading a user's files: paths relative to the config, and text that must really be text."""

from __future__ import annotations

from pathlib import Path

from moelab.errors import DataError
from moelab.paths import unresolved_hint, user_path

GLOB_CHARACTERS = "*?["


def resolve_path(path: str, base: Path) -> Path:
    """The file or folder `path` names: beside the config file (`base`) if it is there, else from where one stands.

    Raises DataError with the places that were tried.
    """
    tried = _candidates(user_path(path, "data.source"), base)
    for candidate in tried:
        if candidate.exists():
            return candidate
    raise DataError(
        f"data.source: no file or folder '{path}' (looked for {', '.join(map(str, tried))})" + unresolved_hint(path)
    )


def resolve_files(path: str, base: Path, pattern: str = "**/*") -> tuple[Path, list[Path]]:
    """A file, a glob, or a folder searched by `pattern` -> (the folder searched, its files in order).

    Files whose path below that folder has a part starting with a dot are left out. Raises DataError when none is found.
    """
    if not any(character in path for character in GLOB_CHARACTERS):
        root = resolve_path(path, base)
        return (root.parent, [root]) if root.is_file() else (root, _matches(root, pattern, path))
    parts = user_path(path, "data.source").parts
    fixed = next(i for i, part in enumerate(parts) if any(character in part for character in GLOB_CHARACTERS))
    pattern = str(Path(*parts[fixed:]))
    tried = _candidates(Path(*parts[:fixed]), base)
    for root in tried[:-1]:
        if any(root.glob(pattern)):
            return root, _matches(root, pattern, path)
    return tried[-1], _matches(tried[-1], pattern, path)


def _candidates(path: Path, base: Path) -> list[Path]:
    return [path] if path.is_absolute() else list(dict.fromkeys([base / path, Path.cwd() / path]))


def _matches(root: Path, pattern: str, path: str) -> list[Path]:
    inside = ((file, file.relative_to(root)) for file in root.glob(pattern) if file.is_file())
    files = sorted(file for file, below in inside if not any(part.startswith(".") for part in below.parts))
    if not files:
        raise DataError(f"data.source: no file matches '{path}' (searched {root} for '{pattern}'); mend the path")
    return files


def read_text(path: Path) -> str:
    """A file's text, which must be UTF-8; its byte-order mark is left out. Raises DataError naming the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"data.source: {path} can't be read: {error.strerror}") from error
    return decode_text(data, str(path))


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
