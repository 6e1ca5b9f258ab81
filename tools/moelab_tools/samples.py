"""Texts that checkpoints write to the same prompts with the same random numbers, and how a terminal shows them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from moelab.checkpoint import read_run_config
from moelab.integrity import verified
from moelab.loading import chat_template_of, read_model
from moelab.nn.generate import Continuation, generate_batch
from moelab.nn.texts import Speech
from moelab.nn.transformer import Transformer
from moelab.origin import Origin, check_vocabulary, end_token_ids, read_origin, sampling_settings
from moelab.printable import printable
from moelab.registry import Registry
from moelab.trust import stored_registry
from moelab_tools.checkpoints import tokenizer_of
from moelab_tools.positions import Positions, trained_length

AS_TRAINED = Positions()
NARROWEST = 28  # characters of a column: where there is less room, samples stand below each other
SHOWN = "\n\t"  # control characters that a terminal is given; others are spelled out


@dataclass(frozen=True)
class Request:
    """What is asked of each checkpoint."""

    prompts: Sequence[str | list[Any]]  # texts, or conversations for the chat template: [{"role": ..., "content": ...}]
    settings: Mapping[str, Any] = field(default_factory=dict)  # fields of `Sampling`; others as the checkpoint says
    samples: int = 1
    batch_size: int | None = None
    tokenizer: str | None = None  # in place of the checkpoint's own


@dataclass(frozen=True)
class Sample:
    """One prompt and how a checkpoint goes on with it."""

    checkpoint: str
    prompt: str
    text: str  # with the prompt, without what ended it
    ended: str  # a sentence: what ended it
    sample: int = 0  # which of the prompt's
    tokens: int = 0  # new ones


def continue_prompts(
    checkpoint: Path,
    request: Request,
    positions: Positions = AS_TRAINED,
    *,
    trust: bool = False,
    verify: bool = True,
) -> list[Sample]:
    """Each prompt with its continuations, in order; settings that aren't given are as generation_config.json says.

    Raises CheckpointError or ConfigError for a folder that can't be loaded, or a tokenizer that isn't the model's,
    DataError for messages that the template refuses.
    """
    origin = read_origin(verified(checkpoint, verify=verify))
    chosen = tokenizer_of(origin.folder, request.tokenizer)
    check_vocabulary(origin.model.vocab_size, chosen, request.tokenizer or str(origin.tokenizer))
    # Ids mean something to their own tokenizer alone.
    ends = end_token_ids(origin.folder) if request.tokenizer is None else None
    end_ids, said_by = ends or ((chosen.eos_token_id,), "the tokenizer")
    speech = Speech(chosen, end_ids, sampling_settings(origin.folder))
    prompts, ids, turn_ends = _encoded(request, speech, origin)
    sampling = speech.sampling(request.settings)
    if turn_ends:
        sampling = replace(sampling, end_token_ids=(*end_ids, *turn_ends))
    model = read_model(origin.folder, trust=trust)
    longest = max(map(len, ids)) + sampling.max_new_tokens
    _reposition(positions, model, origin, longest, trust=trust)
    found = generate_batch(
        model, ids, sampling, samples=request.samples, batch_size=request.batch_size, tokenizer=chosen
    )
    return [
        Sample(
            str(checkpoint), prompts[one.prompt], prompts[one.prompt] + speech.text(one),
            _ended(one, speech, said_by), one.sample, len(one.ids),
        )
        for one in found
    ]  # fmt: skip


def _encoded(request: Request, speech: Speech, origin: Origin) -> tuple[list[str], list[list[int]], tuple[int, ...]]:
    """Texts, ids, and what ends a turn where conversations are among them."""
    texts, ids = [], []
    template = None
    for prompt in request.prompts:
        if isinstance(prompt, str):
            texts.append(prompt)
            ids.append(speech.encode(prompt))
            continue
        if template is None:
            template = chat_template_of(origin.folder, None if request.tokenizer is None else speech.tokenizer)
        rendered = template.render(prompt, add_generation_prompt=True)
        texts.append(rendered.text)
        ids.append(rendered.ids.tolist())
    return texts, ids, () if template is None else template.end_token_ids


def _ended(one: Continuation, speech: Speech, said_by: str) -> str:
    """A sentence."""
    if isinstance(one.ended, str):
        return f"ended before {one.ended!r}"
    ids = speech.end_token_ids if one.ended is None else (one.ended,)
    names = ", ".join(f"{speech.tokenizer.decode([i])} ({i})" for i in ids)
    if one.ended is None:
        return f"{len(one.ids)} tokens without {names} of {said_by}"
    said = said_by if one.ended in speech.end_token_ids else "the chat template"
    return f"ended at {names}, as {said} says"


def ended_itself(said: str) -> bool:
    """Whether a sentence of `Sample.ended` tells of an end, and not that max_new_tokens came first."""
    return said.startswith("ended ")


def _reposition(positions: Positions, model: Transformer, origin: Origin, length: int, *, trust: bool) -> None:
    if positions == AS_TRAINED:
        return
    run = read_run_config(origin.folder) if origin.is_run else None
    registry = Registry() if run is None else stored_registry(run, origin.folder, trust=trust)
    for line in positions.apply(model, registry, length, trained_length(run, origin.model.max_position_embeddings)):
        print(line, file=sys.stderr)


def show(samples: Sequence[Sample], width: int) -> None:
    """On stdout: one alone as it is, several side by side where there is room, prompt by prompt."""
    if len(samples) == 1:
        print(printable(samples[0].text, keep=SHOWN))
        return
    from moelab_tools.terminal import make_console

    console = make_console()
    console.width = width
    for prompt, group in groupby(samples, key=lambda sample: sample.prompt):
        console.print(f"[bold]prompt[/] {_plain(repr(prompt))}", highlight=False, soft_wrap=True)
        _show_one(list(group), console)


def _show_one(samples: Sequence[Sample], console: object) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    assert isinstance(console, Console)
    if console.width < NARROWEST * len(samples):
        for sample in samples:
            console.print(f"[dim]--[/] [bold]{_plain(sample.checkpoint)}[/]", highlight=False, soft_wrap=True)
            console.print(Text(printable(sample.text, keep=SHOWN)))
        return
    table = Table(box=box.HORIZONTALS, pad_edge=False, expand=True)
    for sample in samples:
        table.add_column(_plain(sample.checkpoint), overflow="fold", ratio=1)
    table.add_row(*(Text(printable(sample.text, keep=SHOWN), overflow="fold") for sample in samples))
    console.print(table)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(printable(text))
