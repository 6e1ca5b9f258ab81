"""Text that was tokenised before: .npy files or raw binary, mapped into memory and never copied."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from omegaconf import MISSING

from moelab import Component, ConfigError, Corpus, DataContext, DataError, TokenStream, component, hookimpl
from moelab.data.account import Account
from moelab.data.identity import token_identities, token_kind
from moelab.safe_files import Reading, check_regular, map_array

CHUNK = 1 << 24  # tokens looked at together
READING = Reading(DataError, "data.source names it: write it with numpy.save, or mend the path")
SAMPLES, SAMPLE_BYTES = 256, 1 << 16  # of a file that is too long to hash whole


@dataclass
class TokensOptions:
    train: str = MISSING  # a .npy file of one dimension, or raw little-endian integers (then `dtype` says which)
    validation: str | None = None  # null: the last data.validation_fraction of the documents in `train`
    dtype: str | None = None  # of raw files: uint16, int32, uint32 or int64
    eos_token_id: int | None = None  # ends a document; null: the tokenizer's
    bytes_per_token: float | None = None  # of text, on average; null: the tokenizer's, where its tokens are bytes
    domain: str = "tokens"

    def __post_init__(self) -> None:
        if self.dtype not in (None, "uint16", "int32", "uint32", "int64"):
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


def tokens(options: TokensOptions, context: DataContext) -> Corpus:
    """Pre-tokenised .npy or raw memmaps, documents separated by the end-of-document id.

    The order of documents is the file's, and the split takes its tail: shuffle when tokenising. Every token is looked
    at once: ids must fit the vocabulary, and a held-out document whose ids stand in the training text too is dropped.
    """
    eos = context.tokenizer.eos_token_id if options.eos_token_id is None else options.eos_token_id
    train = _stream(options.train, options, context, eos)
    if options.validation is None:
        train, validation = _split(train, context.validation_fraction, options.train)
    else:
        validation = _stream(options.validation, options, context, eos)
    validation = _unseen(train, validation, context.account)
    digest = hashlib.sha256(f"{context.tokenizer.fingerprint}/{eos}".encode())
    for stream in (train, validation):
        digest.update(_content_digest(stream.tokens))
    manifest: dict[str, Any] = {
        "documents": len(train.document_names) + len(validation.document_names),
        "bytes": None,  # would take a second look at every token
        "tokens": len(train) + len(validation),
        "validation_documents": len(validation.document_names),
        "validation_tokens": len(validation),
        "sources": {},
    }
    return Corpus(
        train,
        validation,
        [options.domain],
        digest.hexdigest(),
        {options.domain: manifest},
        left_out=context.account.close(),
        identity_kind=token_kind(context.tokenizer.fingerprint, eos),
    )


def _stream(path: str, options: TokensOptions, context: DataContext, eos: int) -> TokenStream:
    file = context.find(path)
    array = _map(file, options.dtype)
    starts = _document_starts(array, eos, context.tokenizer.vocab_size, file)
    count = len(starts) - 1
    return TokenStream(
        array,
        starts,
        np.zeros(count, np.int64),
        Numbered(file.name, 0, count),
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


def _map(file: Path, dtype: str | None) -> np.ndarray:
    """file -> [N] integers on disk."""
    array = map_array(file, READING) if file.suffix == ".npy" else _map_raw(file, dtype)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"data.source: {file} holds {array.dtype} of shape {list(array.shape)}; it must be one row of integers"
        )
    if not len(array):
        raise DataError(f"data.source: {file} has no tokens; give a file that is not empty")
    return array


def _map_raw(file: Path, dtype: str | None) -> np.ndarray:
    if dtype is None:
        raise ConfigError(f"dtype: {file} is raw binary; say what it holds: uint16, int32, uint32 or int64")
    size = check_regular(file, READING)
    if size % np.dtype(dtype).itemsize:
        READING.refuse(file, f"has {size} bytes, no whole number of {dtype}s")
    if not size:
        return np.zeros(0, dtype)  # an empty file can't be mapped
    try:
        return np.memmap(file, np.dtype(dtype).newbyteorder("<"), "r")
    except (OSError, ValueError) as error:
        READING.refuse(file, f"can't be mapped: {error}", error)


def _document_starts(array: np.ndarray, eos: int, vocab_size: int, file: Path) -> np.ndarray:
    """[n + 1] int64: 0, the place after each end-of-document, and the end. Checks every id on the way."""
    ends = []
    for begin in range(0, len(array), CHUNK):
        chunk = np.asarray(array[begin : begin + CHUNK])
        if int(chunk.max()) >= vocab_size or int(chunk.min()) < 0:
            raise DataError(
                f"data.source: {file} holds ids {int(chunk.min())} .. {int(chunk.max())}, but the tokenizer has "
                f"{vocab_size}; set data.tokenizer to the one it was made with, or dtype to how it was written"
            )
        ends.append(begin + np.flatnonzero(chunk == eos).astype(np.int64) + 1)
    return np.unique(np.concatenate([[0], *ends, [len(array)]]).astype(np.int64))


def _split(stream: TokenStream, fraction: float, path: str) -> tuple[TokenStream, TokenStream]:
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
    prefix = Path(path).name
    parts = [
        TokenStream(
            part, own - own[0], np.zeros(len(own) - 1, np.int64), names, id_bytes=stream.id_bytes, identities=identities
        )
        for part, own, names, identities in (
            (stream.tokens[:cut], starts[: first + 1], Numbered(prefix, 0, first), stream.identities[:first]),
            (stream.tokens[cut:], starts[first:], Numbered(prefix, first, count - first), stream.identities[first:]),
        )
    ]
    return parts[0], parts[1]


def _content_digest(array: np.ndarray) -> bytes:
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
