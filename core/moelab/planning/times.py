"""How long a step takes on a machine: its products and its collectives, by the usual model of latency and bandwidth.

Two bounds, since what overlaps depends on the machine: nothing does, and everything does. FSDP fetches parameters
ahead and reduces gradients behind; the exchange of tokens waits in every layer, since the next product needs them.

Left out: the optimizer, norms, softmax, the memory's own time, imbalance between experts and between devices, and the
host. So the bounds are of a machine at its best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moelab.nn.count import flops_per_token, forward_flops_per_token
from moelab.nn.loss import keeps_logits
from moelab.nn.transformer import Transformer
from moelab.planning.machine import Machine
from moelab.planning.traffic import EXCHANGE, SUM, Collective, CommunicationPlan, Problem


@dataclass(frozen=True)
class Times:
    """Seconds of a step on each device."""

    compute: float
    communication: dict[str, float]  # what -> seconds; empty on one device
    tokens: int  # of all devices
    flops: float  # of the model on one device: forward and backward, nothing twice
    peak: float  # FLOP/s of a device

    @property
    def apart(self) -> float:
        """Nothing overlaps."""
        return self.compute + sum(self.communication.values())

    @property
    def together(self) -> float:
        """All of computing and sending overlaps, but one device has one way out."""
        return max(self.compute, sum(self.communication.values()))

    def utilisation(self, seconds: float) -> float:
        """Of the peak, by the model's own FLOPs (MFU, PaLM 2204.02311 appendix B)."""
        return self.flops / seconds / self.peak


def times_of(
    model: Transformer, problem: Problem, sent: CommunicationPlan, machine: Machine, counts_before: bool
) -> Times:
    """The bounds of a step; `counts_before`: a pass without gradients goes before it."""
    length, tokens = problem.sequence_length, problem.tokens * problem.micro_batches
    flops = flops_per_token(model, length)
    done = tokens * (flops + computed_again(model, problem, counts_before))
    seconds: dict[str, float] = {}
    for one in sent.collectives:
        seconds[one.what] = seconds.get(one.what, 0.0) + seconds_of(one, machine)
    compute = done / (machine.reached or machine.peak)
    return Times(compute, seconds, tokens * problem.parallel.world, tokens * flops, machine.peak)


def computed_again(model: Transformer, problem: Problem, counts_before: bool) -> float:
    """FLOPs of a token beside the model's own: layers and logits that are not kept, a pass that counts beforehand."""
    logits = 2 * model.lm_head.weight.numel()
    kept = keeps_logits(problem.tokens * model.config.vocab_size, problem.recompute_logits)
    layers = forward_flops_per_token(model, problem.sequence_length) - logits
    twice = sum(map(problem.recomputes, range(len(model.layers)))) / len(model.layers)
    return layers * (twice + counts_before) + (0 if kept else logits)


def seconds_of(one: Collective, machine: Machine) -> float:
    """Of all calls, n devices of which q lie in one node; A bytes that a ring sends, S exchanged.

    A ring through several nodes has as many ways out of a node as devices in it, so it runs at the slower of a device's
    way inside and q ways between: A / min(inside, q * between), and n - 1 messages, of which one a node goes out. A sum
    of few bytes goes up and down a tree. An exchange sends (q - 1) / n of S inside and the rest on the device's own way
    out, both at once, and waits for one message.
    """
    inside = _in_one_node(one, machine)
    if one.kind == EXCHANGE:
        near = one.size * (inside - 1) / one.ranks / machine.inside
        far = one.size * (one.ranks - inside) / one.ranks / machine.between if inside < one.ranks else 0.0
        latency = machine.latency_between if inside < one.ranks else machine.latency_inside
        return max(near, far) + one.calls * latency
    whole = inside == one.ranks
    bandwidth = machine.inside if whole else min(machine.inside, inside * machine.between)
    if inside == 1:
        bandwidth = machine.between
    nodes = one.ranks // inside
    out, steps = nodes - 1, one.ranks - 1
    if one.kind == SUM:
        out, steps = 2 * math.ceil(math.log2(nodes)), 2 * math.ceil(math.log2(one.ranks))
    latency = out * machine.latency_between + max(0, steps - out) * machine.latency_inside
    return one.sent / bandwidth + one.calls * latency


def _in_one_node(one: Collective, machine: Machine) -> int:
    """How many devices of a group lie in one node."""
    return min(one.ranks, max(1, machine.node // one.stride))
