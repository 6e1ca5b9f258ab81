"""Control tokens spelled out in a text: they are text, and here is how they are found to be counted."""

from __future__ import annotations

import re
from collections.abc import Sequence


def spelling(special_tokens: Sequence[str]) -> re.Pattern[str]:
    """Finds how these tokens are spelled, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or r"(?!)")
