"""Tags of instructions, in an open set: a generator names them, rules make one of many spellings.

InsTag (Lu et al. 2308.07074; the paper itself could not be opened): the prompt is that of its table 4 in its own words,
since models were fine-tuned on it (InsTagger), as several repositories quote it; replies are lists of {tag,
explanation}. Of the four steps of its normalisation, as others quote them, the first two are here: frequency (alpha, 20
there) and rules (lower case, special characters as spaces, stems).
Departures: rules come before the frequency, so that spellings of one tag count together; in place of NLTK's stems, tags
that differ in plural endings alone are one, shown in its commonest spelling; tags are not merged by meaning (PhraseBERT
and DBSCAN there) nor by association (FP-Growth). Qwen2's report goes on by hand (2407.10671 section 4.1.1).
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moelab.data.generating import Question, Reply
from moelab.errors import DataError, UserError
from moelab.safe_files import Reading, json_lines, kind_of, parse_json
from moelab.seeds import derive_seed
from moelab_tools.synthesis.asking import Asker, digest
from moelab_tools.synthesis.conversations import with_source
from moelab_tools.synthesis.declaration import INSTRUCTION, TagConfig

STEP, KEY = "tags", "tags"
READING = Reading(DataError, 'give JSON lines with "messages" or "prompt"')
LONGEST = 60  # characters of a tag; a longer one is a sentence
REQUEST = (
    "You are a tagging system that provides useful tags for instruction intentions to distinguish instructions for a "
    "helpful AI assistant. Below is an instruction:\n[begin]\n{instruction}\n[end]\nPlease provide coarse-grained "
    'tags, such as "Spelling and Grammar Check" and "Cosplay", to identify main intentions of above instruction. Your '
    "answer should be a list including titles of tags and a brief explanation of each tag. Your response have to "
    'strictly follow this JSON format: [{"tag": str, "explanation": str}]. Please response in English.'
)


@dataclass(frozen=True)
class Conversation:
    """A line of the user's."""

    where: str  # path:line
    line: dict[str, Any]
    instruction: str  # of the user's turns


@dataclass
class Account:
    """What became of the lines."""

    lines: int = 0
    shortened: int = 0  # whose instructions were longer than was shown
    unreadable: int = 0  # replies that hold no list of tags
    cut: int = 0  # replies that a limit ended; what is whole of them counts
    untagged: int = 0  # lines that no tag is left of
    raw: int = 0  # tags as they were said, distinct
    tags: int = 0  # distinct ones that are left
    rare: int = 0  # distinct ones that were left out, as too few have them
    no_tags: int = 0  # distinct ones that were left out as no tags: empty, or sentences

    def told(self) -> str:
        """In a line or two."""
        return (
            f"{self.lines} conversations, {self.unreadable} with a reply that holds no tags, {self.untagged} without a "
            f"tag in the end\n{self.tags} tags of {self.raw} as they were said; {self.rare} too rare, "
            f"{self.no_tags} no tags"
        )


