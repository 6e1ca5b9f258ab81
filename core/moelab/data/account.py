"""What was left out, cut or taken in another way than one may think, from files to corpus: one line a cause."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("moelab")


@dataclass
class Cause:
    """How often it happened, to whom first, and what to do about it."""

    count: int
    example: str
    cure: str


class Account:
    """Counts by cause. A data source adds to `context.account`; `build_corpus` tells and closes it."""

    def __init__(self) -> None:
        self.causes: dict[str, Cause] = {}

    def add(self, what: str, example: str, cure: str, count: int = 1) -> None:
        """`what` says what happened, as in "documents left out, empty"; the first example and cure are kept."""
        self.causes.setdefault(what, Cause(0, example, cure)).count += count

    def lines(self) -> list[str]:
        """One sentence for each cause, in the order in which they were met."""
        return [
            f"data: {what}: {cause.count:,} (first {cause.example}); {cause.cure}"
            for what, cause in self.causes.items()
        ]

    def close(self) -> dict[str, dict[str, Any]]:
        """Log every line, forget all, and return {what: {count, example, cure}} for the summary."""
        for line in self.lines():
            logger.warning("%s", line)
        found = {what: vars(cause) for what, cause in self.causes.items()}
        self.causes = {}
        return found
