"""Fewer experts: like ones become one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from omegaconf import MISSING

from moelab import Component, ConfigError, Evidence, LayerPlan, NewExpert, Surgery, SurgeryContext, component, hookimpl
from moelab_plugins.surgeries import _grouping as grouping
from moelab_plugins.surgeries._counts import check_top_k

BY = ("outputs", "weights", "router", "coactivation")
GROUPINGS, SHARES = ("hierarchical", "dominant"), ("load", "even")


@dataclass
class MergeOptions:
    num_experts: int = MISSING  # after it
    by: str = "outputs"  # alike by mean output (HC-SMoE), weights, rows of the router, or by being chosen together
    grouping: str = "hierarchical"  # hierarchical (HC-SMoE, average linkage) or dominant (M-SMoE)
    shares: str = "load"  # of the mean: by load, as both papers weigh, or even
    align: bool = True  # lay each expert's neurons onto those of its group's busiest first, by their weights
    num_experts_per_tok: int | None = None  # null: as it is

    def __post_init__(self) -> None:
        for key, known in (("by", BY), ("grouping", GROUPINGS), ("shares", SHARES)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key} must be one of {', '.join(known)}, not '{getattr(self, key)}'")


class Merge:
    """Groups of like experts become their mean, weighted by load, the neurons of each first laid onto the busiest's.

    Not exact, but for copies: experts with equal neurons and rows, and K divided by as many as there are.

    Formula: W = sum_j c_j P_j W_j with c_j = load_j / sum of the group's; the router's row is the same mean without
    P_j; exp_avg is the sum of theirs, and exp_avg_sq too, as far as gradients of different tokens are uncorrelated.
    Source: HC-SMoE (2410.08589, abstract opened; wazenmai/HC-SMoE bd77eba: mean outputs over all tokens, hierarchical
    clustering, usage-weighted mean) and M-SMoE (2310.01334, abstract opened; UNITES-Lab/MC-SMoE 4a195b1: the most used
    experts as centres, alignment by weights for T5). Departure: both keep all E rows of the router and point several at
    one expert, which a bank of G experts with G rows can't say; REAP (2510.13999) shows what even that loses. Theirs
    measures similarity of router logits by default, here of rows. coactivation is no paper's.
    Use: less memory where experts are alike (expert_similarity in the log); elsewhere prune.
    Cost: outputs: every expert on every token of the text. align: O(F^3) for each expert.
    """

    def __init__(self, options: MergeOptions, context: SurgeryContext) -> None:
        self.options, self.context, layout = options, context, context.layout
        if not 1 <= options.num_experts < layout.num_experts:
            raise ConfigError(
                f"num_experts: {options.num_experts} of {layout.num_experts} stay; give 1 .. {layout.num_experts - 1}"
            )
        if options.by == "router" and "weight" not in context.rows.tensors:
            raise ConfigError(
                f"by: router needs a router with a row for each expert, which layer {context.layer_id}'s isn't"
            )
        self.top_k = check_top_k(options.num_experts_per_tok, layout.num_experts_per_tok, options.num_experts)
        measured = {"outputs": "outputs", "coactivation": "together"}.get(options.by)
        self.needs = frozenset({"load"} | ({measured} if measured else set()))

    def plan(self, evidence: Evidence) -> LayerPlan:
        options, layout = self.options, self.context.layout
        load = evidence.measured("load")
        distance = self._distance(evidence)
        if options.grouping == "dominant":
            groups = grouping.around_dominant(distance, load, options.num_experts)
        else:
            groups = grouping.average_linkage(distance, options.num_experts)
        experts = tuple(self._merged(group, load, evidence) for group in groups)
        told = "; ".join(" + ".join(map(str, group)) for group in groups if len(group) > 1)
        because = f"a mean of experts is another expert ({told})"
        return LayerPlan(experts, self.top_k, layout.moe_intermediate_size, False, because)

    def _merged(self, group: list[int], load: np.ndarray, evidence: Evidence) -> NewExpert:
        if len(group) == 1:
            return NewExpert((group[0],))
        total = load[group].sum()
        even = self.options.shares == "even" or total == 0
        shares = [1 / len(group)] * len(group) if even else (load[group] / total).tolist()
        shares[-1] = 1 - sum(shares[:-1])
        if not self.options.align:
            return NewExpert(tuple(group), tuple(shares))
        matrices = [self._neurons(evidence, expert) for expert in group]
        leader = int(np.argmax(load[group]))
        neurons = tuple(grouping.matching(matrices[leader] @ own.T) for own in matrices)
        return NewExpert(tuple(group), tuple(shares), neurons)

    def _distance(self, evidence: Evidence) -> np.ndarray:
        if self.options.by == "outputs":
            return grouping.euclidean_distances(evidence.measured("outputs"))
        if self.options.by == "coactivation":
            return grouping.seldom_together(evidence.measured("together"))
        if self.options.by == "router":
            rows = evidence.read("router.weight")[: self.context.layout.num_experts]
            return grouping.cosine_distances(rows.double().numpy())
        flat = [evidence.read(f"experts.{name}").double().flatten(1).numpy() for name in ("gate_up", "down")]
        return grouping.cosine_distances(np.concatenate(flat, axis=1))

    def _neurons(self, evidence: Evidence, expert: int) -> np.ndarray:
        """[F, n]: all weights of each neuron of an expert in a row."""
        width = self.context.layout.moe_intermediate_size
        first = evidence.read("experts.gate_up")[expert].double()
        blocks = first.view(-1, width, first.shape[-1]).transpose(0, 1).flatten(1)  # [F, blocks * D]
        down = evidence.read("experts.down")[expert].double()
        return np.concatenate([blocks.numpy(), down.numpy()], axis=1)


@hookimpl
def moelab_surgeries() -> list[Component[SurgeryContext, Surgery]]:
    return [component("merge", MergeOptions, Merge)]
