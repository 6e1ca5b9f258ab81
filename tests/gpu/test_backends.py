"""Backends on the device, in bf16; benchmarks/gpu.py measures speed there."""

from __future__ import annotations

import pytest
import torch

from expert_routings import CASES, EXPERTS, TOP_K, bank, gradients, reference
from moelab import BackendContext, Registry
from moelab.hookspecs import EXPERT_BACKENDS
from moelab.moe.contracts import ExpertProblem
from moelab.moe.layout import ExpertLayout
from on_device import DEVICE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["loop", "grouped_mm", "megablocks", "auto"])
def test_bf16_output_and_gradients_stay_within_rounding_of_float64(name: str, case: str) -> None:
    registry, layout = Registry(entry_points=False), ExpertLayout(EXPERTS, TOP_K, 128)
    inner = BackendContext(layout, 128, 0, dict)
    others = {n: registry.build(EXPERT_BACKENDS, {"name": n}, inner, "here") for n in ("loop", "grouped_mm")}
    context = BackendContext(layout, 128, 0, lambda: others)
    backend = registry.build(EXPERT_BACKENDS, {"name": name}, context, "here")
    routing = CASES[case]()
    problem = ExpertProblem(EXPERTS, 128, 128, routing.num_tokens, routing.expert.numel(), DEVICE, torch.bfloat16)
    reason = backend.supports(problem)
    if reason is not None:
        pytest.skip(reason)
    experts, x = bank(128, 128, torch.float32), torch.randn(routing.num_tokens, 128, requires_grad=True)
    upstream = torch.randn(routing.num_tokens, 128)
    wanted = reference(x, routing, experts)
    wanted_gradients = gradients(wanted, upstream, [x, routing.weight, *experts.parameters()])
    moved = type(routing).from_assignments(
        routing.token.to(DEVICE), routing.expert.to(DEVICE), routing.weight.detach().to(DEVICE).requires_grad_(),
        routing.num_tokens, routing.num_experts,
    )  # fmt: skip
    experts, x = experts.to(DEVICE), x.detach().to(DEVICE).requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = backend(x, moved, experts)
    inputs = [x, moved.weight, *experts.parameters()]
    for ours, theirs in zip(
        [found, *gradients(found, upstream.to(DEVICE), inputs)], [wanted, *wanted_gradients], strict=True
    ):
        scale = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        # bf16 has 8 bits; three products.
        torch.testing.assert_close(ours.float().cpu(), theirs.float(), rtol=0, atol=2e-2 * scale)
