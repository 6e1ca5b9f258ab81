"""`moelab ablate` behind its options: what is asked, on which text, and what comes out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.atomic import write_file
from moelab.errors import ConfigError, UserError
from moelab.routes.files import read_trace
from moelab.routes.replay import check_replayable, trace_batches
from moelab.routes.trace import Trace
from moelab_tools.routes.ablation import Ablation
from moelab_tools.routes.alternatives_study import alternatives
from moelab_tools.routes.asked import SWAPS, layers_of, removals, swaps
from moelab_tools.routes.effects import Text, tally
from moelab_tools.routes.rare_study import rare
from moelab_tools.routes.source import Source, Subject, subject_of

NUMBERS = "ablation.json"


@dataclass(frozen=True)
class Told:
    """What a command prints, and what it writes."""

    lines: list[str]
    json: dict[str, Any]

    def write(self, folder: Path) -> None:
        """ablation.json, whole or not at all."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / NUMBERS, json.dumps(self.json, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--out {folder}: can't be written ({error.strerror}); choose another folder") from error


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
    subject = subject_of(checkpoint, config, data, trust=trust)
    layers = layers_of(subject.shape)
    _check_traces(traces, subject)
    asked = [] if study else removals(remove or (() if swap else ("all",)), layers, rest)
    asked += swaps(swap, layers, seed, traces)
    source = subject.read(tokens)
    text = _text(source, traces)
    if study == "rare":
        found = rare(source, text, seed=seed)
        return Told(found.lines(), found.to_json())
    if study == "alternatives":
        other = alternatives(source, text, seed=seed)
        return Told(other.lines(), other.to_json())
    counted = tally(source.model, text, source.tokenizer, source.precision, [one.counterfactual for one in asked])
    split = f"of {', '.join(traces)}" if traces else source.facts["data"]["split"]
    ablation = Ablation(asked, counted, str(checkpoint), split)
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


def _text(source: Source, traces: dict[str, Trace]) -> Text:
    """The text of the traces, which is one, or the source's own."""
    if not traces:
        return Text.of(source.batches, source.documents)
    first = next(iter(traces.values()))
    return Text.of((batch for _, batch in trace_batches(first)), first.documents)
