"""How long a text is, in classes."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise

from moelab import Component, FilterContext, Tagger, component, hookimpl


@dataclass
class SizeOptions:
    borders: list[int] = field(default_factory=lambda: [1000, 4000, 16_000, 64_000])  # characters, rising

    def __post_init__(self) -> None:
        if not self.borders or any(after <= before for before, after in pairwise([0, *self.borders])):
            raise ValueError(f"borders: {self.borders} don't rise from above 0")


def size(options: SizeOptions, context: FilterContext) -> Tagger:
    """The class that a text's number of characters falls into, as "1000-3999".

    Source: none. Use: whether long documents are learnt otherwise; a mixture with more of them.
    Cost: none.
    """
    borders = options.borders
    names = [f"0-{borders[0] - 1}", *(f"{a}-{b - 1}" for a, b in pairwise(borders)), f"{borders[-1]}+"]
    return lambda document: names[bisect_right(borders, len(document.text))]


@hookimpl
def moelab_taggers() -> list[Component[FilterContext, Tagger]]:
    return [component("size", SizeOptions, size)]
