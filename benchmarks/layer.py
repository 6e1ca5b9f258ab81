"""One layer of experts under a given load: what benchmarks/experts.py (CPU) and benchmarks/gpu.py time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moelab import BackendContext, ExpertBackend, Registry, Routing
from moelab.hookspecs import EXPERT_BACKENDS
from moelab.moe.contracts import ExpertProblem
from moelab.moe.experts import ExpertBank
from moelab.moe.layout import ExpertLayout
from report import median

RECORDED = Path(__file__).parent / "results" / "recorded_routing.safetensors"  # written by record_routing.py
LOADS = ("balanced", "random", "replayed")


@dataclass(frozen=True)
class LayerShape:
    """One layer's experts."""

    name: str
    hidden: int
    experts: int
    top_k: int
    width: int
    shared: int = 0

    def flops(self, tokens: int, backward: bool) -> int:
        """Of the routed experts: three products of 2 * D * F a row, and twice that again for the backward pass."""
        return (3 if backward else 1) * 6 * tokens * self.top_k * self.hidden * self.width

    def traffic(self, tokens: int, backward: bool, width: int = 2) -> int:
        """Bytes of the products' operands and results, each moved once, `width` for a number; every expert is used.

        Gate and up are one product. A backward pass has two for each, with the same three matrices.
        """
        weights = 3 * self.experts * self.hidden * self.width
        rows = tokens * self.top_k * (2 * self.hidden + 3 * self.width)  # into gate and up, out; into down, out
        return (3 if backward else 1) * width * (weights + rows)


@dataclass(frozen=True)
class Contender:
    """Something to time, and the tensors whose gradients its backward pass computes."""

    run: Callable[[], Tensor]
    leaves: Sequence[Tensor]


@dataclass(frozen=True)
class Timing:
    """Median seconds, and the device's peak memory (0 on a CPU)."""

    forward: float
    total: float  # forward and backward
    peak_bytes: int


def bank_of(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> ExpertBank:
    with device:
        bank = ExpertBank(ExpertLayout(shape.experts, shape.top_k, shape.width), shape.hidden).to(dtype)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return bank


def backends_for(shape: LayerShape, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, ExpertBackend]:
    """Every registered backend that can serve, `auto` included."""
    registry = Registry(entry_points=False)
    layout = ExpertLayout(shape.experts, shape.top_k, shape.width)
    inner = BackendContext(layout, shape.hidden, 0, dict)
    names = list(registry.components(EXPERT_BACKENDS))
    built = {name: registry.build(EXPERT_BACKENDS, {"name": name}, inner, "bench") for name in names if name != "auto"}
    auto = registry.build(
        EXPERT_BACKENDS, {"name": "auto"}, BackendContext(layout, shape.hidden, 0, lambda: built), "bench"
    )
    problem = ExpertProblem(shape.experts, shape.hidden, shape.width, tokens, tokens * shape.top_k, device, dtype)
    able = {name: backend for name, backend in built.items() if backend.supports(problem) is None}
    return able | {"auto": auto}


def recorded() -> tuple[Tensor, int] | None:
    """(experts [T, K] int64, E) of a recorded run; None where none was recorded."""
    if not RECORDED.exists():
        return None
    with safe_open(RECORDED, framework="pt") as file:
        return file.get_tensor("expert").long(), int(file.metadata()["num_experts"])


def draw_routing(shape: LayerShape, tokens: int, load: str, device: torch.device) -> Routing:
    """K distinct experts for each token.

    balanced: every expert has as many, within one. random: an untrained router's. replayed: what a recorded run chose,
    from a random token on and repeated as needed; a shape of another E or K gets its load instead, stretched over E.
    """
    if load == "balanced":
        start = torch.arange(tokens).unsqueeze(1) * shape.top_k
        expert = (start + torch.arange(shape.top_k)) % shape.experts
        expert = expert[torch.randperm(tokens)]
    elif load == "replayed":
        expert = _replay(shape, tokens)
    else:
        expert = _by_shares(torch.ones(shape.experts), tokens, shape.top_k)
    weight = torch.rand(tokens, shape.top_k)
    weight = (weight / weight.sum(1, keepdim=True)).to(device).requires_grad_()
    return Routing.from_topk(expert.to(device), weight, shape.experts)


def _replay(shape: LayerShape, tokens: int) -> Tensor:
    found = recorded()
    assert found is not None, f"nothing recorded: {RECORDED}"
    expert, experts = found
    if (experts, expert.shape[1]) == (shape.experts, shape.top_k):
        first = int(torch.randint(len(expert), ()))
        return expert[(torch.arange(tokens) + first) % len(expert)]
    load = torch.bincount(expert.flatten(), minlength=experts).float().sort(descending=True).values
    shares = nn.functional.interpolate(load.view(1, 1, -1), size=shape.experts, mode="linear", align_corners=True)
    return _by_shares(shares.flatten().clamp(min=1e-3 * float(load.mean())), tokens, shape.top_k)


def _by_shares(shares: Tensor, tokens: int, top_k: int) -> Tensor:
    """K distinct experts [tokens, K], drawn in proportion to shares [E] (Gumbel top-K)."""
    noise = -torch.log(-torch.log(torch.rand(tokens, len(shares)).clamp(1e-9, 1 - 1e-7)))
    return (noise + shares.log()).topk(top_k).indices


def time_in_turn(
    sides: dict[str, Contender], upstream: Tensor, repeats: int, device: torch.device
) -> dict[str, Timing]:
    """Each side forward, then forward and backward, all sides in turn, warmed up."""
    forward: dict[str, list[float]] = {name: [] for name in sides}
    total: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0)
    for repeat in range(repeats + 2):
        for name, side in sides.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for leaf in side.leaves:
                leaf.grad = None  # adding to the last pass's gradients would be timed too
            started = _now(device)
            y = side.run()
            middle = _now(device)
            y.backward(upstream)
            ended = _now(device)
            del y
            if repeat >= 2:
                forward[name].append(middle - started)
                total[name].append(ended - started)
            if device.type == "cuda":
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
    return {name: Timing(median(forward[name]), median(total[name]), peaks[name]) for name in sides}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
