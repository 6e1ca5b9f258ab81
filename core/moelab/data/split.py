"""Which documents are held out: a function of what a document says and of `data.split_seed`, and of nothing else.

So it is the same whatever files were chosen, in whatever order they are read and whatever they are called: text that
one run holds out, no run with this seed and no larger fraction trains on. Only where too few documents are there to
hold one out does the rule bend, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

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
    value = {document.identity: split_value(document.identity, seed) for document in documents}
    held_out = {identity for identity, at in value.items() if at < fraction}
    by_domain: dict[str, set[int]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, set()).add(document.identity)
    for domain, own in sorted(by_domain.items()):
        if len(own) > 1 and not own & held_out:
            held_out.add(min(own, key=value.__getitem__))
            account.add(
                "domains of which no document falls below data.validation_fraction, so the one with the lowest hash is "
                "held out; with other text beside it, it may be trained on", f"'{domain}' of {len(own)}", _CURE,
            )  # fmt: skip
    if not held_out and len(value) > 1:
        held_out = {min(value, key=value.__getitem__)}
        account.add("no document falls below data.validation_fraction, the lowest is held out", "it", _CURE)
    elif len(held_out) == len(value) > 1:
        held_out.remove(max(value, key=value.__getitem__))
        account.add("all documents fall below data.validation_fraction, the highest is read", "it", _CURE)
    for domain, own in sorted(by_domain.items()):
        if not own & held_out:
            account.add("domains with nothing held out", f"'{domain}' of {len(own)}", _CURE)
        elif own <= held_out:
            account.add("domains that are held out as a whole", f"'{domain}' of {len(own)}", _CURE)
    train = [document for document in documents if document.identity not in held_out]
    return train, [document for document in documents if document.identity in held_out]
