"""`moelab ablate` behind its options: what is asked, on which text, and what comes out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.atomic import write_output
from moelab.errors import ConfigError
from moelab.routes.files import read_trace
from moelab.routes.replay import check_replayable, trace_batches
from moelab.routes.trace import Trace
from moelab_tools.routes.ablation import Ablation
from moelab_tools.routes.alternatives_study import alternatives
from moelab_tools.routes.asked import SWAPS, layers_of, removals, swaps
from moelab_tools.routes.effects import Text, tally
from moelab_tools.routes.rare_study import rare
from moelab_tools.routes.source import HELD_OUT, Subject, subject_of

NUMBERS = "ablation.json"


@dataclass(frozen=True)
class Told:
    """What a command prints, and what it writes."""

    lines: list[str]
    json: dict[str, Any]

    def write(self, folder: Path) -> None:
        """ablation.json, whole or not at all."""
        write_output(folder / NUMBERS, json.dumps(self.json, indent=2) + "\n", "--out")


def ablate(
    checkpoint: Path,
    config: tuple[str, ...],
    *,
    remove: tuple[str, ...],
    rest: str,
    swap: tuple[str, ...],
    study: str | None,
    data: tuple[str, ...],
    tokens: int | None,
    top: int,
    seed: int,
    trust: bool,
) -> Told:
    """Raises UserError for what can't be asked, before text or weights are read."""
    if study and (remove or swap):
        raise ConfigError(f"--study {study}: decides itself what is removed and swapped; leave --remove and --swap out")
    traces = {folder: read_trace(Path(folder)) for folder in swap if folder not in SWAPS}
    if traces and (tokens is not None or data != (HELD_OUT,)):
        said = "--data" if tokens is None else "--tokens"
        raise ConfigError(f"{said}: the text is that of --swap {next(iter(traces))}, all of it; leave {said} out")
    subject = subject_of(checkpoint, config, data, trust=trust)
    layers = layers_of(subject.shape)
    _check_traces(traces, subject)
    asked = [] if study else removals(remove or (() if swap else ("all",)), layers, rest)
    asked += swaps(swap, layers, seed, traces)
    if traces:  # which have the text: the checkpoint's own is not read
        first = next(iter(traces.values()))
        text = Text.of((batch for _, batch in trace_batches(first)), first.documents)
        counted = tally(
            subject.model(), text, subject.tokenizer, subject.precision, [one.counterfactual for one in asked]
        )
        return _told(Ablation(asked, counted, str(checkpoint), f"of {', '.join(traces)}"), top)
    source = subject.read(tokens)
    text = Text.of(source.batches, source.documents)
    if study == "rare":
        found = rare(source, text, seed=seed)
        return Told(found.lines(), found.to_json())
    if study == "alternatives":
        other = alternatives(source, text, seed=seed)
        return Told(other.lines(), other.to_json())
    counted = tally(source.model, text, source.tokenizer, source.precision, [one.counterfactual for one in asked])
    return _told(Ablation(asked, counted, str(checkpoint), source.facts["data"]["split"]), top)


def _told(ablation: Ablation, top: int) -> Told:
    return Told(ablation.lines(top), ablation.to_json())


def _check_traces(traces: dict[str, Trace], subject: Subject) -> None:
    """Raise UserError unless they are of one text, and of the checkpoint's layout and tokenizer."""
    for name, other in traces.items():
        check_replayable(other, subject.shape, name)
        first_name, first = next(iter(traces.items()))
        if other.token_id.shape != first.token_id.shape or (other.token_id != first.token_id).any():
            raise ConfigError(f"--swap {name}: is of other text than {first_name}; swap them in separate commands")
        if other.facts["tokenizer"] != subject.tokenizer.fingerprint:
            raise ConfigError(f"--swap {name}: was recorded with another tokenizer than the checkpoint's")
