"""Which documents are held out: a function of what a document says and of `data.split_seed`, and of nothing else.

So it is the same whatever files were chosen, in whatever order they are read and whatever they are called: text that
one run holds out, no run with this seed and no larger fraction trains on. Only where too few documents are there to
hold one out does the rule bend, and says so.

n documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from moelab.data.account import Account
from moelab.data.identity import split_value

_CURE = "give more documents, or another data.validation_fraction"


class HasIdentity(Protocol):
    @property
    def identity(self) -> int: ...
    @property
    def domain(self) -> str: ...


DocumentT = TypeVar("DocumentT", bound=HasIdentity)


def split(
    documents: Sequence[DocumentT], fraction: float, seed: int, account: Account
) -> tuple[list[DocumentT], list[DocumentT]]:
    """-> (training, held-out) documents, each in the order given; `seed` is data.split_seed."""
    domains = sorted({document.domain for document in documents})
    number = {domain: at for at, domain in enumerate(domains)}
    identities = np.array([document.identity for document in documents], np.uint64)
    domain = np.array([number[document.domain] for document in documents], np.int64)
    out = held_out(identities, domain, domains, fraction, seed, account)
    train = [document for document, is_out in zip(documents, out, strict=True) if not is_out]
    return train, [document for document, is_out in zip(documents, out, strict=True) if is_out]


def held_out(
    identities: np.ndarray, domain: np.ndarray, domains: Sequence[str], fraction: float, seed: int, account: Account
) -> np.ndarray:
    """identities [n] uint64, domain [n] int64 into `domains`, which are sorted -> [n] bool: which are held out."""
    distinct, which = np.unique(identities, return_inverse=True)
    value = np.array([split_value(int(identity), seed) for identity in distinct])
    out = value < fraction
    members = [np.unique(which[domain == number]) for number in range(len(domains))]
    for name, own in zip(domains, members, strict=True):
        if len(own) > 1 and not out[own].any():
            out[own[np.argmin(value[own])]] = True
            account.add(
                "domains of which no document falls below data.validation_fraction, so the one with the lowest hash is "
                "held out; with other text beside it, it may be trained on", f"'{name}' of {len(own)}", _CURE,
            )  # fmt: skip
    if len(value) > 1 and not out.any():
        out[np.argmin(value)] = True
        account.add("no document falls below data.validation_fraction, the lowest is held out", "it", _CURE)
    elif len(value) > 1 and out.all():
        out[np.argmax(value)] = False
        account.add("all documents fall below data.validation_fraction, the highest is read", "it", _CURE)
    for name, own in zip(domains, members, strict=True):
        if not out[own].any():
            account.add("domains with nothing held out", f"'{name}' of {len(own)}", _CURE)
        elif out[own].all():
            account.add("domains that are held out as a whole", f"'{name}' of {len(own)}", _CURE)
    return np.asarray(out[which])
