"""Text that was tokenised before, in the files that others write, mapped into memory and never copied."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from moelab import Component, ConfigError, Corpus, DataContext, DataError, TokenStream, component, hookimpl
from moelab.data.account import Account
from moelab.data.identity import token_identities, token_kind
from moelab.data.joined import JoinedTokens, Tokens
from moelab.data.reading import distinct_files
from moelab_plugins.data_sources._token_files import DTYPES, map_tokens

CHUNK = 1 << 24  # tokens looked at together
PATTERNS = ("**/*.npy", "**/*.bin", "**/*.ds", "**/*.idx", "**/*.index", "**/*.metadata")  # of a folder
BESIDE = (".idx", ".index", ".metadata")  # which say something of a file beside them
SAMPLES, SAMPLE_BYTES = 256, 1 << 16  # of a file that is too long to hash whole


@dataclass
class TokensOptions:
    train: str | None = None  # a file, see `moelab_plugins.data_sources._token_files` for the kinds
    # {domain: files, globs or folders}, instead of `train`: read end to end, each document of its domain.
    domains: dict[str, list[str]] = field(default_factory=dict)
    validation: str | None = None  # null: the last data.validation_fraction of the documents of each file
    dtype: str | None = None  # of raw files: uint16, int32, uint32 or int64
    eos_token_id: int | None = None  # ends a document where no index says it; null: the tokenizer's
    bytes_per_token: float | None = None  # of text, on average; null: the tokenizer's, where its tokens are bytes
    domain: str = "tokens"  # of `train` and `validation`

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype: must be uint16, int32, uint32 or int64, not '{self.dtype}'")
        if self.bytes_per_token is not None and self.bytes_per_token <= 0:
            raise ValueError(f"bytes_per_token: must be positive, not {self.bytes_per_token}")


class Numbered(Sequence[str]):
    """`prefix#0` .. `prefix#n-1`, spelled when asked for: a billion tokens have millions of documents."""

    def __init__(self, prefix: str, first: int, count: int) -> None:
        self.prefix = prefix
        self.numbers = range(first, first + count)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [f"{self.prefix}#{number}" for number in self.numbers[index]]
        return f"{self.prefix}#{self.numbers[index]}"


class Chained(Sequence[str]):
    """Names of several files' documents, one after the other."""

    def __init__(self, parts: Sequence[Sequence[str]]) -> None:
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        which = int(np.searchsorted(self._ends, place, side="right"))
        part = self._parts[which]
        return part[place - (int(self._ends[which]) - len(part))]


def tokens(options: TokensOptions, context: DataContext) -> Corpus:
    """Token ids as numpy, OLMo, Megatron-LM, datatrove and nanotron write them, mapped into memory and never copied.

    The order of documents is the files', and the split takes each one's tail: shuffle when tokenising. Every token is
    looked at once: ids must fit the vocabulary, and a held-out document whose ids stand in the training text too is
    dropped.
    """
    if (options.train is None) == (not options.domains):
        raise ConfigError("train: give a file as `train`, or `domains: {name: [files]}`, and not both")
    eos = context.tokenizer.eos_token_id if options.eos_token_id is None else options.eos_token_id
    files = list(_files(options, context))
    names = sorted({domain for domain, _, _ in files} | ({options.domain} if options.validation else set()))
    streams = [_stream(file, name, names.index(domain), options, context, eos) for domain, file, name in files]
    if options.validation is None:
        split = [
            _split(stream, context.validation_fraction, file)
            for stream, (_, file, _) in zip(streams, files, strict=True)
        ]
        train, validation = _joined([one for one, _ in split]), _joined([other for _, other in split])
    else:
        train, file = _joined(streams), context.find(options.validation)
        validation = _stream(file, file.name, names.index(options.domain), options, context, eos)
    validation = _unseen(train, validation, context.account)
    digest = hashlib.sha256(f"{context.tokenizer.fingerprint}/{eos}".encode())
    for stream in (train, validation):
        digest.update(_content_digest(stream.tokens))
        if len(names) > 1:
            digest.update("/".join(names).encode() + stream.document_domain.tobytes())
    return Corpus(
        train,
        validation,
        names,
        digest.hexdigest(),
        {name: _manifest(number, train, validation) for number, name in enumerate(names)},
        left_out=context.account.close(),
        identity_kind=token_kind(context.tokenizer.fingerprint, eos),
    )


def _files(options: TokensOptions, context: DataContext) -> Iterator[tuple[str, Path, str]]:
    """(domain, file, its name in documents' names); a file of tokens for each index that lies beside it."""
    if options.train is not None:
        file = context.find(options.train)
        yield options.domain, file, file.name
        return
    paths = [(domain, path) for domain, several in options.domains.items() for path in several]
    for domain, root, file in distinct_files(paths, context.places, PATTERNS, context.account):
        if not file.name.endswith(BESIDE):
            yield domain, file, file.relative_to(root).as_posix()


def _manifest(number: int, train: TokenStream, validation: TokenStream) -> dict[str, Any]:
    mine = [stream.document_domain == number for stream in (train, validation)]
    tokens = [
        int(np.diff(stream.document_starts)[own].sum()) for stream, own in zip((train, validation), mine, strict=True)
    ]
    return {
        "documents": int(mine[0].sum() + mine[1].sum()),
        "bytes": None,  # would take a second look at every token
        "tokens": sum(tokens),
        "validation_documents": int(mine[1].sum()),
        "validation_tokens": tokens[1],
        "sources": {},
    }


