"""What the steps of synthesis that ask a generator are told: whom, what, and where the result lies."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from moelab.config.model import Part
from moelab.errors import ConfigError, near

REVISE, CONTRAST = "revise", "contrast"
OPERATIONS = ("constraints", "deepen", "concretise", "reasoning", "breadth")
INSTRUCTION = "{instruction}"


@dataclass
class AskingConfig:
    """What all of them have."""

    generator: Part = field(default_factory=dict)  # who answers: {name: checkpoint, path: RUN}, or a plugin of yours
    data: list[str] = field(default_factory=list)  # files; JSON lines, or of prompts .txt with one a line
    output: str = MISSING  # folder that is made, whole or not at all
    seed: int = 0  # of what is drawn, and of the generator's random numbers
    batch_size: int = 32  # questions asked at once; no reply hangs on it
    plugins: list[str] = field(default_factory=list)  # modules beside the config file, or on the path
    entry_points: bool = True  # False: ignore installed packages' plugins

    def check(self) -> None:
        """Raise ConfigError naming the key."""
        if not self.generator.get("name"):
            raise ConfigError("generator: has no name; say who answers, {name: checkpoint, path: RUN}")
        if not self.data:
            raise ConfigError("data: nothing to read; give data=[FILE]")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: must be at least 1, not {self.batch_size}")


@dataclass
class Principle:
    """What an answer should be like."""

    follow: str = MISSING  # what it should do, as a sentence
    avoid: str = ""  # what it should not do; empty: the opposite of `follow`
    name: str = ""  # by which results call it; empty: principle 1, 2, ... by its place
    critique: str = ""  # how a critique is asked for; empty: made of follow and avoid
    revision: str = ""  # how a revision is asked for; empty: made of follow


@dataclass
class CritiqueConfig(AskingConfig):
    """All of a `moelab critique`."""

    principles: list[Principle] = field(default_factory=list)  # of which one is drawn for each revision, or pair
    # revise: an answer, its critique and its revision; contrast: one answer that follows the principle and one that is
    # told to go against it.
    method: str = REVISE
    revisions: int = 1  # of revise: each of the one before it, by a principle of its own
    critique: bool = True  # of revise: ask for a critique first; false: for the revision at once

    def check(self) -> None:
        """Raise ConfigError naming the key."""
        super().check()
        if not self.principles:
            raise ConfigError("principles: has none; give principles: [{follow: ...}] in a file")
        for number, one in enumerate(self.principles):
            if not one.follow.strip():
                raise ConfigError(f"principles.{number}.follow: is empty; say what an answer should do")
        names = [called(self.principles, number) for number in range(len(self.principles))]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"principles: two are called '{twice}'; give each a name of its own")
        if self.method not in (REVISE, CONTRAST):
            raise ConfigError(f"method: must be {REVISE} or {CONTRAST}, not '{self.method}'")
        if self.revisions < 1:
            raise ConfigError(f"revisions: must be at least 1, not {self.revisions}")


def called(principles: list[Principle], number: int) -> str:
    """The name of one of them."""
    return principles[number].name or f"principle {number + 1}"


@dataclass
class EvolveConfig(AskingConfig):
    """All of a `moelab evolve`."""

    # constraints, deepen, concretise, reasoning: the prompt made harder; breadth: another one of its field. One is
    # drawn for each prompt and round.
    operations: list[str] = field(default_factory=lambda: list(OPERATIONS))
    rounds: int = 1  # each evolves what the one before it made, and tries again what failed there
    check_gain: bool = True  # ask whether the new prompt asks for more than the old one
    answers: bool = True  # answer each new prompt, which also shows whether it can be answered

    def check(self) -> None:
        """Raise ConfigError naming the key."""
        super().check()
        for name in self.operations:
            if name not in OPERATIONS:
                raise ConfigError(f"operations: no '{name}'{near(name, OPERATIONS)} There are {', '.join(OPERATIONS)}")
        if not self.operations or len(set(self.operations)) < len(self.operations):
            raise ConfigError(f"operations: give some of {', '.join(OPERATIONS)}, each once")
        if self.rounds < 1:
            raise ConfigError(f"rounds: must be at least 1, not {self.rounds}")


@dataclass
class TagConfig(AskingConfig):
    """All of a `moelab tag`."""

    least: int = 20  # conversations that a tag must stand at; rarer ones are left out (InsTag's alpha)
    longest: int = 8000  # characters of a conversation's instructions that are shown; others are left out, and told
    request: str = ""  # what is asked, with {instruction} where that stands; empty: InsTag's prompt

    def check(self) -> None:
        """Raise ConfigError naming the key."""
        super().check()
        for key in ("least", "longest"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: must be at least 1, not {getattr(self, key)}")
        if self.request and self.request.count(INSTRUCTION) != 1:
            raise ConfigError(f"request: must hold {INSTRUCTION} once, where the instruction is to stand")