@dataclass
class Made:
    """The lines with their tags, and how often each tag stands."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # the commonest first
    account: Account = field(default_factory=Account)


def read_conversations(paths: Sequence[Path]) -> list[Conversation]:
    """Lines of conversations, preferences or prompts. Raises DataError with file and line for what is none."""
    found = []
    for path in paths:
        for where, line in json_lines(path, READING, finite=True):
            if KEY in line:
                READING.refuse(where, f"has {KEY} already; take them out, or use them as they are")
            said = line.get("messages", line.get("prompt"))
            texts = [said] if isinstance(said, str) else _of_users(said, where)
            instruction = "\n\n".join(texts)
            if not instruction.strip():
                READING.refuse(where, "holds no word of a user")
            found.append(Conversation(where, line, instruction))
    if not found:
        READING.refuse(paths[0], "holds no conversation")
    return found


def _of_users(said: Any, where: str) -> list[str]:
    if not isinstance(said, list):
        READING.refuse(where, f'"messages" or "prompt" must be a text or a list of messages, not {kind_of(said)}')
    texts = []
    for turn in said:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            READING.refuse(where, "holds a turn that is no {role, content}")
        if turn.get("role") == "user":
            texts.append(turn["content"])
    return texts


def make(config: TagConfig, conversations: Sequence[Conversation], ask: Asker) -> Made:
    """Ask for all, then make one tag of its spellings over all. What `ask` raises."""
    made = Made()
    account = made.account
    questions = [_question(config, one) for one in conversations]
    said = [_tags_of(reply, account) for reply in ask(questions, "tagging")]
    account.shortened = sum(len(one.instruction) > config.longest for one in conversations)
    shown, account.raw, account.rare, account.no_tags = normalised(said, config.least)
    made.counts = dict(
        sorted(Counter(tag for tags in shown for tag in tags).items(), key=lambda one: (-one[1], one[0]))
    )
    for one, raw, tags in zip(conversations, said, shown, strict=True):
        source = {"step": STEP, "from": one.where, "said": raw, "generator": ask.said, "seed": config.seed}
        made.rows.append({**one.line, KEY: tags, "source": with_source(one.line, source)})
        account.untagged += not tags
    account.lines, account.tags = len(made.rows), len(made.counts)
    return made


def _question(config: TagConfig, one: Conversation) -> Question:
    shown = one.instruction[: config.longest]
    text = (config.request or REQUEST).replace(INSTRUCTION, shown)
    return Question([{"role": "user", "content": text}], derive_seed(config.seed, STEP, digest(one.instruction)))


def _tags_of(reply: Reply, account: Account) -> list[str]:
    """The tags of a reply as they stand there, each once: of a list, or of one object alone."""
    account.cut += not reply.ended
    for opening, closing in ("[]", "{}"):
        begin, end = reply.text.find(opening), reply.text.rfind(closing)
        if 0 <= begin < end:
            try:
                value = parse_json(reply.text[begin : end + 1], "reply", Reading())
            except UserError:
                continue
            rows = value if isinstance(value, list) else [value]
            tags = [row["tag"] for row in rows if isinstance(row, Mapping) and isinstance(row.get("tag"), str)]
            if tags:
                return list(dict.fromkeys(tags))
    account.unreadable += 1
    return []


def normalised(said: Sequence[Sequence[str]], least: int) -> tuple[list[list[str]], int, int, int]:
    """Tags of each line as they were said -> as they are kept, in their order; how many distinct ones there were,
    were too rare, and were no tags.
    """
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    lines: Counter[str] = Counter()
    raw = {tag for tags in said for tag in tags}
    spelled = {tag: plain(tag) for tag in raw}
    fit = {tag for tag in raw if 0 < len(spelled[tag]) <= LONGEST}
    for tags in said:
        mine = [tag for tag in tags if tag in fit]
        for tag in mine:
            spellings[_stem(spelled[tag])][spelled[tag]] += 1
        lines.update({_stem(spelled[tag]) for tag in mine})
    name = {key: min(found, key=lambda text: (-found[text], text)) for key, found in spellings.items()}
    kept = {key for key, count in lines.items() if count >= least}
    shown = []
    for tags in said:
        keys = dict.fromkeys(_stem(spelled[tag]) for tag in tags if tag in fit)
        shown.append([name[key] for key in keys if key in kept])
    return shown, len(raw), len(lines) - len(kept), len(raw - fit)


def plain(tag: str) -> str:
    """Lower case, one space for whatever is no letter and no digit. Marks that belong to a letter stay."""
    text = unicodedata.normalize("NFKC", tag).lower()
    return " ".join("".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text).split())


def _stem(tag: str) -> str:
    """What tags that differ in plural endings alone have in common; never shown."""
    return " ".join(map(_singular, tag.split()))


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and word[-2] not in "sui":
        return word[:-1]
    return word


def told(config: TagConfig, ask: Asker, made: Made) -> dict[str, Any]:
    """For the account file: what was asked, of whom, and what came of it."""
    how = {key: getattr(config, key) for key in ("least", "longest", "seed")}
    request = config.request or REQUEST
    return {"step": STEP, **how, "request": request, "generator": ask.said, **asdict(made.account)}
