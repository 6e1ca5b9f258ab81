"""What counts as a word where texts are compared by words in a row: near copies, and what is tested on.

Runs of letters and digits, in lower case; of scripts that put no space between words each character is one. Else a
clause of Chinese would be a single word, and five or thirteen of them in a row stand in few documents.
"""

from __future__ import annotations

import re

# Thai and Lao, Myanmar, Khmer, kana, Han (Unicode's blocks of these names, with Han's extensions and compatibility).
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
)
_WORD = re.compile(rf"(?=\w)[{UNSPACED}]|[^\W{UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text in their order; of one that has none, as a drawing in signs, what white space parts."""
    return _WORD.findall(text.lower()) or text.split()
