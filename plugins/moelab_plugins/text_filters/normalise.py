"""One spelling for what is the same text."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace

from moelab import Component, Document, FilterContext, Rejected, TextFilter, component, hookimpl

FORMS = ("NFC", "NFKC", "NFD", "NFKD")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")


@dataclass
class NormaliseOptions:
    form: str | None = "NFC"  # of Unicode, which Qwen2's tokenizer reads: NFC, NFKC, NFD, NFKD; null: as it is
    trailing_space: bool = False  # keep spaces at the end of lines
    controls: bool = False  # keep control characters other than tab and new line, and byte-order marks

    def __post_init__(self) -> None:
        if self.form is not None and self.form not in FORMS:
            raise ValueError(f"form: '{self.form}' is none of {', '.join(FORMS)}; null leaves the text as it is")


def normalise(options: NormaliseOptions, context: FilterContext) -> TextFilter:
    """Line ends become new lines, and unless told otherwise: Unicode NFC, no trailing spaces, no control characters.

    Source: Unicode Standard Annex 15; NFC is what Qwen2's tokenizer.json does before it cuts a text.
    Use: first, so that copies are found whatever they were typed on.
    Cost: it changes texts; how many is counted.
    """

    def apply(document: Document) -> Document | Rejected:
        text = document.text.replace("\r\n", "\n").replace("\r", "\n")
        if not options.controls:
            text = _CONTROLS.sub("", text)
        if options.form is not None:
            text = unicodedata.normalize(options.form, text)  # type: ignore[arg-type]  # one of FORMS
        if not options.trailing_space:
            text = "\n".join(line.rstrip() for line in text.split("\n"))  # not a pattern: those try each blank anew
        return document if text == document.text else replace(document, text=text)

    return apply


@hookimpl
def moelab_text_filters() -> list[Component[FilterContext, TextFilter]]:
    return [component("normalise", NormaliseOptions, normalise)]
