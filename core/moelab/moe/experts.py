"""The weights of all routed experts of one layer. Every backend computes on these same parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moelab.moe.layout import ExpertLayout
from moelab.moe.routing import Routing


class ExpertBank(nn.Module):
    """E SwiGLU experts of width F: expert e is down_e(silu(gate_e x) * up_e x).

    gate_up [E, 2F, D]: rows 0..F-1 of an expert are its gate, F..2F-1 its up projection.
    down [E, F, D]: one row a neuron, the transpose of Hugging Face's down_proj.
    So neuron f of expert e is gate_up[e, f], gate_up[e, F + f], down[e, f], each [D] and contiguous.
    """

    def __init__(self, layout: ExpertLayout, hidden_size: int) -> None:
        super().__init__()
        experts, width = layout.num_experts, layout.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts, width, hidden_size))

        self._expert_widths = layout.expert_widths

    def forward(self, x: Tensor, routing: Routing, backend: Callable[[Tensor, Routing, ExpertBank], Tensor]) -> Tensor:
        """x [T, D] -> [T, D]. A backend is called through here, so that whoever cuts the parameters sees them used."""
        return backend(x, routing, self)

    @torch.no_grad()
    def trim(self, gate_up: Tensor, down: Tensor, first: int = 0) -> None:
        """Zero the neurons beyond each expert's own width: gate, up and down all zero have no gradient and stay so.

        gate_up [e, 2F, D] and down [e, F, D] are those of e experts from the `first` on.
        """
        if self._expert_widths is None:
            return
        widths = torch.tensor(self._expert_widths[first : first + down.shape[0]], device=down.device)
        beyond = torch.arange(self.moe_intermediate_size, device=down.device) >= widths[:, None]  # [e, F]
        down.masked_fill_(beyond.unsqueeze(-1), 0.0)
        gate_up.masked_fill_(beyond.repeat(1, 2).unsqueeze(-1), 0.0)

    @property
    def num_experts(self) -> int:
        return self.down.shape[0]

    @property
    def moe_intermediate_size(self) -> int:
        return self.down.shape[1]

    def extra_repr(self) -> str:
        experts, width, hidden = self.down.shape
        return f"num_experts={experts}, moe_intermediate_size={width}, hidden_size={hidden}"


class BankView(ExpertBank):
    """Given tensors under the names that backends read: gate_up [e, 2F, D], down [e, F, D]. Owns no parameters."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(gate_up=gate_up, down=down)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2F], gate first -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matmul of `x` runs in: autocast's when it is on, as nn.Linear would."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