def _joined(streams: Sequence[TokenStream]) -> TokenStream:
    """Several files' streams as one."""
    if len(streams) == 1:
        return streams[0]
    begins = np.cumsum([0, *(len(stream) for stream in streams)])
    starts = [stream.document_starts[:-1] + begin for stream, begin in zip(streams, begins[:-1], strict=True)]
    return TokenStream(
        JoinedTokens([np.asarray(stream.tokens) for stream in streams]),
        np.concatenate([*starts, begins[-1:]]),
        np.concatenate([stream.document_domain for stream in streams]),
        Chained([stream.document_names for stream in streams]),
        id_bytes=streams[0].id_bytes,
        identities=np.concatenate([stream.identities for stream in streams if stream.identities is not None]),
    )


def _stream(file: Path, name: str, domain: int, options: TokensOptions, context: DataContext, eos: int) -> TokenStream:
    array, indexed = map_tokens(file, options.dtype)
    if not len(array):
        raise DataError(f"data.source: {file} has no tokens; give a file that is not empty")
    ends = _ends_of_documents(array, eos, context.tokenizer.vocab_size, file)
    starts = np.unique(np.concatenate([[0], ends, [len(array)]]).astype(np.int64)) if indexed is None else indexed
    count = len(starts) - 1
    return TokenStream(
        array,
        starts,
        np.full(count, domain, np.int64),
        Numbered(name, 0, count),
        id_bytes=_id_bytes(options, context, eos),
        identities=token_identities(array, starts, eos),
    )


def _id_bytes(options: TokensOptions, context: DataContext, eos: int) -> np.ndarray | None:
    """[V]: whole numbers from the tokenizer, or the user's average as fractions; the end of a document has none."""
    if options.bytes_per_token is not None:
        id_bytes = np.full(context.tokenizer.vocab_size, options.bytes_per_token, np.float64)
    else:
        known = context.tokenizer.id_bytes()
        if known is None:
            return None
        id_bytes = known.copy()
    id_bytes[eos] = 0
    return id_bytes


def _unseen(train: TokenStream, validation: TokenStream, account: Account) -> TokenStream:
    """The held-out documents that are none of the training ones; copied only where some are dropped."""
    assert train.identities is not None
    assert validation.identities is not None
    seen = np.isin(validation.identities, train.identities)
    if not seen.any():
        return validation
    names, kept = validation.document_names, np.flatnonzero(~seen).tolist()
    account.add(
        f"held-out documents left out of {len(seen):,}, copies of training documents",
        names[int(np.argmax(seen))], "else held-out text would be trained on", int(seen.sum()),
    )  # fmt: skip
    if not kept:
        raise DataError(
            "data.source: every held-out document is a copy of a training document; give other text as "
            "data.source.validation"
        )
    starts = validation.document_starts
    return TokenStream(
        np.concatenate([validation.tokens[starts[place] : starts[place + 1]] for place in kept]),
        np.cumsum([0, *np.diff(starts)[~seen]]),
        validation.document_domain[~seen],
        [names[place] for place in kept],
        id_bytes=validation.id_bytes,
        identities=validation.identities[~seen],
    )


def _ends_of_documents(array: np.ndarray, eos: int, vocab_size: int, file: Path) -> np.ndarray:
    """int64 places after each end-of-document id. Checks every id on the way."""
    ends = []
    for begin in range(0, len(array), CHUNK):
        chunk = np.asarray(array[begin : begin + CHUNK])
        if int(chunk.max()) >= vocab_size or int(chunk.min()) < 0:
            raise DataError(
                f"data.source: {file} holds ids {int(chunk.min())} .. {int(chunk.max())}, but the tokenizer has "
                f"{vocab_size}; set data.tokenizer to the one it was made with, or dtype to how it was written"
            )
        ends.append(begin + np.flatnonzero(chunk == eos).astype(np.int64) + 1)
    return np.concatenate(ends)


def _split(stream: TokenStream, fraction: float, path: Path) -> tuple[TokenStream, TokenStream]:
    """The last `fraction` of the tokens, in whole documents, is held out; views, no copies."""
    assert stream.identities is not None
    starts = stream.document_starts
    count = len(starts) - 1
    if count < 2:
        raise DataError(
            f"data.source: {path} is one document, so nothing can be held out; set data.source.validation, or "
            "data.source.eos_token_id to the id that separates its documents"
        )
    first = int(np.clip(np.searchsorted(starts, (1 - fraction) * len(stream)), 1, count - 1))
    cut = int(starts[first])
    assert isinstance(stream.document_names, Numbered)
    prefix = stream.document_names.prefix
    parts = [
        TokenStream(
            part,
            own - own[0],
            stream.document_domain[: len(own) - 1],
            names,
            id_bytes=stream.id_bytes,
            identities=identities,
        )
        for part, own, names, identities in (
            (stream.tokens[:cut], starts[: first + 1], Numbered(prefix, 0, first), stream.identities[:first]),
            (stream.tokens[cut:], starts[first:], Numbered(prefix, first, count - first), stream.identities[first:]),
        )
    ]
    return parts[0], parts[1]


def _content_digest(array: Tokens) -> bytes:
    """sha256 of length and content as int64; of a long file, of evenly spaced samples."""
    digest = hashlib.sha256(len(array).to_bytes(8, "little"))
    piece = SAMPLE_BYTES // 8
    begins = np.arange(0, len(array), piece)
    if len(begins) > SAMPLES:
        begins = np.linspace(0, len(array) - piece, SAMPLES).astype(np.int64)
    for begin in begins.tolist():
        digest.update(np.asarray(array[begin : begin + piece]).astype("<i8").tobytes())
    return digest.digest()


@hookimpl
def moelab_data_sources() -> list[Component[DataContext, Corpus]]:
    return [component("tokens", TokensOptions, tokens)]
