"""The learned projection of a router: its form, its start, and the precision in which it decides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moelab.errors import ConfigError
from moelab.moe.contracts import MoEContext
from moelab.moe.routing import TokenInfo
from moelab.moe.surgery import ExpertRows
from moelab.moe.thin_product import joined_product
from moelab.seeds import derive_seed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GATES = ("linear", "cosine")
STARTS = ("normal", "unit_rows", "orthogonal")
FIRST_SCALE, LARGEST_SCALE = (
    2.0,
    100.0,
)  # of cosines: 1 / 0.5 at the start, 1 / 0.01 at most (Tutel's init_t, clamp_max)


@dataclass
class GateOptions:
    """What a router projects x by, how that starts, and its precision.

    In bfloat16 near-ties choose other experts, so everything is float32 unless asked.
    """

    gate: str = "linear"  # linear: W x; cosine: learned scale times cos(P x + p, row of W) (X-MoE 2204.09179)
    cosine_size: int = 256  # gate=cosine: numbers that P projects x to
    gate_bias: bool = False  # gate=linear: W x + b, with b learned and 0 at the start (gpt-oss)
    # Of W at the start: normal, N(0, initializer_range); unit_rows, the same with each row scaled to length one;
    # orthogonal, orthonormal rows.
    start: str = "normal"
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
        for key, known in (("gate", GATES), ("start", STARTS)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key} must be one of {', '.join(known)}, not '{getattr(self, key)}'")
        if self.cosine_size < 1:
            raise ValueError(f"cosine_size must be at least 1, not {self.cosine_size}")
        if self.gate == "cosine" and self.gate_bias:
            raise ValueError("gate_bias needs gate=linear: a cosine's projection has a bias of its own")


class LinearRouter(nn.Module):
    """Base of the routers that project x by a matrix `weight` [E', D], Hugging Face's `mlp.gate.weight`.

    With gate=cosine it is [E', C], the experts' embeddings: z_i = s cos(P x + p, W_i), s = min(exp(a), 100) learned
    from 2 on. X-MoE (2204.09179) 3.3 (section not opened), as Tutel has it (gates/cosine_top.py); there P starts as
    torch's Linear, here as every matrix does.
    Rows that start of one length draw tokens alike: Qwen3-Next normalises its router's parameters at the start (as
    announced; how, was not said), and SimBal (2506.14038, not opened) starts from orthonormal ones.
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
        choices, hidden = num_choices or context.num_experts, context.hidden_size
        width = options.cosine_size if options.gate == "cosine" else hidden
        if options.start == "orthogonal" and choices > width:
            raise ConfigError(f"start: {choices} rows of {width} numbers can't be orthogonal; take unit_rows")
        self.weight = nn.Parameter(torch.empty(choices, width))
        self.gate_bias = nn.Parameter(torch.zeros(choices)) if options.gate_bias else None
        self.projection, self.projection_bias, self.log_scale = None, None, None
        if options.gate == "cosine":
            self.projection = nn.Parameter(torch.empty(width, hidden))
            self.projection_bias = nn.Parameter(torch.zeros(width))
            self.log_scale = nn.Parameter(torch.full((1,), math.log(FIRST_SCALE)))
        if options.start != "normal":  # only then: a module with a say in its own values is never built hollow
            self.after_initialise = self.start_rows

    @property
    def expert_rows(self) -> ExpertRows | str:
        """What surgery on the experts does to its tensors."""
        if "table" in self._buffers:  # its values are experts
            return "its table deals token ids to all experts at once; start a new run with another table"
        rows = (name for name in self.row_tensors if isinstance(getattr(self, name, None), Tensor))
        return ExpertRows(tuple(rows), self.equal_rows, self.shared_rows)

    def reading_input(self) -> tuple[Tensor, ...]:
        """The matrix that reads x itself, in its precision; see `nn.mlp.MLP`."""
        return (self.weight,) if self.projection is None and self.precision.projection_dtype == "float32" else ()

    def logits(self, x: Tensor) -> Tensor:
        """x [T, D] -> W x, or what else the gate is, [T, E'], in float32 or wider whatever the product's precision."""
        dtype = self.precision.projection_dtype
        if self.projection is not None:
            assert self.projection_bias is not None, "a cosine gate has all its parameters"
            assert self.log_scale is not None, "a cosine gate has all its parameters"
            low = project(x, self.projection, dtype) + self.projection_bias.to(
                torch.promote_types(x.dtype, torch.float32)
            )
            # 1e-6: rows of zeros have no direction, and their gradient must stay finite in float32.
            cosine = project(
                nn.functional.normalize(low, dim=-1, eps=1e-6), nn.functional.normalize(self.weight, dim=-1)
            )
            return cosine * self.log_scale.clamp(max=math.log(LARGEST_SCALE)).exp().to(cosine.dtype)
        logits = project(x, self.weight, dtype)
        return logits if self.gate_bias is None else logits + self.gate_bias.to(logits.dtype)

    @torch.no_grad()
    def start_rows(self) -> None:
        """`start` of the matrix as it was drawn; rows of zeros stay zeros."""
        drawn = self.weight.double()
        if self.precision.start == "orthogonal":
            basis, corner = torch.linalg.qr(drawn.t())  # signs of the corner: rows are the drawn ones, made orthogonal
            made = (basis * corner.diagonal().sign()).t()
        else:
            made = nn.functional.normalize(drawn, dim=-1)
        self.weight.copy_(made)

    def gate_differs(self) -> str | None:
        """Why the projection is no plain matrix, for formats that know nothing else; None when it is."""
        if self.projection is not None:
            return "it compares directions (gate: cosine)"
        return "its projection has a bias (gate_bias)" if self.gate_bias is not None else None

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
    if dtype == "float32" and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
        found = joined_product(x, weight)
        return nn.functional.linear(x, weight) if found is None else found  # at once: casts take as long as a product
    wide = torch.promote_types(x.dtype, torch.float32)
    chosen = {"float32": wide, "input": x.dtype}.get(dtype) or DTYPES[dtype]
    if not torch.is_autocast_enabled(x.device.type):  # entering it takes as long as a token's product
        return nn.functional.linear(x.to(chosen), weight.to(chosen)).to(wide)
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
