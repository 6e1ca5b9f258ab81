"""Texts that checkpoints write to the same prompts with the same random numbers, and how a terminal shows them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from moelab.checkpoint import read_run_config
from moelab.integrity import verified
from moelab.loading import read_model
from moelab.nn.generate import Sampling, generate
from moelab.nn.transformer import Transformer
from moelab.origin import Origin, check_vocabulary, end_token_ids, read_origin
from moelab.printable import printable
from moelab.registry import Registry
from moelab.trust import stored_registry
from moelab_tools.checkpoints import tokenizer_of
from moelab_tools.positions import Positions, trained_length

AS_TRAINED = Positions()
NARROWEST = 28  # characters of a column: where there is less room, samples stand below each other
SHOWN = "\n\t"  # control characters that a terminal is given; others are spelled out


@dataclass(frozen=True)
class Sample:
    """One prompt and how a checkpoint goes on with it."""

    checkpoint: str
    prompt: str
    text: str  # with the prompt, without the token that ended it
    ended: str  # a sentence: what ended it


def continue_prompts(
    checkpoint: Path,
    prompts: Sequence[str],
    sampling: Sampling,
    positions: Positions = AS_TRAINED,
    *,
    tokenizer: str | None = None,
    trust: bool = False,
    verify: bool = True,
) -> list[Sample]:
    """Each prompt on its own, all with `sampling.seed`; its end tokens are replaced by the checkpoint's.

    Raises CheckpointError or ConfigError for a folder that can't be loaded, or a tokenizer that isn't the model's.
    """
    origin = read_origin(verified(checkpoint, verify=verify))
    chosen = tokenizer_of(origin.folder, tokenizer)
    check_vocabulary(origin.model.vocab_size, chosen, tokenizer or str(origin.tokenizer))
    model = read_model(origin.folder, trust=trust)
    longest = max(len(chosen.encode(prompt)) for prompt in prompts) + sampling.max_new_tokens
    _reposition(positions, model, origin, longest, trust=trust)
    # Ids mean something to their own tokenizer alone.
    ends = end_token_ids(origin.folder) if tokenizer is None else None
    end_ids, said_by = ends or ((chosen.eos_token_id,), "the tokenizer")
    rules = Sampling(sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed, end_ids)
    samples = []
    for prompt in prompts:
        ids = chosen.encode(prompt).tolist() or [chosen.eos_token_id]
        found = list(generate(model, ids, rules))
        ended = found[-1:] if found[-1:] and found[-1] in end_ids else []
        names = ", ".join(f"{chosen.decode([i])} ({i})" for i in (ended or end_ids))
        why = f"ended at {names}, as {said_by} says" if ended else f"{len(found)} tokens without {names} of {said_by}"
        text = prompt + chosen.decode(found[: len(found) - len(ended)])
        samples.append(Sample(str(checkpoint), prompt, text, why))
    return samples


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
