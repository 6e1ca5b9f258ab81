"""Conversations as token ids: messages -> the text of a chat template -> ids, and which of them the assistant wrote.

    template = ChatTemplate.from_tokenizer(tokenizer, files)   # files: what lies beside a tokenizer.json
    chat = template.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    chat.ids, chat.assistant, chat.text

Three promises. A special token that somebody typed is text, wherever it stands in a message: only the template's own
become control tokens. The ids of a conversation begin with those of its beginning with `add_generation_prompt`, so that
what is trained on is what a model is asked to go on with. A turn of the assistant includes the token that ends it.
Free of torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from moelab.data.special_tokens import spelling
from moelab.data.tokenizer import Tokenizer
from moelab.errors import DataError
from moelab.records import Record
from moelab.safe_files import Reading, an_object, decode, kind_of, parse_json

READING = Reading(DataError, "write the tokenizer's files again, or name another template")
TEMPLATE_FILE, OLDER_FILE, CONFIG_FILE = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")  # of tokenizer_config.json, which templates write
# Unicode's noncharacters: no text has them, and those that one has all the same aren't used for it.
NONCHARACTERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")

# ChatML, as Qwen2's tokenizer_config.json has it, which speaks first where no system turn does.
CHATML = (
    "{% for message in messages %}"
    "{% if message.content is none or message.tool_calls %}"
    "{{ raise_exception('turn ' ~ loop.index ~ ', of ' ~ message.role ~ ', calls tools: ChatML has no words for it') }}"
    "{% endif %}"
    "{% if loop.first and message.role != 'system' and opening %}{{ opening }}{% endif %}"
    "{{ begin ~ message.role ~ '\n' ~ message.content ~ end ~ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ begin ~ 'assistant\n' }}{% endif %}"
)
BEGIN, END, SYSTEM = "<|im_start|>", "<|im_end|>", "You are a helpful assistant."

Message = Mapping[str, Any]  # {"role": text, "content": text}, and what else a template reads (tool_calls, ...)


@dataclass(frozen=True)
class Rendered:
    """A conversation as a model reads it; n tokens."""

    text: str  # control tokens spelled out
    ids: np.ndarray  # [n] int32
    assistant: np.ndarray  # [n] bool: written by the assistant, the token that ends its turn included


@dataclass(frozen=True)
class Control:
    """A control token of a tokenizer, and whether it takes the blanks beside it (`AddedToken` of `tokenizers`)."""

    id: int
    lstrip: bool
    rstrip: bool


class ChatTemplate:
    """A tokenizer's template, or ChatML, which needs none."""

    def __init__(self, tokenizer: Tokenizer, source: str, where: str, names: Mapping[str, str]) -> None:
        """`source`: jinja; `where`: as messages call it; `names`: what it may write, {"eos_token": spelling, ...}."""
        self.tokenizer, self.source, self.where, self._names = tokenizer, source, where, dict(names)
        self._control = control_tokens(tokenizer)
        self._spelled = spelling(tuple(self._control))
        self._beginnings = {token[:length] for token in self._control for length in range(1, len(token))}
        self.longest = max(map(len, self._control), default=0)  # characters of a control token
        self._compiled: dict[tuple[str, str], Callable[[Mapping[str, Any]], str]] = {}  # by its marks

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Tokenizer, files: Mapping[str, bytes] | None = None, *, where: str = "the tokenizer"
    ) -> ChatTemplate:
        """The template among a tokenizer's own files and `files`, {name: content} of what lies beside them.

        As transformers chooses: chat_template.jinja, then `chat_template` of tokenizer_config.json (of several the one
        named default), then chat_template.json. None of them: ChatML; where the tokenizer has no such tokens, the one
        that ends documents begins and ends a turn. Raises DataError for a template that is none.
        """
        given = dict(tokenizer.files()) | dict(files or {})
        config = _object(given, CONFIG_FILE)  # of a tokenizer that was read, and so sound
        names = {key: text for key in NAMED_TOKENS if (text := _spelled_token(config.get(key))) is not None}
        if TEMPLATE_FILE in given:
            text = decode(given[TEMPLATE_FILE], f"{where}: {TEMPLATE_FILE}", READING)
            return cls(tokenizer, text, f"{where}: {TEMPLATE_FILE}", names)
        for name, holder in ((CONFIG_FILE, config), (OLDER_FILE, _object(given, OLDER_FILE))):
            source = _named_template(holder.get("chat_template"), f"{where}: {name}")
            if source is not None:
                return cls(tokenizer, source, f"{where}: {name}: chat_template", names)
        return cls.chatml(tokenizer)

    @classmethod
    def chatml(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """ChatML, with Qwen2's opening turn of the system; without `<|im_start|>` and `<|im_end|>` among the control
        tokens, the one that ends documents stands for both, and nobody speaks first.
        """
        if {BEGIN, END} <= control_tokens(tokenizer).keys():
            opening = f"{BEGIN}system\n{SYSTEM}{END}\n"
            return cls(tokenizer, CHATML, "the built-in ChatML", {"begin": BEGIN, "end": END, "opening": opening})
        ends = tokenizer.decode([tokenizer.eos_token_id])
        return cls(tokenizer, CHATML, "the built-in ChatML", {"begin": ends, "end": ends})

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, *, tools: Sequence[Any] | None = None
    ) -> Rendered:
        """`messages`: [{"role": ..., "content": ...}, ...], of plain values, as JSON has them.

        add_generation_prompt: end with what begins a turn of the assistant. Raises DataError for messages that are
        none, for what the template refuses, and for turns of the assistant that can't be found in what it writes.
        """
        check_messages(messages)
        page = _Page(self, tools, messages)
        text = page.write(messages, add_generation_prompt)
        spans = page.marked(text) or _found(page, messages, page.bare(text))
        return self._encode(page, page.bare(text), spans)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The control token that ends a turn of the assistant, as the template writes it; empty where none does."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        page = _Page(self, None, turns)
        text = page.bare(page.write(turns, False))
        after = self._spelled.match(text, text.rindex("b") + 1)
        return () if after is None else (self._control[after[0]].id,)

    def renderer(self, marks: tuple[str, str]) -> Callable[[Mapping[str, Any]], str]:
        """What renders it, with `marks` around what it calls the assistant's own."""
        from moelab.data.chat_sandbox import compile_template  # noqa: PLC0415  (a run without chats needs no jinja)

        if marks not in self._compiled:
            self._compiled[marks] = compile_template(self.source, self.where, marks)
        return self._compiled[marks]

    def _encode(self, page: _Page, text: str, spans: Sequence[tuple[int, int]]) -> Rendered:
        """Cut at control tokens and at the borders of turns: what stands between has the same ids in any company."""
        borders = sorted({0, len(text), *(at for span in spans for at in span)})
        ids: list[np.ndarray] = []
        assistant: list[np.ndarray] = []
        swallows = False
        for begin, end in pairwise(borders):
            inside = any(first <= begin and end <= last for first, last in spans)
            for piece, token in self._pieces(text[begin:end]):
                if not piece:
                    continue
                found = np.array([token.id], np.int32) if token else self._plain(page, piece, swallows)
                swallows = token is not None and token.rstrip
                ids.append(found)
                assistant.append(np.full(len(found), inside))
        empty = np.zeros(0, np.int32)
        return Rendered(
            page.plain(text), np.concatenate([empty, *ids]), np.concatenate([empty.astype(bool), *assistant])
        )

    def _pieces(self, text: str) -> Iterable[tuple[str, Control | None]]:
        """(piece, its control token or None), in order."""
        start = 0
        for match in self._spelled.finditer(text):
            token = self._control[match[0]]
            before = text[start : match.start()]
            yield (before.rstrip() if token.lstrip else before), None
            yield match[0], token
            start = match.end()
        yield text[start:], None

    def _plain(self, page: _Page, piece: str, swallowed: bool) -> np.ndarray:
        text = page.plain(piece.lstrip() if swallowed else piece)
        return self.tokenizer.encode(text) if text else np.zeros(0, np.int32)


