"""What a data source promised to return, looked at once, before anything is built from it."""

from __future__ import annotations

import numpy as np

from moelab.data.corpus import Corpus, TokenStream
from moelab.data.joined import JoinedTokens
from moelab.plugin_faults import article

LOOKED_AT = 1 << 20  # tokens at either end of a stream, which may lie on disk and be long


def corpus_fault(corpus: object, vocab_size: int) -> str | None:
    """A phrase for `PluginPart.fault`, "returned a list; it must return ...", or None."""
    if not isinstance(corpus, Corpus):
        return f"returned {article(corpus)}; it must return a moelab.Corpus, as moelab.build_corpus makes one"
    if not isinstance(corpus.domains, list) or not all(isinstance(name, str) for name in corpus.domains):
        return f"returned domains {corpus.domains!r}; they must be a list of names"
    if not isinstance(corpus.fingerprint, str) or not corpus.fingerprint:
        return f"returned the fingerprint {corpus.fingerprint!r}; it must be a text that tells this text from any other"
    for name in ("train", "validation"):
        fault = _stream_fault(getattr(corpus, name), len(corpus.domains), vocab_size)
        if fault is not None:
            return f"returned a corpus whose {name} {fault}"
    return None


def _stream_fault(stream: object, domains: int, vocab_size: int) -> str | None:
    if not isinstance(stream, TokenStream):
        return f"is {article(stream)}; it must be a moelab.TokenStream"
    tokens = stream.tokens
    if not isinstance(tokens, np.ndarray | JoinedTokens) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        return "tokens are no one-dimensional array of whole numbers"
    for piece in (tokens[:LOOKED_AT], tokens[-LOOKED_AT:]):
        if len(piece) and not 0 <= int(piece.min()) <= int(piece.max()) < vocab_size:
            return f"tokens hold the ids {piece.min()} .. {piece.max()}, and the tokenizer's are 0 .. {vocab_size - 1}"
    starts = np.asarray(stream.document_starts)
    if starts.dtype.kind not in "iu" or (np.diff(starts) <= 0).any():
        return "document_starts do not rise from document to document"
    domain = np.asarray(stream.document_domain)
    if len(domain) and not 0 <= int(domain.min()) <= int(domain.max()) < domains:
        return f"document_domain holds {domain.min()} .. {domain.max()}, and there are {domains} domains"
    return None
