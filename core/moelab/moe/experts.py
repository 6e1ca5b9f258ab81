"""The weights of all routed experts of one layer. Every backend computes on these same parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moelab.moe.activation import Activation, SwiGLU, activate, num_inputs
from moelab.moe.layout import ExpertLayout
from moelab.moe.routing import Routing


class ExpertBank(nn.Module):
    """E experts of width F: expert e is down_e(activation(gate_e x, up_e x)), or down_e(activation(up_e x)).

    gate_up [E, M F, D], M = 2 where the activation is gated: rows 0..F-1 of an expert are its gate, F..2F-1 its up
    projection. M = 1 where it is not: its up projection alone.
    down [E, F, D]: one row a neuron, the transpose of Hugging Face's down_proj.
    So neuron f of a gated expert e is gate_up[e, f], gate_up[e, F + f], down[e, f], each [D] and contiguous.
    gate_up_bias [E, M F] and down_bias [E, D], or None.
    """

    INPUT_FIRST = ("down",)  # of its matrices, which hold what they read along the rows

    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self, layout: ExpertLayout, hidden_size: int, activation: Activation | None = None, *, bias: bool = False
    ) -> None:
        """`hidden_size`: of what the experts read and write. `activation` None: SwiGLU."""
        super().__init__()
        self.activation = activation or SwiGLU()
        experts, width, rows = layout.num_experts, layout.moe_intermediate_size, num_inputs(self.activation)
        self.gate_up = nn.Parameter(torch.empty(experts, rows * width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts, width, hidden_size))
        biases = (torch.empty(experts, rows * width), torch.empty(experts, hidden_size)) if bias else (None, None)
        for name, values in zip(("gate_up_bias", "down_bias"), biases, strict=True):
            self.register_parameter(name, None if values is None else nn.Parameter(values))

        self._expert_widths = layout.expert_widths

    def forward(self, x: Tensor, routing: Routing, backend: Callable[[Tensor, Routing, ExpertBank], Tensor]) -> Tensor:
        """x [T, D] -> [T, D]. A backend is called through here, so that whoever cuts the parameters sees them used."""
        return backend(x, routing, self)

    def activate(self, pre: Tensor) -> Tensor:
        """The activation of what gate_up gave: [..., M F] -> [..., F]."""
        parts = num_inputs(self.activation)
        width = pre.shape[-1] // parts
        hidden = activate(self.activation, pre.reshape(pre.shape[:-1].numel(), parts, width))
        return hidden if pre.dim() == 2 else hidden.view(*pre.shape[:-1], width)

    def of_one(self, expert: int, rows: Tensor) -> Tensor:
        """One expert's output for rows [n, D] -> [n, D], in the dtype of `rows`: for who looks at a single one."""
        pre = rows @ self.gate_up[expert].t().to(rows.dtype)
        if self.gate_up_bias is not None:
            pre = pre + self.gate_up_bias[expert].to(rows.dtype)
        y = self.activate(pre) @ self.down[expert].to(rows.dtype)
        return y if self.down_bias is None else y + self.down_bias[expert].to(rows.dtype)

    @torch.no_grad()
    def trim(self, gate_up: Tensor, down: Tensor, first: int = 0) -> None:
        """Zero the neurons beyond each expert's own width: all of one zero, it has no gradient and stays so.

        gate_up [e, M F, D] and down [e, F, D] are those of e experts from the `first` on. Biases start at zero.
        """
        if self._expert_widths is None:
            return
        widths = torch.tensor(self._expert_widths[first : first + down.shape[0]], device=down.device)
        beyond = torch.arange(self.moe_intermediate_size, device=down.device) >= widths[:, None]  # [e, F]
        down.masked_fill_(beyond.unsqueeze(-1), 0.0)
        gate_up.masked_fill_(beyond.repeat(1, num_inputs(self.activation)).unsqueeze(-1), 0.0)

    @property
    def num_experts(self) -> int:
        return self.down.shape[0]

    @property
    def moe_intermediate_size(self) -> int:
        return self.down.shape[1]

    @property
    def hidden_size(self) -> int:
        """Of what the experts read and write."""
        return self.down.shape[2]

    def extra_repr(self) -> str:
        experts, width, hidden = self.down.shape
        return f"num_experts={experts}, moe_intermediate_size={width}, hidden_size={hidden}"


class BankView(ExpertBank):
    """A bank's tensors, each changed, under the names that backends read. Owns no parameters."""

    def __init__(self, bank: ExpertBank, change: Callable[[Tensor], Tensor]) -> None:
        nn.Module.__init__(self)
        held = {name: getattr(bank, name) for name in ("gate_up", "down", "gate_up_bias", "down_bias")}
        changed = {name: None if tensor is None else change(tensor) for name, tensor in held.items()}
        self.__dict__.update(changed, activation=bank.activation)


def add_up_bias(pre: Tensor, expert: Tensor, bank: ExpertBank) -> Tensor:
    """pre [n, M F] of rows that go to expert [n] int64, with their experts' biases."""
    bias = bank.gate_up_bias
    return pre if bias is None else pre + bias.to(pre.dtype).index_select(0, expert)


def add_down_bias(y: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
    """y [T, D] with the weighted biases of each token's experts: one small product, whatever computed y."""
    bias = bank.down_bias
    if bias is None:
        return y
    weights = routing.weight.new_zeros(routing.num_tokens, routing.num_experts)
    weights = weights.index_put((routing.token, routing.expert), routing.weight, accumulate=True)  # [T, E]
    return y + weights.to(y.dtype) @ bias.to(y.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matmul of `x` runs in: autocast's when it is on, as nn.Linear would."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
