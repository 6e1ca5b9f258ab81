"""What a device sends in a training step: a step's problem, and the bytes of its collectives, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moelab.nn.count import expected_assignments, moe_blocks
from moelab.nn.transformer import Transformer


@dataclass(frozen=True)
class Problem:
    """What runs on each device."""

    sequences: int  # of one micro-batch
    sequence_length: int
    dtype: torch.dtype = torch.float32  # of the matmuls
    device: str = "cuda"  # or cpu
    devices: int = 1  # data parallel; parameters, gradients and optimizer sharded over all of them
    expert_parallel: int = 1  # of these devices, how many share one set of experts
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length


@dataclass(frozen=True)
class CommunicationPlan:
    """Bytes that one device sends in a step of one micro-batch."""

    gather_parameters: int  # all-gather, forward and backward
    reduce_gradients: int  # reduce-scatter
    exchange_tokens: int  # all-to-all to the experts and back, forward and backward

    @property
    def total(self) -> int:
        return self.gather_parameters + self.reduce_gradients + self.exchange_tokens


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of parameters."""

    total: int
    routed: int


def communication(model: Transformer, sizes: ModelSizes, problem: Problem) -> CommunicationPlan:
    """Bytes of one step. Ring collectives: each device sends (n - 1) / n of what is gathered or reduced.

    Tokens go to as many experts as the routers declare (`Router.expected_assignments`).
    """
    width, groups = problem.dtype.itemsize, problem.expert_parallel
    shared, routed = sizes.total - sizes.routed, sizes.routed // groups
    copies = problem.devices // groups  # devices that hold the same experts

    def ring(elements: int, count: int) -> int:
        return elements * width * (count - 1) // count

    once = ring(shared, problem.devices) + ring(routed, copies)
    assignments = sum(expected_assignments(block).per_token for block in moe_blocks(model))
    exchanged = round(problem.tokens * assignments * model.config.hidden_size)
    passes = 4  # to the experts and back, forward and backward
    return CommunicationPlan(2 * once, once, passes * ring(exchanged, groups))


def model_sizes(model: Transformer) -> ModelSizes:
    total = sum(parameter.numel() for parameter in model.parameters())
    return ModelSizes(total, sum(p.numel() for block in moe_blocks(model) for p in block.experts.parameters()))
