"""Text of Debian packages, each pinned by its hash. `pip install 'moelab[debian]'`."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moelab import Component, ConfigError, Corpus, DataContext, DataError, Document, build_corpus, component, hookimpl
from moelab.data.reading import decode_text, matches
from moelab.safe_files import Reading, check_regular
from moelab_plugins.data_sources._deb import GZIP, Entry, files_of, package_of
from moelab_plugins.data_sources._records import require

READING = Reading(DataError, "data.source names it: download it, or leave it out")
DOCS = ("usr/share/doc/**/*.txt*", "usr/share/doc/**/*.html", "usr/share/man/**/*", "usr/share/info/*.info*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class DebianOptions:
    # {path of a .deb: its sha256}, as `sha256sum` prints it and an archive's Packages file says it.
    packages: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=lambda: [*DOCS, "**/*.py"])  # patterns of paths in a package
    domain: str | None = None  # of all of it; null: the package's name
    largest_mb: float = 16.0  # of a file, and of what it is decompressed to; a larger one is left out, and told
    skip_bad: bool = False  # leave out what is no text in UTF-8, and count it, instead of ending there
    deduplicate: bool = True  # drop exact and near copies before the split

    def __post_init__(self) -> None:
        for path, given in self.packages.items():
            if not _SHA256.fullmatch(str(given).lower()):
                raise ValueError(f"packages: '{given}' is no sha256 of {path}: 64 hexadecimal digits, as of sha256sum")
        if not self.largest_mb > 0:
            raise ValueError(f"largest_mb: {self.largest_mb} is no size above 0")


def debian(options: DebianOptions, context: DataContext) -> Corpus:
    """Files of .deb packages that patterns name, each a document; gzipped ones are decompressed.

    All hashes are compared before anything is read. Nothing is unpacked to disk, no script of a package is run, links
    are not followed (what they point to is read under its own name, where a pattern names it). A package compressed by
    zstd, as Ubuntu's are, takes moelab[parquet] too.
    """
    if not options.packages:
        raise ConfigError("packages: nothing to read; give `packages: {path.deb: its sha256}`")
    require("arpy", "debian", "debian")
    found = [_checked(context.find(path), expected) for path, expected in options.packages.items()]
    sources: dict[str, dict[str, str]] = {}
    documents = (document for file in found for document in _documents(file, options, context, sources))
    return build_corpus(documents, context, sources=sources, deduplicate=options.deduplicate)


def _checked(file: Path, expected: str) -> Path:
    """The file, which has this sha256. Raises DataError for another one."""
    check_regular(file, READING)
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected.lower():
        raise DataError(
            f"data.source: {file} is another file than it was: its sha256 is {found}, and the config says "
            f"{expected}; get the one that was meant, or write its own"
        )
    return file


def _documents(
    file: Path, options: DebianOptions, context: DataContext, sources: dict[str, dict[str, str]]
) -> Iterator[Document]:
    package = package_of(file)
    domain = options.domain or package.name
    sources.setdefault(domain, {})[package.name] = package.version
    for entry in files_of(file):
        if entry.kind == "folder" or not any(matches(pattern, entry.path) for pattern in options.files):
            continue
        where = f"{file.name}/{entry.path}"
        if entry.kind != "file":
            what = "links" if entry.kind == "link" else "no regular files"
            context.account.add(f"files of packages left out, {what}", where, "what they point to is read where named")
            continue
        text = _text(entry, where, options, context)
        if text is not None:
            yield Document(text, domain, f"{package.name}/{entry.path}")


def _text(entry: Entry, where: str, options: DebianOptions, context: DataContext) -> str | None:
    """A file's text; None where it is left out, and counted."""
    limit = int(options.largest_mb * 1e6)
    content = entry.read() if entry.size <= limit else b""
    try:
        if content.startswith(GZIP):
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(limit + 1)
        if max(entry.size, len(content)) > limit:
            what = f"files of packages left out, of more than {options.largest_mb:g} MB"
            context.account.add(what, where, "raise largest_mb where they are wanted")
            return None
        return decode_text(content, where)
    except (EOFError, OSError, zlib.error) as error:
        said = DataError(f"data.source: {where} can't be decompressed: {error}; leave it out by narrower `files`")
        _bad(said, "that can't be decompressed", options, context)
    except DataError as error:
        _bad(error, "no text in UTF-8", options, context)
    return None


def _bad(error: DataError, what: str, options: DebianOptions, context: DataContext) -> None:
    if not options.skip_bad:
        raise error
    context.account.add(f"files of packages left out, {what}", str(error), "name narrower `files`")


@hookimpl
def moelab_data_sources() -> list[Component[DataContext, Corpus]]:
    return [component("debian", DebianOptions, debian)]
