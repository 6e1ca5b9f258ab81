"""JSON lines -> conversations as token ids: what is learned of each, and where it stands in the file.

A line holds `messages`, or `prompt` and `completion`, or `prompt`, `chosen` and `rejected`, each a text or a list of
{role, content}. Lists go through the chat template; texts are joined as they are, and the token that ends documents
ends them. Special tokens that somebody typed stay text in both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moelab.data.chat import ChatTemplate, check_messages
from moelab.data.tokenizer import Tokenizer
from moelab.errors import DataError
from moelab.safe_files import Reading, json_lines, kind_of

READING = Reading(DataError, "mend the line, or take it out")
SHAPES = {  # of a stage: which keys a line may have, one of these sets
    "sft": (("messages",), ("prompt", "completion")),
    "reward": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "dpo": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "online_dpo": (("prompt",),),
}
EARLIER: dict[str, set[str | None]] = {  # role -> what may stand before it; None: the beginning
    "system": {None},
    "developer": {None, "system"},
    "user": {None, "system", "developer", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


@dataclass(frozen=True)
class Answer:
    """A conversation of n tokens."""

    ids: np.ndarray  # [n] int32, the prompt's before the answer's
    learned: np.ndarray  # [n] bool: whose log-probability counts
    routes: dict[int, np.ndarray] | None = (
        None  # layer -> [m, K] int64, experts of the first m <= n tokens, if recorded
    )


@dataclass(frozen=True)
class Example:
    """A line of the file."""

    where: str  # path:line
    answers: tuple[Answer, ...]  # one; of preferences two, chosen and rejected; of prompts alone, the prompt
    prompt: Any  # as the file has it: a text or messages
    fields: Mapping[str, Any] = field(default_factory=dict)  # of prompts alone, the line's other keys


@dataclass
class Account:
    """What became of the lines of a file."""

    path: Path
    lines: int = 0
    cut: int = 0
    dropped: int = 0  # longer than allowed
    alike: int = 0  # pairs whose answers are the same tokens

    def told(self, longest: int) -> list[str]:
        """Lines for the log; none where nothing was changed or left out."""
        return [f"{self.path}: {reason}" for reason in self.reasons(longest)]

    def reasons(self, longest: int) -> list[str]:
        """The same, of the file."""
        found = {
            f"were cut to {longest} tokens": self.cut,
            f"have more than {longest} tokens and were dropped": self.dropped,
            "have two answers of the same tokens, from which nothing can be learned, and were dropped": self.alike,
        }
        return [f"{count} of {self.lines} lines {what}" for what, count in found.items() if count]


@dataclass(frozen=True)
class Examples:
    """All that a stage learns from, and its account."""

    rows: list[Example]
    account: Account
    fingerprint: str = ""
    ends: tuple[int, ...] = ()  # token ids that end an answer
    held_out: Sequence[Example] = ()  # of which nothing is learned
    held_out_fingerprint: str = ""

    @property
    def tokens(self) -> int:
        return sum(len(answer.ids) for row in self.rows for answer in row.answers)


@dataclass(frozen=True)
class Shaping:
    """How lines become tokens."""

    stage: str
    template: ChatTemplate
    longest: int  # tokens of a conversation
    too_long: str = "cut"
    loss_on: str = "assistant"

    @property
    def tokenizer(self) -> Tokenizer:
        return self.template.tokenizer


def read_examples(path: Path, shaping: Shaping) -> Examples:
    """All lines of a file. Raises DataError naming file, line and cure for the first one that can't be learned from."""
    account, rows = Account(path), []
    for where, line in json_lines(path, READING):
        account.lines += 1
        try:
            example = fitted(_example(where, line, shaping), shaping, account)
        except DataError as error:
            said = str(error)
            raise DataError(said if said.startswith(where) else f"{where}: {said}") from error
        if example is not None:
            rows.append(example)
    if not rows:
        why = "; ".join(account.reasons(shaping.longest)) or "it is empty"
        raise DataError(f"{path}: holds no line to learn from: {why}; give others, or another sequence_length")
    ends = dict.fromkeys([*shaping.template.end_token_ids, shaping.tokenizer.eos_token_id])
    return Examples(rows, account, fingerprint(rows, shaping), tuple(ends))


def fingerprint(rows: Sequence[Example], shaping: Shaping) -> str:
    """Of all that can be learned from them, in their order."""
    digest = hashlib.sha256(repr((shaping.stage, shaping.loss_on, shaping.tokenizer.fingerprint)).encode())
    for row in rows:
        for answer in row.answers:
            digest.update(len(answer.ids).to_bytes(8, "little") + answer.ids.tobytes() + answer.learned.tobytes())
        if row.fields:  # what a reward reads
            digest.update(json.dumps(row.fields, sort_keys=True).encode())
    return digest.hexdigest()


def _example(where: str, line: dict[str, Any], shaping: Shaping) -> Example:
    shapes = SHAPES[shaping.stage]
    keys = next((keys for keys in shapes if all(key in line for key in keys)), None)
    if keys is None:
        wanted = ", or ".join(" and ".join(keys) for keys in shapes)
        raise DataError(f"{where}: has the keys {', '.join(map(str, line)) or 'none'}; {shaping.stage} needs {wanted}")
    values = {key: line[key] for key in keys}
    if "messages" in values:
        check_roles(values["messages"], "messages")
        return Example(where, (_whole(values["messages"], shaping),), values["messages"][:-1])
    if "prompt" not in values:
        values = _with_prompt(values)
    kinds = {isinstance(value, str) for value in values.values()}
    if len(kinds) > 1:
        raise DataError(f"{where}: {', '.join(values)}: must all be texts, or all lists of messages")
    answers = [key for key in values if key != "prompt"]
    build = _from_texts if kinds == {True} else _from_messages
    made = [build(values["prompt"], values[key], key, shaping) for key in answers]
    if made:
        return Example(where, tuple(made), values["prompt"])
    fields = {key: value for key, value in line.items() if key != "prompt"}
    return Example(where, (build(values["prompt"], None, "prompt", shaping),), values["prompt"], fields)


