"""Documents -> a tokenised corpus, split by what they say into training and held-out streams.

N tokens, n documents. A stream is all its documents end to end, each followed by the end-of-document token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moelab.data.account import Account
from moelab.data.chat import ChatTemplate, Message, check_messages
from moelab.data.deduplicate import LEAK, LEAKED, Lines, Sorted, sort_out
from moelab.data.identity import TEXT, text_identity
from moelab.data.joined import Tokens
from moelab.data.reading import resolve_path
from moelab.data.special_tokens import spelling
from moelab.data.split import split
from moelab.data.tokenizer import Tokenizer
from moelab.errors import DataError
from moelab.paths import Places

_TOGETHER = 1 << 22  # characters that are encoded in one call
LONG_LINE = 200  # characters: a text, where a shorter one may be a title or a question
_KEEP = "where the source has the option, deduplicate: false keeps them"


@dataclass(frozen=True)
class Document:
    """One text. `name` is the same on every machine: no absolute path.

    With `messages` it is a conversation: its ids are those of the tokenizer's chat template, and `text` is what is said
    in it, which filters, copies and the split look at.
    """

    text: str
    domain: str
    name: str
    messages: tuple[Message, ...] | None = field(default=None, hash=False)

    @classmethod
    def conversation(cls, messages: Sequence[Message], domain: str, name: str) -> Document:
        """Raises DataError for messages that are none, naming the turn."""
        check_messages(messages)
        said = (str(message["content"]) for message in messages if message.get("content"))
        return cls("\n\n".join(said), domain, name, tuple(messages))

    @cached_property
    def identity(self) -> int:
        """64 bits of the text's content, the same for texts that differ in case or white space only."""
        return text_identity(self.text)

    @property
    def digest(self) -> bytes:
        """sha256 of domain and text, and of the messages where it has some."""
        whole = f"{self.domain}\0{self.text}"
        if self.messages is not None:
            whole += "\0" + json.dumps(self.messages, sort_keys=True)
        return hashlib.sha256(whole.encode("utf-8", "replace")).digest()


@dataclass(frozen=True)
class TokenStream:
    """Tokens that may lie on disk: `tokens` is any one-dimensional integer array, also a memmap, or several."""

    tokens: Tokens  # [N]
    document_starts: np.ndarray  # [n + 1] int64, rising strictly from 0 to N
    document_domain: np.ndarray  # [n] int64, into Corpus.domains
    document_names: Sequence[str]  # n
    token_bytes: np.ndarray | None = None  # [N], UTF-8 bytes each token stands for; 0 for the end of a document
    id_bytes: np.ndarray | None = None  # [V], the same by token id; integers, or an average's fractions
    identities: np.ndarray | None = None  # [n] uint64, `data.identity`; None: of the token ids, when asked for

    def __post_init__(self) -> None:
        starts = self.document_starts
        assert (starts[0], starts[-1]) == (0, len(self.tokens)), (starts[0], starts[-1], len(self.tokens))
        assert len(starts) == len(self.document_domain) + 1 == len(self.document_names) + 1, "one entry per document"

    def __len__(self) -> int:
        return len(self.tokens)

    def bytes_of(self, begin: int, end: int) -> np.ndarray | None:
        """tokens [begin, end) -> bytes [end - begin], or None when they are not known."""
        if self.token_bytes is not None:
            return np.asarray(self.token_bytes[begin:end])
        if self.id_bytes is not None:
            return np.asarray(self.id_bytes[np.asarray(self.tokens[begin:end])])
        return None

    @property
    def exact_bytes(self) -> bool:
        """Whether `bytes_of` counts bytes; an average number of bytes a token does not say what one document has."""
        known = self.token_bytes if self.token_bytes is not None else self.id_bytes
        return known is not None and known.dtype.kind in "iu"

    def document_of(self, position: np.ndarray) -> np.ndarray:
        """position [...] int64 in 0 .. N-1 -> which document it lies in [...] int64."""
        return np.searchsorted(self.document_starts, position, side="right").astype(np.int64) - 1


@dataclass(frozen=True)
class Corpus:
    """What a data source builds. Equal fingerprints: the same text, split and tokens, in whatever order read."""

    train: TokenStream
    validation: TokenStream
    domains: list[str]
    fingerprint: str
    manifest: dict[str, Any] = field(default_factory=dict)  # {domain: documents, bytes, tokens, ..., sources}
    left_out: dict[str, Any] = field(default_factory=dict)  # {what: count, example, cure}, as `Account` tells it
    identity_kind: str = TEXT  # what the streams' `identities` can be compared with
    commits: dict[str, str] = field(default_factory=dict)  # {dataset on the hub: commit}; not a source's to say


