"""What became of every document: read, kept, changed, left out and why, by stage and domain, with examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moelab.data.tagging import RESERVED
from moelab.printable import printable

EXAMPLES, LONGEST = 3, 160  # kept of each reason; characters of a text
EXACT, NEAR = "deduplicate: exact", "deduplicate: near"
SELECT = "select"
SPLIT = "split"
SAME_TEXT, SAME_SHINGLES, LEAKS = "copies", "near copies", "near copies of held-out text"
NOT_CHOSEN, NO_TAGS = "others were taken", "without a tag that counts"

Key = tuple[str, str, str]  # stage, reason, domain


@dataclass
class Account:
    """Adds up: of every domain `documents` read are those kept and those rejected."""

    documents: Counter[str] = field(default_factory=Counter)  # {domain: read}
    characters: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    kept_characters: Counter[str] = field(default_factory=Counter)
    changed: Counter[tuple[str, str]] = field(default_factory=Counter)  # {(stage, domain): texts it changed}
    rejected: Counter[Key] = field(default_factory=Counter)
    tagged: Counter[Key] = field(default_factory=Counter)  # {(tag, its value, domain): kept documents}
    tagged_characters: Counter[Key] = field(default_factory=Counter)
    # Of a report alone, where a document that one stage drops is shown to the others too.
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)  # {(stage, domain): documents it was asked of}
    dropped_by: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)  # {(domain, all that drop it): n}
    examples: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # {(stage, reason): "name: how, text"}

    def reject(self, stage: str, reason: str, domain: str, name: str, measured: str, text: str) -> None:
        """One document more that is left out."""
        self.rejected[stage, reason, domain] += 1
        shown = self.examples.setdefault((stage, reason), [])
        if len(shown) < EXAMPLES:
            how = f" ({measured})" if measured else ""
            shown.append(printable(f"{domain}/{name}{how}: {' '.join(text.split())}", LONGEST))

    def tag(self, domain: str, tags: Mapping[str, str], characters: int, count: int = 1) -> None:
        """A kept document's tags; with a `count` of -1 they are taken back."""
        for tag, value in tags.items():
            self.tagged[tag, value, domain] += count
            self.tagged_characters[tag, value, domain] += count * characters

    def take_back(self, stage: str, reason: str, row: Mapping[str, Any]) -> None:
        """A document, as it stands in a row, that was kept until all were in."""
        domain, name, text = row["domain"], row["name"], row["text"]
        self.tag(domain, {key: value for key, value in row.items() if key not in RESERVED}, len(text), -1)
        self.kept[domain] -= 1
        self.kept_characters[domain] -= len(text)
        self.reject(stage, reason, domain, name, "", text)

    def add(self, other: Account) -> None:
        """Of two pieces, in the order in which they were read."""
        for name in (
            "documents", "characters", "kept", "kept_characters", "changed", "rejected", "tagged", "tagged_characters",
            "asked", "dropped_by",
        ):  # fmt: skip
            getattr(self, name).update(getattr(other, name))
        for key, shown in other.examples.items():
            self.examples[key] = (self.examples.get(key, []) + shown)[:EXAMPLES]

    def copies(self, domain: str) -> int:
        """Documents of a domain that left as copies of others."""
        return sum(
            count
            for (stage, _, name), count in self.rejected.items()
            if stage in (EXACT, NEAR, SPLIT) and name == domain
        )

    @property
    def domains(self) -> list[str]:
        return sorted(self.documents)

    def of_stage(self, stages: Iterable[str]) -> list[tuple[str, str, dict[str, int]]]:
        """(stage, reason, {domain: documents}) in the order of the stages, the commonest reason first."""
        rows: list[tuple[str, str, dict[str, int]]] = []
        for stage in stages:
            reasons: dict[str, dict[str, int]] = {}
            for (one, reason, domain), count in self.rejected.items():
                if one == stage:
                    reasons.setdefault(reason, {})[domain] = count
            rows += [
                (stage, reason, counts)
                for reason, counts in sorted(reasons.items(), key=lambda item: (-sum(item[1].values()), item[0]))
            ]
        return rows

    def to_json(self) -> dict[str, Any]:
        return {
            "documents": dict(self.documents),
            "characters": dict(self.characters),
            "kept": dict(self.kept),
            "kept_characters": dict(self.kept_characters),
            "changed": [[*key, count] for key, count in self.changed.items()],
            "rejected": [[*key, count] for key, count in self.rejected.items()],
            "tagged": [[*key, count, self.tagged_characters[key]] for key, count in self.tagged.items()],
            "asked": [[*key, count] for key, count in self.asked.items()],
            "dropped_by": [[domain, list(stages), count] for (domain, stages), count in self.dropped_by.items()],
            "examples": [[*key, shown] for key, shown in self.examples.items()],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Account:
        """What `to_json` wrote."""
        return cls(
            documents=Counter(found["documents"]),
            characters=Counter(found["characters"]),
            kept=Counter(found["kept"]),
            kept_characters=Counter(found["kept_characters"]),
            changed=Counter({(stage, domain): count for stage, domain, count in found["changed"]}),
            rejected=Counter({(stage, reason, domain): count for stage, reason, domain, count in found["rejected"]}),
            tagged=Counter({(tag, value, domain): count for tag, value, domain, count, _ in found["tagged"]}),
            tagged_characters=Counter({(tag, value, domain): size for tag, value, domain, _, size in found["tagged"]}),
            asked=Counter({(stage, domain): count for stage, domain, count in found["asked"]}),
            dropped_by=Counter({(domain, tuple(stages)): count for domain, stages, count in found["dropped_by"]}),
            examples={(stage, reason): list(shown) for stage, reason, shown in found["examples"]},
        )