def check_roles(messages: Any, key: str, *, ends: str = "assistant") -> None:
    """Raise DataError where roles don't follow as in a conversation: system first, user and assistant in turn."""
    try:
        check_messages(messages)
    except DataError as error:
        raise DataError(str(error).replace("messages:", f"{key}:", 1)) from error
    before: str | None = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in EARLIER:
            raise DataError(f"{key}: turn {number}: role must be one of {', '.join(EARLIER)}, not '{role}'")
        if before not in EARLIER[role]:
            stands = "comes first" if before is None else f"follows {before}"
            raise DataError(
                f"{key}: turn {number}, of {role}, {stands}; a conversation is system, if it has one, then user and "
                "assistant in turn"
            )
        if role == "assistant" and not message.get("content") and set(message) <= {"role", "content"}:
            raise DataError(
                f"{key}: turn {number}, of assistant, is empty; give what is answered, or leave the line out"
            )
        before = role
    if before != ends:
        cure = "leave what comes after it out" if any(one["role"] == ends for one in messages) else "give one"
        raise DataError(f"{key}: ends with a turn of {before}, not of {ends}; {cure}")


def _with_prompt(values: dict[str, Any]) -> dict[str, Any]:
    """Chosen and rejected conversations, whole: what both begin with is the prompt."""
    chosen, rejected = values["chosen"], values["rejected"]
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise DataError("prompt: is missing; only lists of messages may leave it out, which begin with it")
    shared = 0
    for mine, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if mine != other:
            break
        shared += 1
    if not shared:
        raise DataError(
            "prompt: is missing, and chosen and rejected begin with no turn that is the same; give a prompt"
        )
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _whole(messages: list[Any], shaping: Shaping) -> Answer:
    chat = shaping.template.render(messages)
    last = int(np.flatnonzero(chat.assistant)[-1]) + 1 if chat.assistant.any() else len(chat.ids)
    learned = chat.assistant[:last] if shaping.loss_on == "assistant" else np.ones(last, bool)
    return Answer(chat.ids[:last], learned)


def _from_messages(prompt: Any, answer: Any, key: str, shaping: Shaping) -> Answer:
    if prompt == []:
        raise DataError("prompt: is an empty list; give at least a turn of user")
    if not isinstance(prompt, list):
        raise DataError(f"prompt: must be a text or a list of messages, not {kind_of(prompt)}")
    if answer is None:
        check_roles(prompt, "prompt", ends="user")
        ids = shaping.template.render(prompt, add_generation_prompt=True).ids
        return Answer(ids, np.zeros(len(ids), bool))
    if not isinstance(answer, list):
        raise DataError(f"{key}: must be a list of messages as prompt is, not {kind_of(answer)}")
    check_roles([*prompt, *answer], f"prompt and {key}")
    whole = _whole([*prompt, *answer], replace(shaping, loss_on="assistant"))
    begin = len(shaping.template.render(prompt, add_generation_prompt=True).ids)
    learned = whole.learned & (np.arange(len(whole.ids)) >= begin)
    if not any(message.get("content") for message in answer):
        raise DataError(f"{key}: is empty")
    return Answer(whole.ids, learned if shaping.loss_on == "assistant" else np.ones(len(learned), bool))


def _from_texts(prompt: str, answer: str | None, key: str, shaping: Shaping) -> Answer:
    before = shaping.tokenizer.encode(prompt) if prompt else np.zeros(0, np.int32)
    if answer is None:
        if not len(before):
            raise DataError("prompt: is empty")
        return Answer(before, np.zeros(len(before), bool))
    if not answer:
        raise DataError(f"{key}: is empty")
    ids = np.concatenate([before, shaping.tokenizer.encode(answer), [shaping.tokenizer.eos_token_id]]).astype(np.int32)
    learned = np.arange(len(ids)) >= (len(before) if shaping.loss_on == "assistant" else 0)
    return Answer(ids, learned)


def fitted(example: Example, shaping: Shaping, account: Account) -> Example | None:
    """`example` within the longest allowed; None where it is left out, which is counted.

    Raises DataError for one that is longer where that is refused, or of which nothing would be left to learn.
    """
    longest = shaping.longest
    most = max(len(answer.ids) for answer in example.answers)
    if most <= longest:
        return _apart(example, account)
    sampled = len(example.answers) == 1 and not example.answers[0].learned.any()  # of which a cut prompt is another one
    if shaping.too_long == "refuse" or (sampled and shaping.too_long == "cut"):
        raise DataError(f"has {most} tokens, more than {longest}; raise sequence_length, or set too_long: drop")
    if shaping.too_long == "drop":
        account.dropped += 1
        return None
    answers = tuple(Answer(answer.ids[:longest], answer.learned[:longest]) for answer in example.answers)
    if not all(answer.learned[1:].any() for answer in answers):
        raise DataError(
            f"of its {most} tokens the first {longest} hold nothing of an answer; raise sequence_length, or set "
            "too_long: drop"
        )
    account.cut += 1
    return _apart(replace(example, answers=answers), account)


def _apart(example: Example, account: Account) -> Example | None:
    if len(example.answers) == 2 and np.array_equal(example.answers[0].ids, example.answers[1].ids):
        account.alike += 1
        return None
    return example
