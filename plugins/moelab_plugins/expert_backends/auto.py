"""Chooses the backend that serves each problem best, and remembers what it chose and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moelab import BackendContext, Component, ExpertBackend, Routing, UserError, component, hookimpl
from moelab.moe.contracts import ExpertProblem
from moelab.moe.experts import ExpertBank, compute_dtype

# Best first; whatever else is registered comes before the reference.
PREFERENCE = {"cuda": ("grouped_mm",), "cpu": ("cpu_threads", "grouped_mm")}


@dataclass
class AutoOptions:
    pass


class AutoBackend:
    """The first backend, in the order that was measured fastest for the device, that supports the problem."""

    name = "auto"

    def __init__(self, options: AutoOptions, context: BackendContext) -> None:
        self._others = context.others
        self._chosen: dict[tuple[str, str], ExpertBackend] = {}
        self.choices: dict[str, str] = {}  # "cpu float32" -> "grouped_mm", or "loop (grouped_mm: why not)"

    def supports(self, problem: ExpertProblem) -> str | None:
        return None

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        """x [T, D] -> [T, D]."""
        key = (x.device.type, str(compute_dtype(x)))
        if key not in self._chosen:
            self._chosen[key] = self._choose(x, routing, bank)
        return self._chosen[key](x, routing, bank)

    def _choose(self, x: Tensor, routing: Routing, bank: ExpertBank) -> ExpertBackend:
        problem = ExpertProblem(
            bank.num_experts, x.shape[-1], bank.moe_intermediate_size, x.shape[0], routing.expert.numel(),
            x.device, compute_dtype(x),
        )  # fmt: skip
        others = dict(self._others())
        ranked = [name for name in PREFERENCE.get(x.device.type, ()) if name in others]
        refusals: list[str] = []
        for name in [*ranked, *(n for n in sorted(others, key=lambda n: n == "loop") if n not in ranked)]:
            reason = others[name].supports(problem)
            if reason is None:
                self.choices[f"{problem.device.type} {problem.dtype}"] = " ".join([name, *refusals])
                return others[name]
            refusals.append(f"({name}: {reason})")
        raise UserError(f"model.moe.backend: no backend can serve {problem}: {' '.join(refusals)}")


@hookimpl
def moelab_expert_backends() -> list[Component[BackendContext, ExpertBackend]]:
    return [component("auto", AutoOptions, AutoBackend)]
