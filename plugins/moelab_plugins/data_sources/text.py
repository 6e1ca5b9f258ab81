"""A user's own text files: files, globs and folders of UTF-8 text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moelab import Component, ConfigError, Corpus, DataContext, Document, build_corpus, component, hookimpl
from moelab.data.reading import distinct_files, read_text
from moelab.hub import folder_name


@dataclass
class TextOptions:
    paths: list[str] = field(default_factory=list)  # the domain of a file is the folder it lies in, see `text`
    domains: dict[str, list[str]] = field(default_factory=dict)  # {domain: paths}, instead of `paths` or beside them
    pattern: str = "**/*"  # which files of a folder are read, say "**/*.md"; names starting with a dot never are
    separator: str | None = None  # cuts each file into documents, say "<|endoftext|>" or "\n\n\n"; null: one each
    deduplicate: bool = True  # drop exact and near copies before the split

    def __post_init__(self) -> None:
        if self.separator == "":
            raise ValueError("separator: must not be empty; null keeps each file whole")


def text(options: TextOptions, context: DataContext) -> Corpus:
    """Files, globs or folders of UTF-8 text; a folder's subfolders are its domains.

    Domain of a file found in a folder: the first subfolder below the one given, or that folder's own name for
    a file directly in it. Paths are relative to the config file's folder, or else to the current one.
    """
    if not options.paths and not options.domains:
        raise ConfigError("paths: nothing to read; give `paths: [...]` or `domains: {name: [...]}`")
    return build_corpus(_documents(options, context), context, deduplicate=options.deduplicate)


def _documents(options: TextOptions, context: DataContext) -> Iterator[Document]:
    paths: list[tuple[str | None, str]] = [(None, path) for path in options.paths]
    paths += [(domain, path) for domain, several in options.domains.items() for path in several]
    for domain, root, file in distinct_files(paths, context.places, (options.pattern,), context.account):
        below = file.relative_to(root)
        of_file = domain or (below.parts[0] if len(below.parts) > 1 else folder_name(root)) or "text"
        yield from _cut(read_text(file), of_file, f"{folder_name(root)}/{below.as_posix()}", options.separator)


def _cut(content: str, domain: str, name: str, separator: str | None) -> Iterator[Document]:
    if separator is None:
        yield Document(content, domain, name)
        return
    for number, piece in enumerate(content.split(separator)):
        if piece.strip():
            yield Document(piece, domain, f"{name}#{number}")


@hookimpl
def moelab_data_sources() -> list[Component[DataContext, Corpus]]:
    return [component("text", TextOptions, text)]
