"""A conversation with a checkpoint: turns in, turns out, and what of them a terminal is given."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from moelab.data.chat import ChatTemplate
from moelab.errors import UserError
from moelab.integrity import verified
from moelab.loading import chat_template_of, read_model
from moelab.nn.generate import Continuation, generate
from moelab.nn.sampling import Sampling
from moelab.nn.texts import Speech
from moelab.nn.transformer import Transformer
from moelab.origin import check_vocabulary, end_token_ids, read_origin, sampling_settings
from moelab.printable import printable
from moelab_tools.checkpoints import tokenizer_of

SHOWN = "\n\t"
NEW = "/new"


@dataclass
class Talk:
    """A model, its template, and what was said so far."""

    model: Transformer
    speech: Speech
    template: ChatTemplate
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        checkpoint: Path,
        settings: Mapping[str, Any],
        *,
        tokenizer: str | None = None,
        system: str | None = None,
        trust: bool = False,
        verify: bool = True,
    ) -> Talk:
        """Of a folder of weights. Raises UserErrors as `moelab generate` does."""
        origin = read_origin(verified(checkpoint, verify=verify))
        chosen = tokenizer_of(origin.folder, tokenizer)
        check_vocabulary(origin.model.vocab_size, chosen, tokenizer or str(origin.tokenizer))
        ends = (end_token_ids(origin.folder) if tokenizer is None else None) or ((chosen.eos_token_id,), "")
        speech = Speech(chosen, ends[0], sampling_settings(origin.folder))
        template = chat_template_of(origin.folder, None if tokenizer is None else chosen)
        sampling = speech.sampling(settings)
        sampling = replace(sampling, end_token_ids=(*ends[0], *template.end_token_ids))
        made = cls(read_model(origin.folder, trust=trust), speech, template, sampling, system)
        made.begin()
        return made

    def begin(self) -> None:
        """A new conversation."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(self, said: str) -> Iterator[str]:
        """The model's turn after the user's, piece by piece as it is written; both are remembered once it is whole."""
        turns = [*self.messages, {"role": "user", "content": said}]
        ids = self.template.render(turns, add_generation_prompt=True).ids.tolist()
        # Each turn has random numbers of its own, and the same conversation the same ones.
        rules = replace(self.sampling, seed=self.sampling.seed + len(turns))
        found: list[int] = []
        shown = ""
        for token in generate(self.model, ids, rules, self.speech.tokenizer):
            found.append(token)
            text = self._text(found)
            whole = text if not text.endswith("\ufffd") else shown  # a character may take several tokens
            if whole.startswith(shown):
                yield whole[len(shown) :]
                shown = whole
        text = self._text(found)
        yield text[len(shown) :] if text.startswith(shown) else ""
        self.messages = [*turns, {"role": "assistant", "content": text}]

    def _text(self, ids: list[int]) -> str:
        """What is shown of new tokens: none that ends a turn, and nothing from a stop text on."""
        ended: int | str | None = ids[-1] if ids and ids[-1] in self.sampling.end_token_ids else None
        text = self.speech.text(Continuation(0, 0, ids, ended))
        cuts = [text.index(stop) for stop in self.sampling.stop if stop in text]
        return text[: min(cuts)] if cuts else text


def talk(conversation: Talk) -> None:
    """Turns from stdin, answers to stdout; prompts to a person alone."""
    person = sys.stdin is not None and sys.stdin.isatty()
    click.echo(f"template: {printable(conversation.template.where)}; {NEW} begins anew, an empty line ends", err=True)
    while True:
        if person:
            click.echo("> ", nl=False, err=True)
        said = _line().rstrip("\r\n")
        if not said.strip():
            return
        if said.strip() == NEW:
            conversation.begin()
            continue
        for piece in conversation.answer(said):
            click.echo(printable(piece, keep=SHOWN), nl=False)
        click.echo()


def _line() -> str:
    """The next line of stdin, empty at its end. UserError where there is none: closed, or a terminal that is gone."""
    try:
        return "" if sys.stdin is None else sys.stdin.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"stdin: can't be read ({error}); give turns as lines of UTF-8") from error
