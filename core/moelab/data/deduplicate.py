"""Finds documents that say again what another one said, so that held-out text is not training text.

Equal texts (but for case and white space) are copies. A document is a near copy when over half of its longer lines'
characters stand in documents before it: licences differ in a name and a year, generated headers in a type. Lines that
many documents share are a template, not a sign of copying (the prompt above every row of Alpaca): they are left out of
that share, and a document is a near copy still when less than a quarter of it stands nowhere else (one licence with
many holders). Ten and more versions of one page that differ in over a quarter pass for a template's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

LINE_CHARACTERS = 24  # a shorter line ("return result", "#endif") is no sign of copying
REPEATED_SHARE = 0.5  # of the longer lines' characters, template lines left out
TEMPLATE_DOCUMENTS = 10  # a line in this many different documents is a template's
OWN_SHARE = 0.25  # of all characters: a document with less that is its own repeats its template and little more


class HasText(Protocol):
    @property
    def text(self) -> str: ...
    @property
    def identity(self) -> int: ...


DocumentT = TypeVar("DocumentT", bound=HasText)


@dataclass
class Lines:
    """The distinct lines of a text, normalised: {hash: characters}. Hashes are salted by the process."""

    longer: dict[int, int] = field(default_factory=dict)
    shorter: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> Lines:
        lines = cls()
        for line in text.splitlines():
            normal = " ".join(line.lower().split())
            if normal:
                kind = lines.longer if len(normal) >= LINE_CHARACTERS else lines.shorter
                kind[hash(normal)] = len(normal)
        return lines

    @property
    def every(self) -> dict[int, int]:
        return self.longer | self.shorter


def template_lines(texts: Iterable[str], among: Collection[int] | None = None) -> set[int]:
    """Longer lines that TEMPLATE_DOCUMENTS of these different texts share; `among`: only these are looked for."""
    counts: Counter[int] = Counter()
    for text in texts:
        longer = Lines.of(text).longer
        counts.update(longer if among is None else [line for line in longer if line in among])
    return {line for line, count in counts.items() if count >= TEMPLATE_DOCUMENTS}


class Seen:
    """The texts met so far."""

    def __init__(self) -> None:
        self.identities: set[int] = set()
        self.lines: set[int] = set()

    def add(self, identity: int, lines: Lines) -> None:
        self.identities.add(identity)
        self.lines.update(lines.longer, lines.shorter)

    def is_near_copy(self, lines: Lines, template: Collection[int]) -> bool:
        """Whether a text of these lines repeats what was met."""
        if not lines.longer:
            return False
        judged = {line: size for line, size in lines.longer.items() if line not in template}
        repeated = sum(size for line, size in judged.items() if line in self.lines)
        if repeated > REPEATED_SHARE * sum(judged.values()):
            return True
        own = sum(size for line, size in lines.every.items() if line not in self.lines)
        return own < OWN_SHARE * sum(lines.every.values())


# Why a document is dropped. The last two are about both sides of the split.
COPY, NEAR_COPY = "copies", "near copies"
LEAK, LEAKED = "copies or near copies of held-out ones", "held out but standing in training text for the larger part"


@dataclass
class Sorted(Generic[DocumentT]):
    """The documents that are kept, in order, and those that are not, by cause."""

    held_out: list[DocumentT] = field(default_factory=list)
    train: list[DocumentT] = field(default_factory=list)
    dropped: list[tuple[str, DocumentT]] = field(default_factory=list)


def sort_out(
    held_out: Sequence[DocumentT], train: Sequence[DocumentT], *, deduplicate: bool = True
) -> Sorted[DocumentT]:
    """Drop what stands on both sides of the split, and with `deduplicate` what repeats within a side.

    A training document that repeats held-out text is dropped, always; so is a held-out one that longer training
    documents contain. Of copies on one side the first stays.
    """
    met, held = Seen(), Seen()
    found: Sorted[DocumentT] = Sorted()
    distinct = {document.identity: document.text for document in (*held_out, *train)}
    among = None if deduplicate else {line for document in held_out for line in Lines.of(document.text).longer}
    template = template_lines(distinct.values(), among)

    def cause(document: DocumentT, lines: Lines) -> str | None:
        if not deduplicate:
            return None
        if document.identity in met.identities:
            return COPY
        return NEAR_COPY if met.is_near_copy(lines, template) else None

    for document in held_out:
        lines = Lines.of(document.text)
        if why := cause(document, lines):
            found.dropped.append((why, document))
            continue
        found.held_out.append(document)
        met.add(document.identity, lines)
        held.add(document.identity, lines)
    for document in train:
        lines = Lines.of(document.text)
        leaks = document.identity in held.identities or held.is_near_copy(lines, template)
        if why := LEAK if leaks else cause(document, lines):
            found.dropped.append((why, document))
            continue
        found.train.append(document)
        if deduplicate:
            met.add(document.identity, lines)
    _drop_contained(found, template)
    return found


def _drop_contained(found: Sorted[DocumentT], template: Collection[int]) -> None:
    """Held-out documents that are parts of longer training documents: those repeat too little to be dropped."""
    wanted = {line for document in found.held_out for line in Lines.of(document.text).every}
    trained = Seen()
    for document in found.train:
        trained.lines.update(line for line in Lines.of(document.text).every if line in wanted)
    kept = []
    for document in found.held_out:
        if trained.is_near_copy(Lines.of(document.text), template):
            found.dropped.append((LEAKED, document))
        else:
            kept.append(document)
    found.held_out = kept
