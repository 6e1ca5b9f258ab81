"""What was left out, cut or taken in another way than one may think, from files to corpus, counted by cause."""

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
        self.commits: dict[str, str] = {}  # {dataset on the Hugging Face hub: commit} that was read

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
        """Tell, forget all, and return {what: {count, example, cure}} for the summary.

        One cause is told with its example and cure; of several the counts in one line, the rest is in the summary.
        """
        found = {what: vars(cause) for what, cause in self.causes.items()}
        if len(found) > 1:
            counts = "; ".join(f"{what}: {cause.count:,}" for what, cause in self.causes.items())
            logger.warning("data: %s (examples and cures: data.left_out in summary.json)", counts)
        for line in self.lines() if len(found) == 1 else ():
            logger.warning("%s", line)
        self.causes = {}
        return found
