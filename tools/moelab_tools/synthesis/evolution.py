"""Self-evolution: prompts made harder, or more of them, by a model; what came to nothing is left out.

Qwen2 prompts its models "to add constraints or requirements to existing instructions" (2407.10671 section 4.1.1,
"Instruction Evolution"; read). Operations and elimination are Evol-Instruct's (WizardLM, Xu et al. 2304.12244): of its
operations the five of its released code (nlpxucan/WizardLM, Evol_Instruct/depth.py and breadth.py; `complicate input`
is not there), requests in our own words. Its four eliminations, as others quote them from the paper: no gain, which a
model is asked; an answer with "sorry" of fewer than 80 words; an answer of punctuation and stop words alone; words of
the request in the new prompt. Ours beside them: what was cut off, and what is there already.

Departures: of a conversation the last turn is evolved; a judgement that is neither "equal" nor "not equal" is no
elimination, and counted; stop words are a short English list; a prompt that failed is tried again in the next round.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moelab.data.generating import Question, Reply
from moelab.seeds import derive_seed
from moelab_tools.synthesis.asking import Asker, digest
from moelab_tools.synthesis.conversations import Asked, with_source
from moelab_tools.synthesis.declaration import EvolveConfig

STEP = "evolution"
Row = dict[str, Any]
HARDER = (
    "Rewrite the prompt below into one that is somewhat harder for an assistant, and that people still understand and "
    "can answer. Keep all input that it holds, such as tables and code. {method} Add no more than 10 to 20 words. "
    "Write the new prompt alone, and neither 'given prompt' nor 'rewritten prompt' in it.\n\n"
    "#Given Prompt#:\n{instruction}\n\n#Rewritten Prompt#:\n"
)
OTHER = (
    "Take the prompt below as an inspiration for an entirely new one, of the same field and still rarer, about as long "
    "and as hard, that people understand and can answer. Write the new prompt alone, and neither 'given prompt' nor "
    "'created prompt' in it.\n\n#Given Prompt#:\n{instruction}\n\n#Created Prompt#:\n"
)
REQUESTS = {
    "constraints": ("Do this by adding one more constraint or requirement.", HARDER),
    "deepen": ("Where it asks about something, ask about that more deeply and more broadly.", HARDER),
    "concretise": ("Do this by putting more specific concepts in place of general ones.", HARDER),
    "reasoning": ("Where a few simple thoughts answer it, ask explicitly for several steps of reasoning.", HARDER),
    "breadth": ("", OTHER),
}
GAIN = (
    "Are these two prompts equal, that is, do they ask for the same, with the same constraints and requirements, as "
    "deeply and as broadly?\n\nThe first prompt: {old}\n\nThe second prompt: {new}\n\nAnswer with Equal or Not equal "
    "alone."
)
COPIED = ("given prompt", "rewritten prompt", "created prompt")
FEWEST_WORDS = 80  # of an answer that says it is sorry
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by for from has have i in is it its not of on or so that the their there they this "
        "to was we were what which who will with you your",
    )
)
REASONS = ("empty", "cut", "copied", "known", "no_gain", "sorry", "hollow")  # in the order in which they are looked for


@dataclass
class Account:
    """What became of the prompts."""

    prompts: int = 0
    repeated: int = 0  # prompts that came again
    tried: int = 0  # evolutions, over all rounds
    evolved: int = 0  # lines of prompts.jsonl
    left_out: dict[str, int] = field(default_factory=dict)  # {reason: evolutions}
    unclear: int = 0  # judgements of a gain that say neither; these evolutions stay

    def told(self) -> str:
        """In a line or two."""
        why = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items() if count) or "none"
        return (
            f"{self.prompts} prompts, {self.repeated} more came again; of {self.tried} evolutions {self.evolved} stay, "
            f"left out: {why}"
            + (f"\n{self.unclear} judgements say neither equal nor not equal" if self.unclear else "")
        )


@dataclass
class Made:
    """Lines of JSON: prompts, and prompts with answers for stage sft."""

    prompts: list[Row] = field(default_factory=list)
    sft: list[Row] = field(default_factory=list)
    account: Account = field(default_factory=Account)


@dataclass
class _Growing:
    """A prompt and what it has become."""

    asked: Asked
    text: str  # of its last turn, now
    operation: str = ""
    new: str = ""  # what this round made of it
    answer: str | None = None

    def messages(self, text: str) -> list[Any]:
        return [*self.asked.messages[:-1], {"role": "user", "content": text}]

    def id(self, text: str) -> str:
        return digest(self.messages(text))[:16]


def make(config: EvolveConfig, prompts: Sequence[Asked], ask: Asker) -> Made:
    """Round after round, each request of all prompts at once. What `ask` raises."""
    pool = [_Growing(one, one.messages[-1]["content"]) for one in prompts]
    made, lost = Made(), Counter[str]()
    known = {one.id(one.text) for one in pool}
    for number in range(config.rounds):
        live = _evolved(config, pool, number, ask, lost, known)
        if config.check_gain:
            live = _gaining(config, live, number, ask, lost, made.account)
        if config.answers:
            live = _answered(config, live, number, ask, lost)
        for one in live:
            _add(config, one, number, ask, made)
            one.text = one.new
        made.account.tried += len(pool)
    made.account.prompts, made.account.evolved = len(pool), len(made.prompts)
    made.account.left_out = {reason: lost[reason] for reason in REASONS}
    return made


def _evolved(
    config: EvolveConfig, pool: list[_Growing], number: int, ask: Asker, lost: Counter[str], known: set[str]
) -> list[_Growing]:
    """Those of which something new was made; `known`: ids of all prompts that there are."""
    questions = []
    for one in pool:
        drawn = derive_seed(config.seed, "operation", one.asked.key, number) % len(config.operations)
        one.operation, one.answer = config.operations[drawn], None
        method, request = REQUESTS[one.operation]
        questions.append(_question(config, one, number, "evolve", request.format(method=method, instruction=one.text)))
    live = []
    for one, reply in zip(pool, ask(questions, f"evolving, round {number + 1}"), strict=True):
        one.new = reply.text.strip()
        reason = _fault(reply) or ("known" if one.id(one.new) in known or _alike(one.new, one.text) else None)
        if reason is None:
            known.add(one.id(one.new))
            live.append(one)
        else:
            lost[reason] += 1
    return live


def _fault(reply: Reply) -> str | None:
    text = reply.text.strip().lower()
    if not text:
        return "empty"
    if not reply.ended:
        return "cut"
    return "copied" if any(words in text for words in COPIED) else None


def _alike(one: str, other: str) -> bool:
    """But for capitals, punctuation and spaces."""
    words = [re.findall(r"\w+", text.lower()) for text in (one, other)]
    return words[0] == words[1] and bool(words[0])


def _gaining(
    config: EvolveConfig, live: list[_Growing], number: int, ask: Asker, lost: Counter[str], account: Account
) -> list[_Growing]:
    questions = [_question(config, one, number, "gain", GAIN.format(old=one.text, new=one.new)) for one in live]
    kept = []
    for one, reply in zip(live, ask(questions, f"comparing, round {number + 1}"), strict=True):
        said = reply.text.strip().lower().lstrip("*\"'# ")
        if said.startswith("equal"):
            lost["no_gain"] += 1
            continue
        account.unclear += not said.startswith("not equal")
        kept.append(one)
    return kept


def _answered(
    config: EvolveConfig, live: list[_Growing], number: int, ask: Asker, lost: Counter[str]
) -> list[_Growing]:
    questions = [
        Question(one.messages(one.new), derive_seed(config.seed, STEP, one.asked.key, number, "answer")) for one in live
    ]
    kept = []
    for one, reply in zip(live, ask(questions, f"answering, round {number + 1}"), strict=True):
        reason = _no_answer(reply.text)
        if reason is not None:
            lost[reason] += 1
            continue
        one.answer = reply.text.strip() if reply.ended else None  # half of one shows that there is one
        kept.append(one)
    return kept


def _no_answer(text: str) -> str | None:
    if "sorry" in text.lower() and len(text.split()) < FEWEST_WORDS:
        return "sorry"
    return "hollow" if set(re.findall(r"\w+", text.lower())) <= STOP_WORDS else None


def _question(config: EvolveConfig, one: _Growing, number: int, purpose: str, text: str) -> Question:
    seed = derive_seed(config.seed, STEP, one.asked.key, number, purpose)
    return Question([{"role": "user", "content": text}], seed)


def _add(config: EvolveConfig, one: _Growing, number: int, ask: Asker, made: Made) -> None:
    """A text for a text, turns for messages; and where from. The line's other keys were of the old prompt."""
    source: Row = {"step": STEP, "from": one.asked.where, "parent": one.id(one.text), "operation": one.operation}
    source |= {"round": number + 1, "generator": ask.said, "seed": config.seed}
    source, messages = with_source(one.asked.beside, source), one.messages(one.new)
    made.prompts.append({"prompt": one.new if one.asked.plain else messages, "id": one.id(one.new), "source": source})
    if one.answer is not None:
        answer = [{"role": "assistant", "content": one.answer}]
        made.sft.append({"prompt": messages, "completion": answer, "id": one.id(one.new), "source": source})


def told(config: EvolveConfig, ask: Asker, made: Made) -> Row:
    """For the account file: what was asked, of whom, and what came of it."""
    how = {key: getattr(config, key) for key in ("operations", "rounds", "check_gain", "answers", "seed")}
    return {"step": STEP, **how, "generator": ask.said, **asdict(made.account), "sft": len(made.sft)}
