"""Run by test_megablocks.py with TRITON_INTERPRET=1: MegaBlocks' own Python and kernels, on the CPU, in fp32."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from expert_routings import CASES, EXPERTS, TOP_K, bank, gradients, reference
from moelab import ActivationContext, BackendContext, Registry, Routing
from moelab.hookspecs import ACTIVATIONS
from moelab.moe.contracts import ExpertProblem
from moelab.moe.layout import ExpertLayout
from moelab_plugins.expert_backends._megablocks_install import has_extension, load
from moelab_plugins.expert_backends.megablocks import MegaBlocksBackend, MegaBlocksOptions

PROBLEM = ExpertProblem(EXPERTS, 128, 128, 64, 128, torch.device("cpu"), torch.float32)


def _backend() -> MegaBlocksBackend:
    return MegaBlocksBackend(MegaBlocksOptions(), BackendContext(ExpertLayout(EXPERTS, TOP_K, 128), 128, 0, dict))


@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient_equal_the_reference(case: str):
    routing, experts = CASES[case](), bank(128, 128, torch.float32)
    x = torch.randn(routing.num_tokens, 128, requires_grad=True)
    upstream = torch.randn(routing.num_tokens, 128)
    inputs = [x, routing.weight, *experts.parameters()]
    found, wanted = _backend()(x, routing, experts), reference(x, routing, experts)
    for ours, theirs in zip(
        [found, *gradients(found, upstream, inputs)], [wanted, *gradients(wanted, upstream, inputs)], strict=True
    ):
        # 2e-7 relative was measured; sums of 128 fp32 products.
        scale = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["relu2", "clamped_swiglu"])
@pytest.mark.parametrize("case", ["skewed", "starved", "expert_choice"])
def test_other_activations_and_biases_too(name: str, case: str):
    """Biases of an expert's own block columns, and those of tokens in the kernels' own order."""
    act = Registry(entry_points=False).build(ACTIVATIONS, {"name": name}, ActivationContext(128, 0, 1), "here")
    routing, experts = CASES[case](), bank(128, 256, torch.float32, activation=act, bias=True)
    x = torch.randn(routing.num_tokens, 128, requires_grad=True)
    upstream = torch.randn(routing.num_tokens, 128)
    inputs = [x, routing.weight, *experts.parameters()]
    found, wanted = _backend()(x, routing, experts), reference(x, routing, experts)
    for ours, theirs in zip(
        [found, *gradients(found, upstream, inputs)], [wanted, *gradients(wanted, upstream, inputs)], strict=True
    ):
        scale = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-5 * scale)


def test_experts_wider_than_a_block_keep_gate_and_up_apart():
    routing, experts = CASES["skewed"](), bank(128, 256, torch.float32)
    x = torch.randn(routing.num_tokens, 128)
    torch.testing.assert_close(
        _backend()(x, routing, experts), reference(x, routing, experts).float(), rtol=1e-4, atol=1e-4
    )


def test_beyond_256_block_columns_nothing_wraps():
    """With stk's own int16 indices, block column 256 and above came out wrong (error 30 and more)."""
    experts = bank(128, 128, torch.float32, experts=160)  # gate_up: 320 block columns, as in 57B-A14B there are 2560
    routing = Routing.from_topk(torch.tensor([[0], [127], [128], [159]]), torch.ones(4, 1), 160)
    x = torch.randn(4, 128)
    torch.testing.assert_close(
        _backend()(x, routing, experts), reference(x, routing, experts).float(), rtol=1e-4, atol=1e-4
    )


def test_bf16_is_refused_because_the_interpreter_is_wrong_in_it():
    assert _backend().supports(PROBLEM) is None
    assert "wrong in torch.bfloat16" in str(_backend().supports(replace(PROBLEM, dtype=torch.bfloat16)))
    a = torch.ones(128, 128, dtype=torch.bfloat16)
    from moelab_plugins.expert_backends._megablocks_topology import topology
    from moelab_plugins.expert_backends.megablocks import block_matrix

    at = topology(torch.tensor([128], dtype=torch.int32), 128, 128)
    wrong = load().sdd(a, a.t(), block_matrix(load(), at, None, torch.bfloat16)).data
    # 128 ones summed. Should this ever hold, the refusal can go.
    assert not torch.equal(wrong.float(), torch.full_like(wrong, 128.0).float())


def test_the_stand_in_for_the_compiled_extension_says_what_it_is():
    load()
    if has_extension():
        pytest.skip("the compiled extension is installed")
    with pytest.raises(RuntimeError, match="megablocks_ops, MegaBlocks' compiled extension, is not installed"):
        sys.modules["megablocks_ops"].sort()
