"""In which language or script a text is written, by rules."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from moelab import Component, Document, FilterContext, Tagger, component, hookimpl

# Words that are frequent in one of these languages and rare in the others, by the author's knowledge of them.
FREQUENT = {
    "en": "the of and to is that it for with as was this are be from not by have which",
    "de": "der die und das ist nicht mit von ein eine auf dem sich auch für werden wird bei zu",
    "fr": "le la les des et en du est une dans que pour qui pas sur avec sont plus par cette ce aux",
    "es": "el los las una que del de en por con para como más está son pero sus este también se y",
    "pt": "o os as uma não do da dos das em com para mais são também pela pelo ao seu você",
    "it": "il lo gli di che è un una per non sono con del della nel anche come più alla",
    "nl": "de het een en van is dat niet op te met voor zijn aan ook maar wordt door naar",
}
# (first, last code point) of scripts (Unicode 15.1, Blocks.txt).
SCRIPTS = (
    ("ja", 0x3040, 0x30FF), ("ko", 0xAC00, 0xD7AF), ("zh", 0x4E00, 0x9FFF), ("zh", 0x3400, 0x4DBF),
    ("cyrillic", 0x0400, 0x052F), ("greek", 0x0370, 0x03FF), ("arabic", 0x0600, 0x06FF), ("hebrew", 0x0590, 0x05FF),
    ("devanagari", 0x0900, 0x097F), ("thai", 0x0E00, 0x0E7F),
)  # fmt: skip
KANA = 0.05  # share of the letters of a Japanese text that are kana, at least
_WORD = re.compile(r"[^\W\d_]+")
_BY_WORD = {word: [name for name in FREQUENT if word in FREQUENT[name].split()] for name in FREQUENT
            for word in FREQUENT[name].split()}  # fmt: skip


@dataclass
class LanguageOptions:
    characters: int = 20_000  # of a document's beginning, that are looked at
    words: float = 0.08  # share of the words that must be a language's frequent ones
    letters: int = 40  # a text with fewer is not told


def language(options: LanguageOptions, context: FilterContext) -> Tagger:
    """en, de, fr, es, pt, it or nl by frequent words; zh, ja, ko, cyrillic, ... by script; latin where no words decide.

    "" for texts with few letters. Of a text in two scripts the one with more letters counts.

    Source: none; a rule of thumb that needs no package. For hundreds of languages take a model, by a tagger of one's
    own.
    Use: which language an expert serves; shares of languages by `domain_by`.
    Cost: source code with English comments is en, or latin; related languages that are not listed pass for listed ones.
    """

    def apply(document: Document) -> str:
        text = document.text[: options.characters]
        found: Counter[str] = Counter()
        for character in text:
            if character.isalpha():
                code = ord(character)
                own = (name for name, first, last in SCRIPTS if first <= code <= last)
                found["latin" if code < 0x250 else next(own, "other")] += 1
        total = found.total()
        if total < options.letters:
            return ""
        if found["ja"] >= KANA * total and found["ja"] + found["zh"] > total / 2:
            return "ja"
        script = max(sorted(found), key=found.__getitem__)
        return script if script != "latin" else _by_words(text, options.words)

    return apply


def _by_words(text: str, least: float) -> str:
    words = _WORD.findall(text.lower())
    found: Counter[str] = Counter(name for word in words for name in _BY_WORD.get(word, ()))
    if not found:
        return "latin"
    best = max(sorted(found), key=found.__getitem__)
    return best if found[best] >= least * len(words) else "latin"


@hookimpl
def moelab_taggers() -> list[Component[FilterContext, Tagger]]:
    return [component("language", LanguageOptions, language)]
