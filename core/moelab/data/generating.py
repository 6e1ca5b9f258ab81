"""What a generator is: it answers questions that synthesis asks. Without torch: a server, or a script, needs none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moelab.paths import Places
from moelab.plugin_faults import PluginPart, article


@dataclass(frozen=True)
class Question:
    """A conversation that the generator is to go on with, and the seed of its random numbers."""

    messages: Sequence[Mapping[str, Any]]  # {role, content}; the last one is the user's
    seed: int  # 63 bits


@dataclass(frozen=True)
class Reply:
    """The assistant's turn."""

    text: str  # without the token that ended it
    ended: bool = True  # by itself, not by a limit on its length


@dataclass(frozen=True)
class GeneratorContext:
    """What a generator is told beside its options."""

    places: Places = field(default_factory=Places)  # where files that the options name are looked for
    where: str = "generator"  # its place in the config, for messages
    registry: Any = None  # the command's moelab.Registry, for what loads a model
    trust: bool = False  # whether plugin modules that a folder of weights names may be imported


class TextGenerator(Protocol):
    """A reply to each question, by its messages and its seed alone: in whatever company, and asked again.

    So that neither batching nor an interruption changes what is made. One that can't promise it (a server whose kernels
    hang on the load) says so in its docstring; then the first run's replies are what there is.
    """

    def __call__(self, questions: Sequence[Question]) -> Sequence[Reply]: ...


def generator_fault(answer: object, count: int) -> str | None:
    """A phrase for `PluginPart.fault`, or None."""
    if isinstance(answer, str | Mapping) or not isinstance(answer, Sequence):
        return f"returned {article(answer)}; it must return a list of {count} moelab.Reply, one for each question"
    if len(answer) != count:
        return f"returned {len(answer)} replies to {count} questions"
    for reply in answer:
        if not isinstance(reply, Reply) or not isinstance(reply.text, str) or not isinstance(reply.ended, bool):
            return f"returned {article(reply)} among its replies; each must be a moelab.Reply of a text and a bool"
    return None


@dataclass(frozen=True)
class Guarded:
    """A generator whose mistakes are told as its own."""

    apply: TextGenerator
    part: PluginPart

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        """Raises ConfigError, naming the plugin and its line, for what a stranger's raises or returns."""
        with self.part.blamed():
            answer = self.apply(questions)
        fault = generator_fault(answer, len(questions))
        if fault is not None:
            raise self.part.fault(fault, self.apply)
        return list(answer)


def identity_of(apply: TextGenerator) -> dict[str, Any]:
    """What a generator knows of itself beside its options, such as the checksum of its weights: JSON.

    Its attribute `identity`, where it has one. Replies of another identity are not gone on from.
    """
    return dict(getattr(apply, "identity", {}))
