"""A tagger: says whether a document holds a question."""

from __future__ import annotations

from dataclasses import dataclass

import moelab


@dataclass
class Options:
    mark: str = "?"


def my_tagger(options: Options, context: moelab.FilterContext) -> moelab.Tagger:
    """A function of one document: one of a few words."""

    def apply(document: moelab.Document) -> str:
        return "question" if options.mark in document.text else "none"

    return apply


@moelab.hookimpl
def moelab_taggers() -> list[moelab.Component]:
    return [moelab.component("my_tagger", Options, my_tagger)]
