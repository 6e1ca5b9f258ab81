"""Text of strangers as it may reach a terminal, a log or a message: no character that acts instead of being seen."""

from __future__ import annotations

import re
from collections.abc import Iterable

LONGEST_MESSAGE = 1900  # characters of an error; with the words around it a message stays under 2000
# C0 and C1 controls (escape sequences begin with one), line and paragraph separators, halves of surrogate pairs, and
# the invisible ones that reorder or hide what stands beside them: marks, embeddings, overrides and isolates of
# writing direction (Unicode UAX 9; "Trojan Source", 2111.00169), tags, the byte-order mark. Joiners stay: words of
# several scripts, and emoji, are spelled with them.
_ACTING = (
    "\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f"
)
_FOUND = re.compile(f"[{_ACTING}]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: object, limit: int | None = None, keep: str = "") -> str:
    r"""`text` with control characters spelled out (`\x1b`, `\u202e`), and its middle cut out where it is too long.

    `limit`: characters of the answer at most; `keep`: controls that stay, say "\n" where a text has several lines.
    Beginning and end stay: a message begins with the place and ends with the cure.
    """
    words = str(text)
    if limit is not None:
        words = cut(words, limit)  # first, so that an endless text isn't spelled out; once more for what has grown
    spelled = _FOUND.sub(lambda match: match[0] if match[0] in keep else _spelled(match[0]), words)
    return spelled if limit is None else cut(spelled, limit)


def cut(text: str, limit: int) -> str:
    """At most `limit` characters: the first three quarters and the last of what fits, and how much is left out."""
    if len(text) <= limit:
        return text
    told = f" ... ({len(text)} characters) ... "
    room = max(0, limit - len(told))
    last = room // 4
    return (text[: room - last] + told + text[len(text) - last :])[:limit]


def ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7`: whole numbers, in runs of neighbours."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _spelled(character: str) -> str:
    code = ord(character)
    if character in _SHORT:
        return _SHORT[character]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
