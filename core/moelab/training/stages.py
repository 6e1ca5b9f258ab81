"""A run in stages: what each has of its own, ready before the first step.

Weights, moments, step numbers and the schedule go on across a border; batches, held-out windows, positions, rate and
what a token costs are the stage's. Its batches are those that a run of its kind reads at these steps, so that two
stages alike are one run, bit for bit; where lengths differ, so does the order, and what the stage before has read may
come again. Of a mixer in a stage, `until` counts from the run's beginning, and its account from the stage's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from moelab.builder import positional_parts
from moelab.config.run import RunConfig
from moelab.config.stages import in_stage, spans
from moelab.data.batches import ValidationBatches
from moelab.data.corpus import Corpus
from moelab.data.mixing import matching
from moelab.data.packing import PackedBatches
from moelab.errors import ConfigError, DataError
from moelab.nn.attention_inputs import AttentionKernel
from moelab.nn.count import ServedCosts, flops_per_token, served_costs
from moelab.nn.rope import RopeScaling
from moelab.nn.transformer import Transformer
from moelab.plugin_faults import plugins_told
from moelab.registry import Registry
from moelab.training.evaluate import evaluation_batch_size
from moelab.training.mixture import Batches, build_batches, mixture_facts
from moelab.training.precision import Precision
from moelab.training.rehearsal import PROBE_TOKENS, no_trace


@dataclass(frozen=True)
class Stage:
    """Steps `first` .. `end` - 1 of a run."""

    name: str
    first: int
    end: int
    config: RunConfig  # the run's, as it is here
    batches: Batches
    validation: ValidationBatches
    kernels: list[AttentionKernel | None]
    scaling: RopeScaling | None

    def costs(self, model: Transformer) -> tuple[float, ServedCosts]:
        """What a token costs, as declared and as served."""
        length = self.config.train.sequence_length
        return flops_per_token(model, length), served_costs(model, length)

    def facts(self, model: Transformer) -> dict[str, Any]:
        """What summary.json tells of it."""
        train, placed = self.config.train, self.config.model
        packed = {"packing": asdict(self.batches.fill)} if isinstance(self.batches, PackedBatches) else {}
        return {
            "name": self.name, "first_step": self.first, "steps": self.end - self.first,
            "sequence_length": train.sequence_length, "batch_size": train.batch_size, "rope_theta": placed.rope_theta,
            "rope_scaling": placed.rope_scaling, "max_position_embeddings": placed.max_position_embeddings,
            "lr": self.config.optimizer.lr, "flops_per_token": self.costs(model)[0],
            "mixture": mixture_facts(self.batches, self.end, self.first), **packed,
        }  # fmt: skip

    def line(self) -> str:
        """What is told of it in the log."""
        train, placed = self.config.train, self.config.model
        packed = f"; packed, {self.batches.fill.line()}" if isinstance(self.batches, PackedBatches) else ""
        return (
            f"'{self.name}', after step {self.first} up to step {self.end}: {train.batch_size} sequences of "
            f"{train.sequence_length} tokens, rope_theta {placed.rope_theta:g}, rope_scaling "
            f"{(placed.rope_scaling or {}).get('name', 'none')}, lr {self.config.optimizer.lr:g}{packed}"
        )


def build_stages(config: RunConfig, corpus: Corpus, registry: Registry) -> tuple[Stage, ...]:
    """Of a resolved config; () without any. Raises UserError naming the stage in which something can't be."""
    stages = []
    for number, (first, end) in enumerate(spans(config)):
        name, own = config.stages[number].name, in_stage(config, number)
        try:
            batches, validation = build_batches(own, corpus, registry, (first, end)), held_out(own, corpus)
            stages.append(Stage(name, first, end, own, batches, validation, *positional_parts(own.model, registry)))
        except (ConfigError, DataError) as error:
            raise type(error)(f"stages.{number}: in stage '{name}', {error}") from error
    return tuple(stages)


def held_out(config: RunConfig, corpus: Corpus) -> ValidationBatches:
    """The windows on which a run, or a stage, is evaluated: of the length that it trains on."""
    return ValidationBatches(
        corpus.validation,
        config.evaluation.sequences,
        config.train.sequence_length,
        evaluation_batch_size(config),
        apart=config.data.document_mask,
        among=_scored(config.evaluation.domains, corpus.domains),
    )


def _scored(patterns: list[str] | None, domains: list[str]) -> np.ndarray | None:
    """-> [domains] bool. Raises ConfigError for a pattern that names none."""
    if patterns is None:
        return None
    try:
        chosen = matching(patterns, domains)
    except ConfigError as error:
        raise ConfigError(f"evaluation.{error}") from error
    return np.isin(domains, chosen)


def rehearse(model: Transformer, stages: tuple[Stage, ...], precision: Precision) -> None:
    """Take every stage's positions once, last to first, so that an attention or a scaling fails before the run does."""
    for stage in reversed(stages):
        take_positions(model, stage)
        part = stage.batches.batch(stage.first).split(1)[0].narrow(PROBE_TOKENS).to(precision.device)
        with no_trace(model), plugins_told(), precision.autocast(), torch.no_grad():
            model.eval()(part.input_ids, part.attention_mask, head=False)


def take_positions(model: Transformer, stage: Stage) -> None:
    """Compute with the stage's attention and rotary embedding from now on."""
    model.take_positions(stage.config.model, stage.kernels, stage.scaling)


def documents_read(stages: Sequence[Stage], steps: int) -> np.ndarray:
    """[n] bool: the documents of which the batches before `steps` held a token.

    Of a later stage too many rather than too few: those as well that its order has before its first step.
    """
    begun = [stage for stage in stages if stage.first < max(steps, 1)]
    return np.logical_or.reduce([stage.batches.documents_read(min(steps, stage.end)) for stage in begun])