@dataclass(frozen=True)
class DataContext:
    """What a data source is told beside its options."""

    tokenizer: Tokenizer
    validation_fraction: float = 0.1  # of all documents, by a hash of their text
    seed: int = 0  # of the choice of text, where a source chooses
    places: Places = field(default_factory=Places)  # where files that the options name are looked for
    split_seed: int = 0  # of the split
    account: Account = field(default_factory=Account)  # what a source leaves out, it adds here
    # Takes a source's documents instead of `build_corpus`, and answers for it: `moelab data` filters them.
    tap: Callable[[Iterable[Document]], Corpus] | None = None

    def find(self, path: str) -> Path:
        """The file or folder that an option names: beside the config file with it, in the current folder, on the hub.

        Raises DataError with the places that were tried.
        """
        return resolve_path(path, self.places, self.account)


def build_corpus(
    documents: Iterable[Document],
    context: DataContext,
    *,
    sources: Mapping[str, Mapping[str, str]] | None = None,
    deduplicate: bool = True,
) -> Corpus:
    """Split by content, drop what repeats, tokenise; the order in which documents are given changes nothing.

    A document is held out iff `identity.split_value` of its text and `context.split_seed` is below
    `context.validation_fraction`, whatever its domain and whatever else is there. `sources`: {domain: {package:
    version}} for the manifest. What is left out is told once a cause. Raises DataError for a NUL, or when too little
    is left.
    """
    if context.tap is not None:
        return context.tap(_as_text(document, context.account) for document in documents)
    try:
        given = [document for document in documents if _has_text(document, context.account)]
        if not given:
            raise DataError(
                "data.source: no document with any text in it; check the paths, and that the files are not empty"
            )
        given.sort(key=lambda document: (document.identity, document.domain, document.name, document.text))
        parts = _keep(given, context, deduplicate)
        domains = sorted({document.domain for part in parts for document in part})
        streams = [_tokenise(part, domains, context) for part in parts]
    finally:
        left_out = context.account.close()
    return Corpus(
        train=streams[0],
        validation=streams[1],
        domains=domains,
        fingerprint=_fingerprint(parts, context.tokenizer),
        manifest=_manifest(given, parts, streams, sources or {}),
        left_out=left_out,
    )


def stream_of(documents: Sequence[Document], tokenizer: Tokenizer) -> tuple[TokenStream, list[str]]:
    """All of these documents in their order, none split off or dropped -> (stream, domains).

    Raises DataError for a NUL, or where none has any text.
    """
    context = DataContext(tokenizer)
    try:
        kept = [document for document in documents if _has_text(document, context.account)]
        if not kept:
            raise DataError("no document with any text in it; check the paths, and that the files are not empty")
        domains = sorted({document.domain for document in kept})
        return _tokenise(kept, domains, context), domains
    finally:
        context.account.close()


def _as_text(document: Document, account: Account) -> Document:
    """The document, told where it holds what no UTF-8 file can. Raises DataError for a binary one."""
    if "\0" in document.text:
        raise DataError(f"data.source: document {document.name} is binary, not text (it has a NUL); leave it out")
    if re.search("[\ud800-\udfff]", document.text):  # UTF-8 has no bytes for them
        account.add("documents with half of a UTF-16 pair, read as '?'", document.name, "write them in UTF-8")
    return document


def _has_text(document: Document, account: Account) -> bool:
    if _as_text(document, account).text.strip():
        return True
    account.add("documents left out, empty", document.name, "nothing is lost")
    return False


def _keep(given: list[Document], context: DataContext, deduplicate: bool) -> list[list[Document]]:
    """-> [training documents, held-out ones by domain], with names that tell them apart."""
    train, held_out = split(given, context.validation_fraction, context.split_seed, context.account)
    kept = sort_out(held_out, train, deduplicate=deduplicate)
    count = len(kept.held_out) + len(kept.train)
    if not kept.held_out or not kept.train:
        what = "train on" if kept.held_out and count > 1 else "hold out"
        raise DataError(
            f"data.source: nothing to {what}: two documents that are no copies of each other are needed ({len(given)} "
            f"given, {count} kept); give more files, or cut a long one into documents (the text source's `separator`)"
        )
    for cause, document in kept.dropped:
        cure = "else held-out text would be trained on" if cause in (LEAK, LEAKED) else _KEEP
        context.account.add(
            f"documents left out of {len(given):,}, {cause}", f"{document.domain}/{document.name}", cure
        )
    _tell_of_single_lines(kept, context.account)
    return _named_apart([kept.train, sorted(kept.held_out, key=lambda document: document.domain)])


def _tell_of_single_lines(kept: Sorted[Document], account: Account) -> None:
    """Near copies are found by their lines: say so where most held-out texts are one, and theirs are sought in vain."""
    found = ((document, list(Lines.of(document.text).longer.values())) for document in kept.held_out)
    single = [document for document, lines in found if len(lines) == 1 and lines[0] >= LONG_LINE]
    if 2 * len(single) > len(kept.held_out):
        account.add(
            f"held-out documents of {len(kept.held_out):,} of one long line, whose near copies are not looked for",
            f"{single[0].domain}/{single[0].name}",
            "`moelab data` finds those that differ in a few words, on both sides of the split",
            len(single),
        )


