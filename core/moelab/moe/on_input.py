"""Weights on what experts see, not on what they give: each assignment as a token of its own.

T tokens, N assignments, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moelab.moe.experts import ExpertBank
from moelab.moe.routing import Routing

Compute = Callable[[Tensor, Routing, ExpertBank], Tensor]


def weigh_inputs(compute: Compute) -> Compute:
    """`compute`, a backend with whatever is around it, for routings of either kind (`Routing.weights_on_input`).

    y_t = sum over t's assignments of f_e(w x_t), as transformers' Llama4TextMoe has it. No backend need know of it: it
    is given w x [N, D] and a routing that sends row n to its one expert with weight one.
    """

    def call(x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        if not routing.weights_on_input:
            return compute(x, routing, bank)
        weight = routing.weight.to(x.dtype).unsqueeze(-1)
        top_k = routing.top_k  # where there is one, rows of a token lie together, and a sum needs no scattering
        spread = x.index_select(0, routing.token) if top_k is None else x.repeat_interleave(top_k, 0)  # [N, D]
        alone = Routing.from_topk(
            routing.expert.unsqueeze(-1), torch.ones_like(routing.weight).unsqueeze(-1), routing.num_experts
        )
        rows = compute(spread * weight, alone, bank)
        if routing.served is not None:  # an expert with biases gives something for nothing
            rows = rows * routing.served.unsqueeze(-1)
        if top_k is not None:
            return rows.view(routing.num_tokens, top_k, rows.shape[-1]).sum(1)
        return rows.new_zeros(routing.num_tokens, rows.shape[-1]).index_add(0, routing.token, rows)

    return call
