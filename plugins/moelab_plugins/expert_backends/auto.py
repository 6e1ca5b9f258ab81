"""Chooses the backend that serves each size of problem best, says which and why, and never fails where one can."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moelab import BackendContext, Component, ExpertBackend, Routing, UserError, component, hookimpl
from moelab.moe.activation import num_matrices
from moelab.moe.contracts import ExpertProblem
from moelab.moe.experts import ExpertBank, compute_dtype
from moelab.moe.few_rows import few_rows, pays
from moelab.ways import Ways, active, choose, gradients, measuring

# FLOPs of the forward pass from which `batched` pays for its Python in fp32 (benchmarks/experts.py, docs/compute.md).
LARGE = 4e8

logger = logging.getLogger("moelab")


@dataclass
class AutoOptions:
    pass


def ranking(problem: ExpertProblem) -> tuple[tuple[str, ...], str]:
    """(backends, best first, and why): as measured. Whatever else is registered follows, the reference last."""
    if problem.device.type == "cuda":
        return ("grouped_mm", "megablocks"), "fastest measured on an H200"
    weights = num_matrices(problem.activation) * problem.hidden_size * problem.moe_intermediate_size
    flops = 2 * problem.num_assignments * weights
    if flops < LARGE and problem.dtype.itemsize >= 4:
        return ("grouped_mm", "batched"), "little work"
    return ("batched", "grouped_mm"), "fastest measured on CPUs"


def _in_words(problem: ExpertProblem) -> str:
    """A problem as `moelab.ways` knows it."""
    dtype = str(problem.dtype).removeprefix("torch.")
    return (
        f"experts {problem.num_experts} x {problem.hidden_size} to {problem.moe_intermediate_size} "
        f"{type(problem.activation).__name__}, up to {problem.num_assignments} assignments {dtype}"
    )


def _trial(backend: ExpertBackend, x: Tensor, routing: Routing, bank: ExpertBank) -> Callable[[], object]:
    """A forward and a backward pass of these rows, to the bank's own parameters where they learn."""

    def call() -> object:
        rows, weight = x.detach().requires_grad_(), routing.weight.detach().requires_grad_()
        with torch.enable_grad():
            y = backend(rows, replace(routing, weight=weight), bank)
        return gradients(y, [rows, weight, *(each for each in bank.parameters() if each.requires_grad)])

    return call


class AutoBackend:
    """The first backend, in the order that was measured fastest, that supports the problem.

    Chosen once for each device, dtype and power of two of assignments, so that no step is decided anew. A few tokens
    without gradients on a CPU, as generation has them, go to none of them: `moe/few_rows.py` reads their experts.
    """

    name = "auto"
    hands_over_few_rows = True  # to moe/few_rows.py
    keeps_gate_up_alone = True  # on a CPU, of problems so large that it counts: `batched` computes them

    def __init__(self, options: AutoOptions, context: BackendContext) -> None:
        self._layer_id = context.layer_id
        self._build_others = context.others
        self._others: dict[str, ExpertBackend] | None = None
        self._chosen: dict[tuple[Ways | None, str, str, int], ExpertBackend] = {}
        self.choices: dict[str, str] = {}  # "cpu float32, up to 16384 assignments" -> "batched (why)"

    def supports(self, problem: ExpertProblem) -> str | None:
        return None

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        """x [T, D] -> [T, D]."""
        if pays(x, routing, bank) and not measuring():
            return few_rows(x, routing, bank)
        dtype = compute_dtype(x)
        key = (active(), x.device.type, str(dtype), max(routing.expert.numel() - 1, 0).bit_length())
        if key not in self._chosen:
            problem = ExpertProblem(
                bank.num_experts, x.shape[-1], bank.moe_intermediate_size, x.shape[0], routing.expert.numel(),
                x.device, dtype, bank.activation, bank.down_bias is not None,
            )  # fmt: skip
            self._chosen[key] = self._choose(problem, lambda backend: _trial(backend, x, routing, bank))
        return self._chosen[key](x, routing, bank)

    def _choose(self, problem: ExpertProblem, trial: Callable[[ExpertBackend], Callable[[], object]]) -> ExpertBackend:
        """Decided for the largest problem that shares the choice; where the run measures, by a trial of this one."""
        most = 1 << max(problem.num_assignments - 1, 0).bit_length()
        problem = replace(problem, num_assignments=most, num_tokens=max(problem.num_tokens, 1))
        if self._others is None:
            self._others = dict(self._build_others())
        others = self._others
        order, why = ranking(problem)
        ranked = [name for name in order if name in others]
        rest = sorted((name for name in others if name not in ranked), key=lambda name: (name == "loop", name))
        refusals: list[str] = []
        for name in [*ranked, *rest]:
            reason = others[name].supports(problem)
            if reason is None:
                why = "; ".join([why if name == ranked[0] else "next best", *refusals])
                return self._measured(problem, name, why, [each for each in ranked if each != name], trial)
            refusals.append(f"{name}: {reason}")
        raise UserError(f"model.moe.backend: no backend can serve {problem}: {'; '.join(refusals)}")

    def _measured(
        self,
        problem: ExpertProblem,
        usual: str,
        why: str,
        others: list[str],
        trial: Callable[[ExpertBackend], Callable[[], object]],
    ) -> ExpertBackend:
        """`usual`, unless the run has measured another of the ranking as faster for this very size."""
        assert self._others is not None
        able = [usual, *(name for name in others if self._others[name].supports(problem) is None)]
        built = {name: self._others[name] for name in able}
        name = usual
        if len(built) > 1:
            name = choose(_in_words(problem), usual, lambda: {each: trial(built[each]) for each in built})
        if name not in built:  # of a run that began where more is installed
            name = usual
        self._note(problem, name, why if name == usual else f"measured faster than {usual}")
        return built[name]

    def _note(self, problem: ExpertProblem, name: str, why: str) -> None:
        dtype = str(problem.dtype).removeprefix("torch.")
        key = f"{problem.device.type} {dtype}, up to {problem.num_assignments} assignments"
        self.choices[key] = f"{name} ({why})"
        logger.debug("layer %d: %s: %s", self._layer_id, key, self.choices[key])


@hookimpl
def moelab_expert_backends() -> list[Component[BackendContext, ExpertBackend]]:
    return [component("auto", AutoOptions, AutoBackend)]
