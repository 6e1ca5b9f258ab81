"""The learned projection of a router, and the precision in which it decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moelab.moe.contracts import MoEContext
from moelab.moe.routing import TokenInfo
from moelab.moe.surgery import ExpertRows
from moelab.seeds import derive_seed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class GateOptions:
    """Precision of a router. In bfloat16 near-ties choose other experts, so everything is float32 unless asked."""

    parameter_dtype: str = "float32"  # float32: stays so under model.to(bfloat16); model: follows the model
    projection_dtype: str = "float32"  # of W x: float32, bfloat16, float16, or input (that of x, as Hugging Face does)
    score_dtype: str = "float32"  # of the softmax or sigmoid
    output_dtype: str = "float32"  # the weights are rounded to it

    def __post_init__(self) -> None:
        legal = {"parameter_dtype": ("float32", "model"), "projection_dtype": (*DTYPES, "input")}
        for key in ("parameter_dtype", "projection_dtype", "score_dtype", "output_dtype"):
            allowed = legal.get(key, tuple(DTYPES))
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, not '{getattr(self, key)}'")


class LinearRouter(nn.Module):
    """Base of the routers that project x by one matrix `weight` [E', D], Hugging Face's `mlp.gate.weight`.

    A subclass with other tensors that have a row for each expert names them in `row_tensors`.
    """

    row_tensors: tuple[str, ...] = ("weight", "gate_bias", "bias")  # where there are such
    equal_rows: str | None = None  # `ExpertRows.copies`
    shared_rows: tuple[str, ...] = ()  # `ExpertRows.shared`

    def __init__(self, options: GateOptions, context: MoEContext, num_choices: int | None = None) -> None:
        super().__init__()
        self.precision = options
        self.num_experts = context.num_experts
        self.top_k = context.num_experts_per_tok
        self.layer_id = context.layer_id
        self.weight = nn.Parameter(torch.empty(num_choices or context.num_experts, context.hidden_size))

    @property
    def expert_rows(self) -> ExpertRows | str:
        """What surgery on the experts does to its tensors."""
        if "table" in self._buffers:  # its values are experts
            return "its table deals token ids to all experts at once; start a new run with another table"
        rows = (name for name in self.row_tensors if isinstance(getattr(self, name, None), Tensor))
        return ExpertRows(tuple(rows), self.equal_rows, self.shared_rows)

    def logits(self, x: Tensor) -> Tensor:
        """x [T, D] -> W x, [T, E'], in float32 or wider whatever the precision of the product was."""
        return project(x, self.weight, self.precision.projection_dtype)

    def score(self, logits: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function` of logits [T, E'] in the precision of scores -> [T, E'] float32 or wider."""
        narrow = self.precision.score_dtype
        return function(logits if narrow == "float32" else logits.to(DTYPES[narrow])).to(logits.dtype)

    def round_weight(self, weight: Tensor) -> Tensor:
        """Weights as a router of this output precision would hand them on; float32 itself stays the carrier."""
        narrow = self.precision.output_dtype
        return weight if narrow == "float32" else weight.to(DTYPES[narrow]).to(weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = set() if self.precision.parameter_dtype == "model" else {id(p) for p in self._parameters.values()}
        return super()._apply(keeping_float32(fn, kept | {id(b) for b in self._buffers.values()}), recurse)


def project(x: Tensor, weight: Tensor, dtype: str = "float32") -> Tensor:
    """x [T, D], weight [E, D] -> x weight^T [T, E], float32 or wider; autocast does not reach it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    chosen = {"float32": wide, "input": x.dtype}.get(dtype) or DTYPES[dtype]
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.linear(x.to(chosen), weight.to(chosen)).to(wide)


def keeping_float32(fn: Callable[[Tensor], Tensor], kept: set[int]) -> Callable[[Tensor], Tensor]:
    """`fn` of Module.to() and its kind, except that tensors with an id in `kept` never become narrower than float32.

    A bias that moves by 1e-3 a step stands still in bfloat16 once it is near 1.
    """

    def moved(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        if id(tensor) in kept and out.is_floating_point() and out.dtype.itemsize < 4 <= tensor.dtype.itemsize:
            return tensor.to(out.device)
        return out

    return moved


def noise_generator(info: TokenInfo, layer_id: int, device: torch.device) -> torch.Generator | None:
    """A stream for this layer and micro-batch alone; None (torch's global stream) when the batch brought none.

    Made from the batch's seed and not drawn from its state, so that recomputing a layer in the
    backward pass sees the same noise.
    """
    if info.generator is None:
        return None
    return torch.Generator(device).manual_seed(derive_seed(info.generator.initial_seed(), "router", layer_id))
