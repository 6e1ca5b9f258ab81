"""Rejection sampling and execution feedback: of many answers the right ones to learn from, and right against wrong.

Qwen2's report makes data for mathematics so, and for code by running it (2407.10671 section 4.1, as the references tell
it). What is right a reward says: `exact_answer`, `doctest`, or any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moelab.alignment.judge import Judge
from moelab.data.rewards import Attempt
from moelab_tools.synthesis.answers import Asked
from moelab_tools.synthesis.folder import ACCOUNT, account, lines


@dataclass(frozen=True)
class Rule:
    """What is kept."""

    right: float = 1.0  # an answer worth at least so much is right ...
    wrong: float | None = None  # ... and one worth at most so much is wrong; None: whatever is not right
    answers: int = 1  # right ones of a prompt, at most, that are learned
    pairs: int = 1  # of a prompt, at most


@dataclass
class Account:
    """What became of the answers."""

    prompts: int = 0
    answers: int = 0
    distinct: int = 0
    right: int = 0  # of the distinct ones
    unsolved: int = 0  # prompts without a right answer
    all_right: int = 0  # prompts without a wrong one, which give no pair
    cut: int = 0  # answers that max_new_tokens ended: never right
    sft: int = 0  # lines
    pairs: int = 0

    def told(self) -> str:
        """In a line or two."""
        return (
            f"{self.answers} answers to {self.prompts} prompts, {self.distinct} distinct, {self.right} right, "
            f"{self.cut} cut off; {self.unsolved} prompts without a right answer, {self.all_right} "
            "without a wrong one\n"
            f"{self.sft} lines to learn from, {self.pairs} pairs"
        )


@dataclass
class Made:
    """Lines of JSON for `moelab align`, stage sft and stage dpo or reward."""

    sft: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    account: Account = field(default_factory=Account)


@dataclass(frozen=True)
class _Judged:
    attempt: Attempt
    checkpoint: str
    worth: float


def sort_out(asked: Sequence[Asked], judge: Judge, rule: Rule, source: Mapping[str, Any]) -> Made:
    """Right answers and pairs of each prompt. `source`: of every line, beside where its answers stood.

    Raises what the judge raises. The shortest right answer is learned first, and set against the wrong ones in their
    order; equal answers count once.
    """
    made = Made()
    for one in asked:
        worth, _ = judge(one.attempts)
        judged = [_Judged(*row) for row in zip(one.attempts, one.checkpoints, worth, strict=True)]
        distinct = list({row.attempt.text: row for row in reversed(judged)}.values())[::-1]
        right = sorted((row for row in distinct if _right(row, rule)), key=lambda row: len(row.attempt.text))
        wrong = [row for row in distinct if not _right(row, rule) and _wrong(row, rule)]
        _count(made.account, judged, distinct, right, wrong)
        made.sft += [_line(one.prompt, {"completion": row}, source) for row in right[: rule.answers]]
        both = [(good, bad) for bad in wrong for good in right]
        made.pairs += [_line(one.prompt, {"chosen": a, "rejected": b}, source) for a, b in both[: rule.pairs]]
    made.account.sft, made.account.pairs = len(made.sft), len(made.pairs)
    return made


def _right(row: _Judged, rule: Rule) -> bool:
    return row.worth >= rule.right and row.attempt.ended and bool(row.attempt.text)


def _wrong(row: _Judged, rule: Rule) -> bool:
    return bool(row.attempt.text) and (row.worth <= rule.wrong if rule.wrong is not None else row.worth < rule.right)


def _count(
    account: Account,
    judged: Sequence[_Judged],
    distinct: Sequence[_Judged],
    right: Sequence[_Judged],
    wrong: Sequence[_Judged],
) -> None:
    account.prompts += 1
    account.answers += len(judged)
    account.distinct += len(distinct)
    account.right += len(right)
    account.cut += sum(not row.attempt.ended for row in judged)
    account.unsolved += not right
    account.all_right += bool(right) and not wrong


def _line(prompt: Any, answers: Mapping[str, _Judged], source: Mapping[str, Any]) -> dict[str, Any]:
    """Texts for a text, turns for messages; and where from."""
    said: dict[str, Any] = {}
    for key, row in answers.items():
        text = row.attempt.text
        said[key] = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    rows = answers.values()
    whence = {
        "from": [row.attempt.where for row in rows],
        "checkpoint": [row.checkpoint for row in rows],
        "worth": [row.worth for row in rows],
    }
    return {"prompt": prompt, **said, "source": {**source, **whence}}


def as_files(made: Made, source: Mapping[str, Any]) -> dict[str, str]:
    """{name: content}: sft.jsonl, pairs.jsonl, and synthesis.json, the account."""
    return {
        "sft.jsonl": lines(made.sft),
        "pairs.jsonl": lines(made.pairs),
        ACCOUNT: account({**source, **asdict(made.account)}),
    }
