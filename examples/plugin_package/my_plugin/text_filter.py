"""A text filter: leaves out documents that hold a word too often."""

from __future__ import annotations

from dataclasses import dataclass

import moelab


@dataclass
class Options:
    word: str = "deprecated"
    most: int = 3  # times


def my_text_filter(options: Options, context: moelab.FilterContext) -> moelab.TextFilter:
    """A function of one document: the document, a changed one, or why it goes."""

    def apply(document: moelab.Document) -> moelab.Document | moelab.Rejected:
        count = document.text.lower().split().count(options.word)
        if count > options.most:
            return moelab.Rejected(f"holds '{options.word}' too often", f"{count} times, at most {options.most}")
        return document

    return apply


@moelab.hookimpl
def moelab_text_filters() -> list[moelab.Component]:
    return [moelab.component("my_text_filter", Options, my_text_filter)]
