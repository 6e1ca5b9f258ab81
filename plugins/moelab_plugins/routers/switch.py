"""One expert for each token: the Switch Transformer's router."""

from __future__ import annotations

from dataclasses import dataclass

from moelab import Component, ConfigError, MoEContext, Router, component, hookimpl
from moelab.moe.selection import softmax_score
from moelab.moe.topk import TopKOptions, TopKRouter


@dataclass
class SwitchOptions(TopKOptions):
    input_jitter: float = 0.01
    drop_policy: str = "position"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_topk_prob:
            raise ValueError("norm_topk_prob must be false: one normalised weight is always 1, and nothing would train")


class Switch(TopKRouter):
    """The single best expert, weighted by its probability.

    Formula: p = softmax(W (x * u)), u ~ U(1 - input_jitter, 1 + input_jitter) in training; w = max p.
    Source: Switch Transformer (2101.03961) 2.1, 2.4. There capacity_factor is 1.25 in training; here dropless unless
    it is given, as dropping makes a token's output depend on later ones. Its experts are two matrices with ReLU:
    `model.activation: {name: relu}`, as the recipe has it.
    Use: the cheapest mixture of experts, with load_balance at weight 0.01, which 2.2 adds for each layer: convention
    mesh.
    Cost: one expert a token.
    """

    def __init__(self, options: SwitchOptions, context: MoEContext) -> None:
        if context.num_experts_per_tok != 1:
            raise ConfigError(
                f"takes one expert a token, and the layout says num_experts_per_tok {context.num_experts_per_tok}; "
                "use softmax_topk for more"
            )
        super().__init__(options, context, softmax_score)

    def qwen2_moe_fields(self) -> dict[str, bool] | str:
        return self.plain_topk_differs() or {"norm_topk_prob": False}


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("switch", SwitchOptions, Switch)]
