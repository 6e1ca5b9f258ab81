"""Constitutional feedback: answers held against written principles, as demonstrations and preferences.

Two methods. `revise` is the supervised stage of constitutional AI (Bai et al. 2212.08073 section 3.1): an answer, a
critique of it, a revision, by a principle that is drawn anew for each revision; section 3.5 leaves the critique out.
`contrast` is Qwen2's (2407.10671 section 4.1.2, "Constitutional Feedback"): the model is told to answer in line with a
principle, and to go against it. Both passages were read; the report gives no prompts, so these are ours.

Departures: requests stand in turns of the user, for models that were trained on conversations, where the paper writes
`Critique Request:` into one text; no few-shot examples (appendix E) precede them; that a revision is better than what
it revises is taken on trust, where the paper's second stage asks a model which of two is better (section 4.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moelab.data.generating import Question, Reply
from moelab.seeds import derive_seed
from moelab_tools.synthesis.asking import Asker
from moelab_tools.synthesis.conversations import Asked, with_source
from moelab_tools.synthesis.declaration import CONTRAST, CritiqueConfig, Principle, called

STEP = "constitution"
Row = dict[str, Any]


@dataclass
class Account:
    """What became of the prompts."""

    prompts: int = 0
    repeated: int = 0  # prompts that came again
    cut: int = 0  # prompts of which a reply was cut off or empty, so that nothing was made of it
    unchanged: int = 0  # revisions that say what was there before, or pairs that say the same twice
    sft: int = 0  # lines
    pairs: int = 0

    def told(self) -> str:
        """In a line or two."""
        return (
            f"{self.prompts} prompts, {self.repeated} more came again; {self.cut} with a reply that was empty or cut "
            f"off, {self.unchanged} replies unchanged\n{self.sft} lines to learn from, {self.pairs} pairs"
        )


@dataclass
class Made:
    """Lines of JSON for `moelab align`, stage sft and stage dpo or reward."""

    sft: list[Row] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)
    account: Account = field(default_factory=Account)


@dataclass
class _Case:
    """A prompt on its way."""

    asked: Asked
    said: list[str] = field(default_factory=list)  # the answer and its revisions, or what follows and what goes against
    critiques: list[str] = field(default_factory=list)
    principles: list[int] = field(default_factory=list)
    whole: bool = True  # no reply was empty or cut off

    def take(self, reply: Reply, into: list[str]) -> None:
        text = reply.text.strip()
        self.whole = self.whole and reply.ended and bool(text)
        into.append(text)


def make(config: CritiqueConfig, prompts: Sequence[Asked], ask: Asker) -> Made:
    """All prompts, each request of all of them at once. What `ask` raises."""
    cases = [_Case(one) for one in prompts]
    return _contrasted(config, cases, ask) if config.method == CONTRAST else _revised(config, cases, ask)


def _revised(config: CritiqueConfig, cases: list[_Case], ask: Asker) -> Made:
    _step(config, cases, ask, "answer", lambda case: list(case.asked.messages))
    for number in range(config.revisions):
        for case in cases:
            case.principles.append(_drawn(config, case, number))
        if config.critique:
            _step(config, cases, ask, f"critique {number}", lambda case: _to_critique(config, case), critique=True)
        _step(config, cases, ask, f"revision {number}", lambda case: _to_revise(config, case))
    made = Made()
    for case in cases:
        if not _counted(made, case):
            continue
        first, last = case.said[0], case.said[-1]
        made.account.unchanged += sum(a == b for a, b in zip(case.said, case.said[1:], strict=False))
        for place in range(1, len(case.said)):
            made.sft.append(_row(config, case, ask, {"completion": case.said[place]}, place))
        if first != last:
            made.pairs.append(_row(config, case, ask, {"chosen": last, "rejected": first}, len(case.said) - 1))
    return _closed(made)


def _contrasted(config: CritiqueConfig, cases: list[_Case], ask: Asker) -> Made:
    for case in cases:
        case.principles.append(_drawn(config, case, 0))
    _step(config, cases, ask, "follow", lambda case: _told(case, _FOLLOW.format(**_words(config, case))))
    _step(config, cases, ask, "avoid", lambda case: _told(case, _AVOID.format(**_words(config, case))))
    made = Made()
    for case in cases:
        if not _counted(made, case):
            continue
        good, bad = case.said
        made.sft.append(_row(config, case, ask, {"completion": good}, 1))
        if good == bad:
            made.account.unchanged += 1
        else:
            made.pairs.append(_row(config, case, ask, {"chosen": good, "rejected": bad}, 1))
    return _closed(made)


def _step(
    config: CritiqueConfig, cases: list[_Case], ask: Asker, purpose: str, messages: Any, *, critique: bool = False
) -> None:
    """One request of each case that is whole so far."""
    live = [case for case in cases if case.whole]
    questions = [Question(messages(case), derive_seed(config.seed, STEP, case.asked.key, purpose)) for case in live]
    for case, reply in zip(live, ask(questions, purpose), strict=True):
        case.take(reply, case.critiques if critique else case.said)


def _drawn(config: CritiqueConfig, case: _Case, number: int) -> int:
    """Which principle, by the prompt and the revision alone."""
    return derive_seed(config.seed, "principle", case.asked.key, number) % len(config.principles)


_CRITIQUE = "Name the specific ways in which your last answer does not keep to this principle: {follow}{avoiding}"
_REVISE = (
    "Write your last answer anew so that it keeps to this principle: {follow}{avoiding} Give the new answer alone."
)
_FOLLOW = "Keep to this principle in your answer: {follow}{avoiding}"
_AVOID = (
    "Show what an answer looks like that breaks a principle; it will serve as a bad example. The principle: "
    "{follow}{against} Give that answer alone."
)


def _words(config: CritiqueConfig, case: _Case) -> dict[str, str]:
    one = _principle(config, case)
    avoid = one.avoid.strip()
    return {
        "follow": one.follow.strip(),
        "avoiding": f" What to avoid: {avoid}" if avoid else "",
        "against": f" So the answer should do this: {avoid}" if avoid else "",
    }


def _principle(config: CritiqueConfig, case: _Case) -> Principle:
    return config.principles[case.principles[-1]]


def _to_critique(config: CritiqueConfig, case: _Case) -> list[Any]:
    request = _principle(config, case).critique or _CRITIQUE.format(**_words(config, case))
    return [*case.asked.messages, _turn("assistant", case.said[-1]), _turn("user", request)]


def _to_revise(config: CritiqueConfig, case: _Case) -> list[Any]:
    request = _principle(config, case).revision or _REVISE.format(**_words(config, case))
    if not config.critique:
        return [*case.asked.messages, _turn("assistant", case.said[-1]), _turn("user", request)]
    return [*_to_critique(config, case), _turn("assistant", case.critiques[-1]), _turn("user", request)]


def _told(case: _Case, rule: str) -> list[Any]:
    """The prompt under a system turn with `rule`, behind what its own system turn says."""
    messages = list(case.asked.messages)
    if messages[0]["role"] != "system":
        return [_turn("system", rule), *messages]
    return [_turn("system", f"{messages[0]['content']}\n\n{rule}"), *messages[1:]]


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _counted(made: Made, case: _Case) -> bool:
    made.account.prompts += 1
    made.account.cut += not case.whole
    return case.whole


def _row(config: CritiqueConfig, case: _Case, ask: Asker, answers: Mapping[str, str], revisions: int) -> Row:
    """Turns, since a conversation was asked; and where from. `revisions`: how many led there."""
    source: Row = {"step": STEP, "method": config.method, "from": case.asked.where}
    source["principles"] = [called(config.principles, number) for number in case.principles[:revisions]]
    if case.critiques:
        source["critiques"] = case.critiques[:revisions]
    source |= {"generator": ask.said, "seed": config.seed}
    said = {key: [_turn("assistant", text)] for key, text in answers.items()}
    return {"prompt": case.asked.messages, **said, "source": with_source(case.asked.beside, source)}


def _closed(made: Made) -> Made:
    made.account.sft, made.account.pairs = len(made.sft), len(made.pairs)
    return made


def told(config: CritiqueConfig, ask: Asker, made: Made) -> Row:
    """For the account file: what was asked, of whom, and what came of it."""
    keys = ("method", "revisions", "critique", "seed")
    principles = [{**asdict(one), "name": called(config.principles, n)} for n, one in enumerate(config.principles)]
    how = {key: getattr(config, key) for key in keys}
    return {"step": STEP, **how, "principles": principles, "generator": ask.said, **asdict(made.account)}
