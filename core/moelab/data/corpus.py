"""Documents -> a tokenised corpus, split by document into training and held-out streams.

N tokens, n documents. A stream is all its documents end to end, each followed by the end-of-document token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moelab.data.deduplicate import novel
from moelab.data.tokenizer import Tokenizer
from moelab.errors import DataError


@dataclass(frozen=True)
class Document:
    """One text. `name` is the same on every machine: no absolute path."""

    text: str
    domain: str
    name: str

    @property
    def digest(self) -> bytes:
        """sha256 of domain and text."""
        return hashlib.sha256(f"{self.domain}\0{self.text}".encode("utf-8", "replace")).digest()


@dataclass(frozen=True)
class TokenStream:
    """Tokens that may lie on disk: `tokens` is any one-dimensional integer array, also a memmap."""

    tokens: np.ndarray  # [N]
    document_starts: np.ndarray  # [n + 1] int64, rising strictly from 0 to N
    document_domain: np.ndarray  # [n] int64, into Corpus.domains
    document_names: Sequence[str]  # n
    token_bytes: np.ndarray | None = None  # [N], UTF-8 bytes each token stands for; 0 for the end of a document
    id_bytes: np.ndarray | None = None  # [V], the same by token id, where it does not depend on the context

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

    def document_of(self, position: np.ndarray) -> np.ndarray:
        """position [...] int64 in 0 .. N-1 -> which document it lies in [...] int64."""
        return np.searchsorted(self.document_starts, position, side="right").astype(np.int64) - 1


@dataclass(frozen=True)
class Corpus:
    """What a data source builds. Equal fingerprints: the same text, split and tokens."""

    train: TokenStream
    validation: TokenStream
    domains: list[str]
    fingerprint: str
    manifest: dict[str, Any] = field(default_factory=dict)  # {domain: documents, bytes, tokens, ..., sources}


@dataclass(frozen=True)
class DataContext:
    """What a data source is told beside its options."""

    tokenizer: Tokenizer
    validation_fraction: float = 0.05  # of each domain's documents
    seed: int = 0  # of the split and the order
    base: Path = Path()  # the config file's folder


def build_corpus(
    documents: Iterable[Document],
    context: DataContext,
    *,
    sources: Mapping[str, Mapping[str, str]] | None = None,
    deduplicate: bool = True,
) -> Corpus:
    """Deduplicate, split by a seeded shuffle within each domain, tokenise.

    `sources`: {domain: {package: version}} for the manifest. Raises DataError for a NUL, or when too little is left.
    """
    given = list(documents)
    for document in given:
        if "\0" in document.text:
            raise DataError(f"data.source: document {document.name} is binary, not text (it has a NUL); leave it out")
    given = [document for document in given if document.text.strip()]
    if not given:
        raise DataError(
            "data.source: no document with any text in it; check the paths, and that the files are not empty"
        )
    kept = list(novel(given)) if deduplicate else given
    train, validation = _split(kept, context)
    if not validation:
        raise DataError(
            f"data.source: nothing to hold out: without duplicates no domain has two documents ({len(given)} given, "
            f"{len(kept)} kept); give more files, or cut a long one into documents (the text source's `separator`)"
        )
    domains = sorted({document.domain for document in kept})
    streams = [_tokenise(part, domains, context.tokenizer) for part in (train, validation)]
    return Corpus(
        train=streams[0],
        validation=streams[1],
        domains=domains,
        fingerprint=_fingerprint(train, validation, context.tokenizer),
        manifest=_manifest(given, [train, validation], streams, sources or {}),
    )


def _split(documents: list[Document], context: DataContext) -> tuple[list[Document], list[Document]]:
    """-> training documents in shuffled order, held-out ones by domain.

    The order is by a keyed hash, so that a document added to a corpus leaves the others nearly where they were.
    """

    def key(document: Document) -> bytes:
        return hashlib.sha256(f"split/{context.seed}/".encode() + document.digest).digest()

    train = sorted(documents, key=key)
    validation: list[Document] = []
    for domain in sorted({document.domain for document in documents}):
        places = [place for place, document in enumerate(train) if document.domain == domain]
        wanted = max(1, round(context.validation_fraction * len(places)))
        chosen = places[: min(wanted, len(places) - 1)]
        validation += [train[place] for place in chosen]
        for place in reversed(chosen):
            del train[place]
    return train, validation


def _tokenise(documents: list[Document], domains: list[str], tokenizer: Tokenizer) -> TokenStream:
    """Documents -> one stream, in the smallest integer types that hold it."""
    token_type = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    end, no_bytes = np.array([tokenizer.eos_token_id], token_type), np.zeros(1, np.uint16)
    tokens, counts, lengths = [], [], [0]
    for document in documents:
        ids, byte_counts = tokenizer.encode_with_bytes(document.text)
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
    )


def _fingerprint(train: list[Document], validation: list[Document], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for part in (train, validation):
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