class _Page:
    """One conversation's renderings, and the marks in them that no text of it has."""

    def __init__(self, template: ChatTemplate, tools: Sequence[Any] | None, messages: Sequence[Message]) -> None:
        held = json.dumps([messages, tools], ensure_ascii=False, default=str) + template.source
        free = [mark for mark in NONCHARACTERS if mark not in held]
        if len(free) < 4:
            raise DataError("messages: hold nearly all of Unicode's noncharacters U+FDD0 .. U+FDEF; remove them")
        self._apart, *self._marks, self.probe = free[:4]
        self._template = template
        self._tools = tools
        self._render = template.renderer((self._marks[0], self._marks[1]))

    def write(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """What the template makes of them, with its marks, and spellings of control tokens within messages broken."""
        values = {"messages": self._broken(messages), "tools": self._broken(self._tools), "documents": None}
        names = self._template._names
        return self._render(values | {"add_generation_prompt": add_generation_prompt} | names)

    def marked(self, text: str) -> list[tuple[int, int]]:
        """Where in `bare(text)` the parts stand that the template itself calls the assistant's."""
        opening, closing = self._marks
        spans, begin = [], 0
        for before, match in enumerate(re.finditer(f"[{opening}{closing}]", text)):
            at = match.start() - before  # each mark is one character
            if match[0] == opening:
                begin = at
            elif at > begin:
                spans.append((begin, at))
        return spans

    def bare(self, text: str) -> str:
        """Without the marks of the template."""
        return text.translate(dict.fromkeys(map(ord, self._marks)))

    def plain(self, text: str) -> str:
        """As it was typed."""
        return text.replace(self._apart, "")

    def _broken(self, value: Any) -> Any:
        """A plain value whose texts spell no control token, nor end with the beginning of one."""
        if isinstance(value, str):
            return self._break(value)
        if isinstance(value, Mapping):
            return {self._break(str(key)): self._broken(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._broken(inner) for inner in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise DataError(f"messages: hold a {type(value).__name__}; give plain values, as JSON has them")

    def _break(self, text: str) -> str:
        broken = self._template._spelled.sub(lambda match: match[0][:1] + self._apart + match[0][1:], text)
        for at in range(max(0, len(broken) - self._template.longest), len(broken)):
            if broken[at:] in self._template._beginnings:  # the template's own text might complete it
                return broken[: at + 1] + self._apart + broken[at + 1 :]
        return broken


def _found(page: _Page, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
    """Where in `text` the turns of the assistant stand, for a template that doesn't say."""
    return [
        _turn(page, messages, index, text) for index, message in enumerate(messages) if message["role"] == "assistant"
    ]


def _turn(page: _Page, messages: Sequence[Message], index: int, text: str) -> tuple[int, int]:
    """From the end of what asks for it to the token that ends it.

    Where later turns change how the template writes earlier ones (reasoning left out), it is where other words change
    the text, and what ends it.
    """
    try:
        before = page.bare(page.write(messages[:index], True))
        after = page.bare(page.write(messages[: index + 1], False))
    except DataError:  # a template that refuses to begin with the assistant
        before = after = "\0"
    begin = len(before) if text.startswith(before) else None
    if begin is not None and text.startswith(after) and after.startswith(before) and len(after) > begin:
        return begin, _trimmed(page, text, begin, len(after))
    changed = [*messages[:index], {**messages[index], "content": page.probe}, *messages[index + 1 :]]
    other = page.bare(page.write(changed, False))
    at = other.find(page.probe)
    behind = other[at + 1 :]
    if at < 0 or not text.endswith(behind) or not text.startswith(other[:at] if begin is None else before):
        raise DataError(
            f"messages: turn {index + 1}, of the assistant, can't be found in what {page._template.where} writes; "
            "put {% generation %} around what the assistant says there, or use another template"
        )
    end = len(text) - len(behind)
    ending = page._template._spelled.match(text, end)
    return (at if begin is None else begin), end if ending is None else ending.end()


def _trimmed(page: _Page, text: str, begin: int, end: int) -> int:
    """Without the blanks behind the control token that ends a turn: the model stops there and never writes them."""
    bare = begin + len(text[begin:end].rstrip())
    endings = [match.end() for match in page._template._spelled.finditer(text, begin, end)]
    return bare if bare in endings else end


def check_messages(messages: Any) -> None:
    """Raise DataError, naming the turn, where it is no list of {"role": a name, "content": a text or none}.

    A role is a word, since templates write it where control tokens stand.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError('messages: must be a list of {"role": ..., "content": ...}, at least one')
    for place, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise DataError(f"messages: turn {place} is {kind_of(message)}, not an object with role and content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise DataError(f"messages: turn {place}: role must be a word such as user or assistant, not {role!r}")
        if content is None and len(message.keys() - {"role", "content"}) > 0:
            continue  # a call of tools, say
        if not isinstance(content, str):
            raise DataError(f"messages: turn {place} ({role}): content must be a text, not {kind_of(content)}")


def control_tokens(tokenizer: Tokenizer) -> dict[str, Control]:
    """{how it is spelled: the control token}, those of `tokenizer.special_tokens`."""
    definition = an_object(parse_json(tokenizer.files()["tokenizer.json"], "tokenizer.json", READING), "", READING)
    found = {}
    for token in Record("tokenizer.json", definition, READING).listed("added_tokens", dict, optional=True):
        if token.get("content") in tokenizer.special_tokens:
            found[token["content"]] = Control(token["id"], bool(token.get("lstrip")), bool(token.get("rstrip")))
    return found


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return an_object(parse_json(files[name], name, READING), name, READING) if name in files else {}


def _spelled_token(value: Any) -> str | None:
    """A token of tokenizer_config.json, which older files write as an object."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _named_template(value: Any, where: str) -> str | None:
    """The text of `chat_template`, or of a list of named ones the default."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default", "" if not named else None)
        if value is None:
            READING.refuse(where, f"chat_template: none of {', '.join(map(str, named))} is named default")
    if value is not None and not isinstance(value, str):
        READING.refuse(where, f"chat_template: must be a text, or a list of named ones, not {kind_of(value)}")
    return value or None
