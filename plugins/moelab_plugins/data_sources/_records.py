"""What the sources of records share (JSON lines, parquet, datasets): their keys, and what becomes of bad records."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, TypeVar

from moelab import ConfigError, DataError, Document
from moelab.data.account import Account
from moelab.errors import near
from moelab.safe_files import kind_of

FoundT = TypeVar("FoundT")
ROWS = 256  # of a table that are in memory at once


@dataclass
class RecordOptions:
    paths: list[str] = field(default_factory=list)  # files, globs or folders
    text_key: str = "text"
    # Conversations, [{role: user, content: ...}, ...], are under this key, rendered by the tokenizer's chat template; a
    # line without it has its text read.
    messages_key: str | None = None
    domain_key: str | None = None  # null: the domain is the file's name up to its first dot
    id_key: str | None = None  # a record's own name; one that stands twice is refused. null: the file and a number
    skip_bad: bool = False  # leave out what can't be used, and count it, instead of ending there
    deduplicate: bool = True  # drop exact and near copies before the split

    @property
    def keys(self) -> list[str]:
        """Of a record, those that are read."""
        content = self.messages_key or self.text_key
        return [key for key in (content, self.domain_key, self.id_key) if key is not None]


class Records:
    """Records -> documents. What can't be used ends it with a DataError, or with `skip_bad` is counted."""

    def __init__(self, options: RecordOptions, account: Account) -> None:
        """Raises ConfigError where nothing is named."""
        if not options.paths:
            raise ConfigError("paths: nothing to read; give `paths: [...]`")
        self._options, self._account = options, account
        self._ids: set[bytes] = set()  # 8 bytes of a hash each

    def bad(self, what: str, error: DataError) -> None:
        """`what` as the account says it, "not JSON"; raises `error` unless bad records are left out."""
        if not self._options.skip_bad:
            raise error
        self._account.add(f"records left out, {what}", str(error), "mend them where they matter")

    def attempt(self, what: str, function: Callable[..., FoundT], *arguments: Any) -> FoundT | None:
        """What `function` returns; None where it raises a DataError that is counted as `what`."""
        try:
            return function(*arguments)
        except DataError as error:
            self.bad(what, error)
            return None

    def document(self, record: Any, where: str, name: str, domain: str) -> Document | None:
        """The document of a record, or None where it is left out. `where`: its place, for messages."""
        options = self._options
        found = self._said(record, where)
        if found is None:
            return None
        if "\0" in found.text:
            self.bad("with a NUL", DataError(f"data.source: {where} is binary, not text (it has a NUL); leave it out"))
            return None
        if options.domain_key is not None:
            own = self.attempt("without a domain", _word, record, options.domain_key, "domain_key", where)
            if own is None:
                return None
            domain = own
        if options.id_key is not None:
            own = self.attempt("without an id, or with one that was there before", self._id, record, where)
            if own is None:
                return None
            name = own
        return replace(found, domain=domain, name=name)

    def _said(self, record: Any, where: str) -> Document | None:
        """The record's text, or its conversation; domain and name are not known yet."""
        options = self._options
        bare = isinstance(record, dict) and record.get(options.messages_key) is None and options.text_key in record
        if options.messages_key is None or bare:
            text = self.attempt(f"without a text '{options.text_key}'", _text, record, options.text_key, where)
            return None if text is None else Document(text, "", "")
        return self.attempt("without a conversation", _conversation, record, options.messages_key, where)

    def rows(
        self, batches: Iterable[Mapping[str, Sequence[Any]]], where: Callable[[int], str], name: str, domain: str
    ) -> Iterator[Document]:
        """The documents of a table. batches: {key: values of the same length}; rows are counted from 1."""
        number = 0
        for batch in batches:
            for values in zip(*(batch[key] for key in self._options.keys), strict=True):
                number += 1
                record = dict(zip(self._options.keys, values, strict=True))
                found = self.document(record, where(number), f"{name}:{number}", domain)
                if found is not None:
                    yield found

    def _id(self, record: Any, where: str) -> str:
        assert self._options.id_key is not None
        own = _word(record, self._options.id_key, "id_key", where)
        digest = hashlib.blake2b(own.encode("utf-8", "replace"), digest_size=8).digest()
        if digest in self._ids:
            raise DataError(
                f"data.source: {where} has the id '{own}', which a record before it has too; mend the ids, or leave "
                "id_key out"
            )
        self._ids.add(digest)
        return own


def check_columns(found: Sequence[str], options: RecordOptions, where: object) -> None:
    """Raises DataError for a table without a column that is asked for."""
    content = (options.messages_key, "messages_key") if options.messages_key else (options.text_key, "text_key")
    for key, option in (content, (options.domain_key, "domain_key"), (options.id_key, "id_key")):
        if key is not None and key not in found:
            raise DataError(
                f"data.source: {where} has no column '{key}'{near(key, found)} It has: {', '.join(found)}; set "
                f"data.source.{option}"
            )


def require(package: str, extra: str, what: str) -> Any:
    """The module of an optional package. Raises ConfigError naming the extra that brings it."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what} needs the package {package.partition('.')[0]}, which is not installed: pip install "
            f"'moelab[{extra}]'"
        ) from error


def _text(record: Any, key: str, where: str) -> str:
    if isinstance(record, dict) and isinstance(record.get(key), str):
        return str(record[key])
    found = ", ".join(map(str, record)) if isinstance(record, dict) else kind_of(record)
    kind = f", but {kind_of(record[key])}" if isinstance(record, dict) and key in record else ""
    raise DataError(
        f"data.source: {where} has no string '{key}'{kind} (it has: {found}); set data.source.text_key, or write "
        "skip_bad: true"
    )


def _conversation(record: Any, key: str, where: str) -> Document:
    try:
        messages: Any = record.get(key) if isinstance(record, dict) else None
        return Document.conversation(messages, "", "")
    except DataError as error:
        raise DataError(f"data.source: {where}, '{key}': {error}; set data.source.messages_key") from error


def _word(record: Any, key: str, option: str, where: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        return str(value)
    raise DataError(
        f"data.source: {where} has no string or whole number '{key}' (it has: {', '.join(map(str, record))}); set "
        f"data.source.{option}, or write skip_bad: true"
    )
