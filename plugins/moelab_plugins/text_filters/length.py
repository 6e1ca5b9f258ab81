"""Texts that are too short or too long."""

from __future__ import annotations

from dataclasses import dataclass

from moelab import Component, Document, FilterContext, Rejected, TextFilter, component, hookimpl


@dataclass
class LengthOptions:
    min_characters: int = 0
    max_characters: int | None = None
    min_words: int = 0  # between white space, so of no use for Chinese or Japanese
    max_words: int | None = None


def length(options: LengthOptions, context: FilterContext) -> TextFilter:
    """By characters, by words, or by both.

    Source: Gopher keeps 50 to 100,000 words (2112.11446, appendix A1.1).
    Use: what is left of a page when markup went; files that are tables.
    Cost: a short document may be a whole one: a proof, a poem, a function.
    """

    def apply(document: Document) -> Document | Rejected:
        characters = len(document.text)
        if characters < options.min_characters:
            return Rejected("too few characters", f"{characters:,}, at least {options.min_characters:,}")
        if options.max_characters is not None and characters > options.max_characters:
            return Rejected("too many characters", f"{characters:,}, at most {options.max_characters:,}")
        if options.min_words or options.max_words is not None:
            words = len(document.text.split())
            if words < options.min_words:
                return Rejected("too few words", f"{words:,}, at least {options.min_words:,}")
            if options.max_words is not None and words > options.max_words:
                return Rejected("too many words", f"{words:,}, at most {options.max_words:,}")
        return document

    return apply


@hookimpl
def moelab_text_filters() -> list[Component[FilterContext, TextFilter]]:
    return [component("length", LengthOptions, length)]