def _named_apart(parts: list[list[Document]]) -> list[list[Document]]:
    """A name that several documents have gets the document's identity behind it, and a number between equal ones."""
    taken = Counter(document.name for part in parts for document in part)
    seen: Counter[str] = Counter()
    named: list[list[Document]] = []
    for part in parts:
        named.append([])
        for document in part:
            name = document.name
            if taken[name] > 1:
                name = f"{name}~{document.identity:016x}"
                seen[name] += 1
                name += f"~{seen[name]}" if seen[name] > 1 else ""
            named[-1].append(document if name == document.name else replace(document, name=name))
    return named


def _tokenise(documents: list[Document], domains: list[str], context: DataContext) -> TokenStream:
    """Documents -> one stream, in the smallest integer types that hold it."""
    tokenizer = context.tokenizer
    special = spelling(tokenizer.special_tokens)
    token_type = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    end, no_bytes = np.array([tokenizer.eos_token_id], token_type), np.zeros(1, np.uint16)
    tokens, counts, lengths = [], [], [0]
    for document, (ids, byte_counts) in encoded(documents, tokenizer):
        if document.messages is None and (spelled := special.findall(document.text)):
            context.account.add(
                "special tokens spelled in texts, read as text and not as control tokens",
                f"{document.domain}/{document.name}: '{spelled[0]}'",
                "where they were meant to end a document, cut there (the text source's `separator`), or take them out",
                len(spelled),
            )
        # A token of 64 KB is possible: a tokenizer that drops white space leaves it to the next token.
        count_type = np.uint16 if byte_counts.max(initial=0) < 1 << 16 else np.uint32
        tokens += [ids.astype(token_type), end]
        counts += [byte_counts.astype(count_type), no_bytes]
        lengths.append(len(ids) + 1)
    return TokenStream(
        tokens=np.concatenate(tokens),
        document_starts=np.cumsum(lengths, dtype=np.int64),
        document_domain=np.array([domains.index(document.domain) for document in documents], np.int64),
        document_names=[document.name for document in documents],
        token_bytes=np.concatenate(counts),
        identities=np.array([document.identity for document in documents], np.uint64),
    )


def encoded(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, tuple[np.ndarray, np.ndarray]]]:
    """Each document with its ids [n] int32 and the bytes they stand for [n] uint32; megabytes are encoded together."""
    waiting: list[Document] = []
    held, template = 0, None
    for document in documents:
        if document.messages is not None and template is None:
            template = ChatTemplate.from_tokenizer(tokenizer)
        waiting.append(document)
        held += len(document.text)
        if held >= _TOGETHER:
            yield from zip(waiting, _encode(waiting, tokenizer, template), strict=True)
            waiting, held = [], 0
    yield from zip(waiting, _encode(waiting, tokenizer, template), strict=True)


def _encode(
    documents: Sequence[Document], tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    plain = iter(tokenizer.encode_many([document.text for document in documents if document.messages is None]))
    return [
        next(plain) if document.messages is None or template is None else _rendered(document, tokenizer, template)
        for document in documents
    ]


def _rendered(document: Document, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[np.ndarray, np.ndarray]:
    """A conversation's ids, and the bytes of text that each stands for: control tokens stand for none."""
    lengths = tokenizer.id_bytes()
    if lengths is None or document.messages is None:
        raise DataError(
            f"data.source: document {document.name} is a conversation, and data.tokenizer does not say by its ids how "
            "many bytes each stands for; take a byte-level tokenizer (Qwen2's, GPT-2's), or leave messages_key out"
        )
    try:
        ids = template.render(document.messages).ids
    except DataError as error:
        raise DataError(f"data.source: document {document.name}: {error}") from error
    return ids, lengths[ids]


def _fingerprint(parts: list[list[Document]], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        for document in part:
            digest.update(document.digest)
    return digest.hexdigest()


def _manifest(
    given: list[Document],
    parts: list[list[Document]],
    streams: list[TokenStream],
    sources: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """{domain: what it holds}; `bytes` and `tokens` count both parts, `duplicates` what was dropped."""
    manifest: dict[str, Any] = {}
    for domain_id, domain in enumerate(sorted({document.domain for part in parts for document in part})):
        documents, tokens, size = [], [], 0
        for part, stream in zip(parts, streams, strict=True):
            mine = stream.document_domain == domain_id
            documents.append(int(mine.sum()))
            tokens.append(int(np.diff(stream.document_starts)[mine].sum()))
            size += sum(len(d.text.encode("utf-8", "replace")) for d in part if d.domain == domain)
        manifest[domain] = {
            "documents": sum(documents),
            "bytes": size,
            "tokens": sum(tokens),
            "validation_documents": documents[1],
            "validation_tokens": tokens[1],
            "duplicates": sum(document.domain == domain for document in given) - sum(documents),
            "sources": dict(sources.get(domain, {})),
        }
    return manifest
