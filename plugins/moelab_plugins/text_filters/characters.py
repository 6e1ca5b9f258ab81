"""What a text is made of: letters, digits, and the rest."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moelab import Component, Document, FilterContext, Rejected, TextFilter, component, hookimpl

_SPACE, _DIGITS = re.compile(r"\s"), re.compile(r"\d")
_LETTERS = re.compile(r"[^\W\d_]")  # of any script


@dataclass
class CharactersOptions:
    min_letters: float = 0.0  # share of the characters that are no white space; of any script
    max_digits: float = 1.0
    max_symbols: float = 1.0  # neither letter nor digit


def characters(options: CharactersOptions, context: FilterContext) -> TextFilter:
    """Shares of the characters that are no white space.

    Source: no published rule; Gopher's asks for 80 % of words with a letter (2112.11446, appendix A1.1).
    Use: tables, dumps and encoded files among prose. Source code and formulas are no prose: give this `domains`.
    Cost: formal text looks like a dump; see what goes before you let it go (report_only).
    """

    def apply(document: Document) -> Document | Rejected:
        total = len(document.text) - len(_SPACE.findall(document.text))
        if total == 0:
            return Rejected("nothing but white space")
        letters = len(_LETTERS.findall(document.text)) / total
        digits = len(_DIGITS.findall(document.text)) / total
        if letters < options.min_letters:
            return Rejected("too few letters", f"{letters:.2f} of the characters, at least {options.min_letters}")
        if digits > options.max_digits:
            return Rejected("too many digits", f"{digits:.2f} of the characters, at most {options.max_digits}")
        if (symbols := 1 - letters - digits) > options.max_symbols:
            return Rejected("too many symbols", f"{symbols:.2f} of the characters, at most {options.max_symbols}")
        return document

    return apply


@hookimpl
def moelab_text_filters() -> list[Component[FilterContext, TextFilter]]:
    return [component("characters", CharactersOptions, characters)]
