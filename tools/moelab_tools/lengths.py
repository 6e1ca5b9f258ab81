"""One checkpoint at several lengths: held-out loss by place, whether routing drifts, and whether a key is found."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab.config.run import RunConfig
from moelab.data.batches import ValidationBatches
from moelab.data.corpus import Corpus
from moelab.data.tokenizer import Tokenizer
from moelab.errors import ConfigError
from moelab.nn.transformer import TokenContext, Transformer
from moelab.registry import Registry
from moelab.training.evaluate import TOKENS_AT_ONCE, evaluate
from moelab.training.precision import Precision
from moelab_tools.passkey import make_trials, passkey_accuracy
from moelab_tools.positions import Positions

_LENGTH = re.compile(r"([0-9]*\.?[0-9]+)(x?)")


@dataclass(frozen=True)
class AtLength:
    """What a length gave."""

    length: int  # tokens of a sequence
    times: float  # the trained length
    loss: float  # nats a token
    tokens: int  # that were scored
    beyond: float | None  # the loss of tokens with at least the trained length before them; None: there are none
    positions: dict[str, float]  # tokens before the target -> loss
    drift: dict[str, float]  # MoE layer -> share of assignments that go elsewhere beyond the trained length
    drift_within: dict[str, float]  # the same of the trained length's second half, beside its first
    passkey: dict[str, float]  # depth -> share of keys given back; empty where not asked for
    filled: list[str]  # what the options left out


def parse_lengths(text: str, trained: int) -> list[int]:
    """ "1x,2x,512" -> tokens. Raises ConfigError for what is none."""
    found = []
    for piece in text.split(","):
        match = _LENGTH.fullmatch(piece.strip())
        length = 0 if match is None else round(float(match[1]) * (trained if match[2] else 1))
        if length < 1:
            raise ConfigError(f"--length: '{piece}' is no length; write 1x,2x,4x of the trained one, or tokens: 512")
        found.append(length)
    return found


def at_lengths(
    model: Transformer,
    registry: Registry,
    run: RunConfig,
    corpus: Corpus,
    precision: Precision,
    positions: Positions,
    lengths: str,
    keys: tuple[Tokenizer, int] | None = None,
) -> list[AtLength]:
    """Each length in turn, over about as many tokens. `keys`: trials of each depth of passkey retrieval.

    Raises ConfigError, DataError where the text is too short.
    """
    trained = run.train.sequence_length
    budget, found = run.evaluation.sequences * trained, []
    for length in parse_lengths(lengths, trained):
        filled = positions.apply(model, registry, length, trained)
        sequences, at_once = max(1, budget // length), max(1, TOKENS_AT_ONCE // length)
        batches = ValidationBatches(corpus.validation, sequences, length, at_once, apart=run.data.document_mask)
        evaluation = evaluate(model, batches, precision)
        bins = evaluation.places["position"]
        far = [sums for name, sums in bins.items() if length > trained <= int(name.split("-")[0])]
        tokens = sum(float(sums.tokens.sum()) for sums in far)
        beyond = sum(float(sums.nats.sum()) for sums in far) / tokens if tokens else None
        by_bin = {name: sums.loss() for name, sums in bins.items()}
        scored = int(evaluation.tokens.sum())
        loads = loads_by_place(model, batches, precision, (trained // 2, trained))
        within = {layer: moved(load[0], load[1]) for layer, load in loads.items()}
        drift = {layer: moved(load[0] + load[1], load[2]) for layer, load in loads.items() if length > trained}
        passkey = {}
        if keys is not None:
            trials = make_trials(corpus.validation, keys[0], length, keys[1])
            passkey = passkey_accuracy(model, keys[0], trials)
        found.append(
            AtLength(
                length, length / trained, evaluation.loss(), scored, beyond, by_bin, drift, within, passkey, filled
            )
        )
    return found


@torch.no_grad()
def loads_by_place(
    model: Transformer, batches: ValidationBatches, precision: Precision, borders: tuple[int, int]
) -> dict[str, Tensor]:
    """{MoE layer: assignments [3, E] int64 of tokens before the first border, before the second, and after}."""
    found: dict[str, Tensor] = {}
    model.eval()
    for batch in batches:
        part = batch.to(precision.device)
        context = TokenContext(part.document_id, part.domain_id, attention_id=part.attention_id)
        with precision.autocast():
            records = model(part.input_ids, part.attention_mask, tokens=context, head=False).records
        place = torch.arange(batches.sequence_length).repeat(len(part.input_ids))
        group = (place >= borders[0]).long() + (place >= borders[1])
        for record in records:
            routing = record.routing.compact()
            counts = torch.zeros(3, routing.num_experts, dtype=torch.int64)
            where = (group[routing.token.cpu()], routing.expert.cpu())
            counts.index_put_(where, torch.ones(len(where[0]), dtype=torch.int64), accumulate=True)
            key = str(record.layer_id)
            found[key] = found[key] + counts if key in found else counts
    return found


def moved(before: Tensor, after: Tensor) -> float:
    """Counts [E] twice -> half the sum of differences of their shares: 0 for the same load, 1 for none in common."""
    shares = [counts.double() / counts.sum().clamp(min=1) for counts in (before, after)]
    return float((shares[0] - shares[1]).abs().sum() / 2)


def length_lines(found: Sequence[AtLength]) -> list[str]:
    """A table, and below it the loss by place at the greatest length."""
    lines = list(dict.fromkeys(line for one in found for line in one.filled))
    print("\n".join(lines), file=sys.stderr, end="\n" if lines else "")
    rows = [f"{'length':>8} {'times':>6} {'nats/token':>11} {'beyond the trained length':>26} {'tokens':>9}"]
    for one in found:
        beyond = "-" if one.beyond is None else f"{one.beyond:.4f}"
        rows.append(f"{one.length:>8} {one.times:>5g}x {one.loss:>11.4f} {beyond:>26} {one.tokens:>9}")
    longest = max(found, key=lambda one: one.length)
    rows += ["", f"by tokens before the target, at {longest.length}"]
    rows += [f"{name:>16} {loss:.4f}" for name, loss in longest.positions.items()]
    if any(one.drift_within for one in found):
        rows += ["", "share of assignments that move to other experts, by layer"]
        rows += [f"{'trained':>16} {_layers(found[0].drift_within)}  (its second half beside its first)"]
        rows += [f"{one.length:>16} {_layers(one.drift)}  (beyond the trained length)" for one in found if one.drift]
    if any(one.passkey for one in found):
        rows += ["", "keys given back, by depth"]
        rows += [f"{one.length:>16} {_layers(one.passkey, '.2f')}" for one in found]
    return rows


def _layers(values: dict[str, float], form: str = ".3f") -> str:
    return "  ".join(f"{name}: {value:{form}}" for name, value in values.items())
