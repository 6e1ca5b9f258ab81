"""Every backend that runs on a CPU against one that computes each assignment by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expert_routings import CASES, EXPERTS, TOP_K, bank, gradients, reference, skewed
from moelab import BackendContext, ExpertBackend, Registry, Routing
from moelab.hookspecs import ACTIVATIONS, EXPERT_BACKENDS
from moelab.kernels import onednn
from moelab.kernels.onednn import round_up
from moelab.moe.activation import Activation, ActivationContext
from moelab.moe.contracts import ExpertProblem
from moelab.moe.dispatch import count_ids
from moelab.moe.experts import ExpertBank
from moelab.moe.layout import ExpertLayout
from moelab_plugins.expert_backends import _batched_rows
from moelab_plugins.expert_backends._batched_rows import make_chunks, make_runs

NAMES = ("loop", "grouped_mm", "batched", "auto")
HIDDEN, WIDTH = 16, 8


def _activation(name: str) -> Activation:
    return Registry(entry_points=False).build(ACTIVATIONS, {"name": name}, ActivationContext(HIDDEN, 0, 1), "here")


def _backend(name: str) -> ExpertBackend:
    registry = Registry(entry_points=False)
    layout = ExpertLayout(EXPERTS, TOP_K, WIDTH)
    inner = BackendContext(layout, HIDDEN, 0, dict)
    others = {
        other: registry.build(EXPERT_BACKENDS, {"name": other}, inner, "here") for other in NAMES if other != name
    }
    return registry.build(EXPERT_BACKENDS, {"name": name}, BackendContext(layout, HIDDEN, 0, lambda: others), "here")


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    torch.set_num_threads(request.param)
    monkeypatch.setattr(_batched_rows, "ROW_BYTES", 28)  # several chunks, and experts that are larger than one
    return int(request.param)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_output_and_every_gradient_equal_the_reference(name: str, case: str, threads: int):
    routing, experts = CASES[case](), bank(HIDDEN, WIDTH, torch.float32)
    x = torch.randn(routing.num_tokens, HIDDEN, requires_grad=True)
    upstream = torch.randn(routing.num_tokens, HIDDEN)
    inputs = [x, routing.weight, *experts.parameters()]
    found, wanted = _backend(name)(x, routing, experts), reference(x, routing, experts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(found, upstream, inputs), gradients(wanted, upstream, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)  # sums of up to 80 fp32 terms


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("case", ["skewed", "starved", "expert_choice", "no_tokens"])
def test_bf16_autocast_stays_within_bf16_rounding(name: str, case: str, threads: int):
    routing, experts = CASES[case](), bank(HIDDEN, WIDTH, torch.float32)
    x = torch.randn(routing.num_tokens, HIDDEN, requires_grad=True)
    inputs = [x, routing.weight, *experts.parameters()]
    upstream = torch.randn(routing.num_tokens, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        found = _backend(name)(x, routing, experts)
    wanted = reference(x, routing, experts)
    for ours, theirs in zip(
        [found, *gradients(found, upstream, inputs)], [wanted, *gradients(wanted, upstream, inputs)], strict=True
    ):
        assert ours.dtype == torch.float32
        scale = float(theirs.detach().abs().max()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=4e-2 * scale)  # bf16 has 8 bits; three products


@pytest.mark.parametrize("name", ["loop", "batched"])
def test_derivatives_pass_gradcheck_in_float64(name: str, threads: int):
    _gradcheck(name, bank(6, 4))


@pytest.mark.parametrize(("activation", "bias"), [("relu2", False), ("clamped_swiglu", True)])
def test_derivatives_of_other_activations_pass_gradcheck(activation: str, bias: bool):
    _gradcheck("batched", bank(6, 4, activation=_activation(activation), bias=bias))


def _gradcheck(name: str, experts: ExpertBank) -> None:
    routing, backend = skewed(9), _backend(name)

    def function(x: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        experts.__dict__.update(zip((key for key, _ in experts.named_parameters()), parameters, strict=True))
        made = Routing.from_topk(routing.expert.view(9, TOP_K), weight.view(9, TOP_K), EXPERTS)
        return backend(x, made, experts)

    inputs = [torch.randn(9, 6), torch.rand(9 * TOP_K), *(p.detach() for p in experts.parameters())]
    assert torch.autograd.gradcheck(function, [tensor.double().requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_an_expert_stays_with_its_tokens(name: str, dtype: torch.dtype, threads: int):
    routing, experts = skewed(), bank(HIDDEN, WIDTH, torch.float32)
    sick = 2
    with torch.no_grad():
        experts.gate_up[sick, 0, 0] = float("nan")
    x = torch.randn(routing.num_tokens, HIDDEN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = _backend(name)(x, routing, experts)
    sent = torch.zeros(routing.num_tokens, dtype=torch.bool)
    sent[routing.token[routing.expert == sick]] = True
    assert torch.equal(y.isnan().any(-1), sent)
    experts.down.grad = None
    y.nansum().backward()
    assert experts.down.grad is not None
    healthy = [e for e in range(EXPERTS) if e != sick]
    assert experts.down.grad[healthy].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_equal_inputs_give_equal_bits(name: str, threads: int):
    routing, experts = CASES["expert_choice"](), bank(HIDDEN, WIDTH, torch.float32)
    x = torch.randn(routing.num_tokens, HIDDEN, requires_grad=True)
    inputs, upstream = [x, routing.weight, *experts.parameters()], torch.randn(routing.num_tokens, HIDDEN)
    runs = []
    for _ in range(2):
        y = _backend(name)(x, routing, experts)
        runs.append([y, *gradients(y, upstream, inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_a_token_stays_with_the_experts_it_was_sent_to(name: str, dtype: torch.dtype, threads: int):
    routing, experts = skewed(), bank(HIDDEN, WIDTH, torch.float32)
    x = torch.randn(routing.num_tokens, HIDDEN)
    x[0] = float("nan")
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = _backend(name)(x, routing, experts)
    y[1:].sum().backward()
    others = sorted(set(range(EXPERTS)) - set(routing.expert.view(-1, TOP_K)[0].tolist()))
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad[others].isfinite().all()


def _problem(assignments: int, dtype: torch.dtype = torch.float32, hidden: int = 256) -> ExpertProblem:
    return ExpertProblem(32, hidden, 128, assignments, assignments, torch.device("cpu"), dtype)


def test_auto_takes_grouped_mm_for_small_problems_in_fp32_only():
    from moelab_plugins.expert_backends.auto import ranking

    assert ranking(_problem(64))[0][0] == "grouped_mm"
    assert ranking(_problem(64, torch.bfloat16))[0][0] == "batched"
    assert ranking(_problem(16384))[0][0] == "batched"


def test_auto_says_which_backend_and_why_and_whom_it_passed_over():
    auto, experts = _backend("auto"), bank(6, 4, torch.float32)
    routing = skewed()
    auto(torch.randn(routing.num_tokens, 6), routing, experts)
    (key, choice), *others = auto.choices.items()
    assert not others
    assert key == "cpu float32, up to 128 assignments"
    assert choice.startswith("batched (next best; grouped_mm: hidden_size")


def test_grouped_mm_refuses_what_torch_would_not_take():
    grouped = _backend("grouped_mm")
    assert "multiples of 4" in str(grouped.supports(_problem(64, hidden=6)))
    assert "float64" in str(grouped.supports(_problem(64, torch.float64)))


def test_batched_refuses_another_device():
    problem = ExpertProblem(8, 16, 8, 4, 8, torch.device("meta"), torch.float32)
    assert "meta" in str(_backend("batched").supports(problem))


@pytest.mark.parametrize("rows", [1, 7, 8, 31, 32, 33, 255, 256, 300, 5000])
def test_rounding_adds_less_than_an_eighth_or_16_rows(rows: int):
    assert rows <= round_up(rows) < max(rows * 9 / 8, rows + 16)
    assert round_up(0) == 0


COUNTS = [[0, 0, 0], [5], [100, 1, 0, 2], [7, 7, 7, 7, 50], [1] * 30, [256, 250, 270, 261], [64] * 15 + [0]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row_bytes", [40, 8192])
@pytest.mark.parametrize("numbers", [1 << 10, 1 << 30])
def test_chunks_cover_every_expert_and_row_once(
    counts, row_bytes: int, dtype, numbers: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_batched_rows, "ROW_BYTES", row_bytes)
    runs = make_runs(counts, dtype, numbers)
    assert [run for chunk in make_chunks(runs, dtype) for run in chunk.runs] == runs
    assert [expert for run in runs for expert in range(len(counts))[run.experts]] == list(range(len(counts)))
    assert [run.start for run in runs[1:]] == [run.stop for run in runs[:-1]]
    sizes = [run.size for run in runs for _ in range(run.count)]
    assert all(count <= size for count, size in zip(counts, sizes, strict=True))
    assert all(size == 0 for count, size in zip(counts, sizes, strict=True) if count == 0)  # no token to fill it with
    each = 128 if dtype == torch.bfloat16 else 8
    spare = each * len(counts) if numbers == 1 << 10 else 0
    padded = sum(map(round_up, counts)) * 9 / 8 if dtype == torch.bfloat16 else sum(counts) * 17 / 16
    assert sum(sizes) <= padded + spare


@pytest.mark.usefixtures("zen_5")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "flops"), [(0, 0), (6, 0), (6, 10**9)], ids=["all", "large", "no weights"])
def test_experts_multiplied_by_onednn_give_what_float64_gives(
    case: str, bias: bool, rows: int, flops: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(onednn, "ALONE_FLOPS", 0)
    monkeypatch.setattr(onednn, "ALONE_ROWS", rows)
    monkeypatch.setattr(_batched_rows, "OUTER_FLOPS", flops)
    monkeypatch.setattr(_batched_rows, "ROW_BYTES", 64)  # several chunks
    called = []
    compute = _batched_rows.product
    monkeypatch.setattr(_batched_rows, "product", lambda *given: called.append(given) or compute(*given))
    routing, experts = CASES[case](), bank(HIDDEN, WIDTH, torch.float32, bias=bias)
    x = torch.randn(routing.num_tokens, HIDDEN, requires_grad=True)
    inputs, upstream = [x, routing.weight, *experts.parameters()], torch.randn(routing.num_tokens, HIDDEN)
    found = _backend("batched")(x, routing, experts)
    wanted = reference(x, routing, experts)
    pairs = zip(
        [found, *gradients(found, upstream, inputs)], [wanted, *gradients(wanted, upstream, inputs)], strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5)
    assert called or int(count_ids(routing.expert, EXPERTS).max()) < max(rows, 1)


@pytest.mark.usefixtures("zen_5")
def test_experts_that_onednn_multiplies_have_sizes_that_come_again():
    """Smaller experts are batched as elsewhere."""
    numbers = 256 * 128
    alone = onednn.alone_from(numbers)
    assert 61 < alone < 62, "4 MFLOP"
    assert _sizes([62, 63, 100, 530], torch.float32, numbers, alone) == [(2, 64), (1, 112), (1, 576)]
    assert _sizes([60, 40, 59, 58], torch.float32, numbers, alone) == [(4, 60)]
    assert _sizes([16, 10, 22, 14], torch.float32, numbers, alone) == [(4, 22)]
    assert _sizes([0, 0, 530, 530], torch.float32, numbers, alone) == [(2, 0), (2, 576)]
    assert _sizes([33, 31], torch.float32, 1 << 20, onednn.alone_from(1 << 20)) == [(1, 48), (1, 31)]


def test_neighbours_of_like_load_are_one_batched_product():
    """Several times over, since a run may hold thousands of rows."""
    half, single = torch.bfloat16, torch.float32
    alike, unlike = [256, 250, 262, 261] * 4, [256, 250, 900, 12] * 4
    large = 1 << 20
    assert _sizes(alike, half, large) == [(16, 288)]
    assert _sizes(alike, single, large) == [(8, 262), (8, 262)]
    assert _sizes(unlike, single, large) == [(2, 256), (1, 900), (1, 12)] * 4
    assert _sizes([0, 0, 64, 0], single, large) == [(2, 0), (1, 64), (1, 0)]


def test_small_experts_with_few_rows_are_padded_further_than_large_ones():
    """Eight rows of each for experts of 256 x 128, two for 512 x 256, whose rows cost four times as much, in half
    precision 32 and 8; never one without a token."""
    few = [16, 10, 22, 14]
    assert _sizes(few, torch.float32, 256 * 128) == [(4, 22)]
    assert _sizes(few, torch.float32, 512 * 256) == [(1, 16), (1, 10), (1, 22), (1, 14)]
    assert _sizes(few, torch.float32, 16) == [(4, 22)]
    assert _sizes([16, 10, 40, 14], torch.float32, 16) == [(2, 16), (1, 40), (1, 14)]
    assert _sizes(few, torch.bfloat16, 512 * 256) == [(2, 16), (2, 32)]
    assert _sizes([96, 150, 64, 130], torch.bfloat16, 128 * 64) == [(4, 160)]
    assert _sizes([96, 150, 64, 130], torch.bfloat16, 512 * 256) == [(1, 96), (1, 160), (1, 64), (1, 144)]
    assert _sizes([3, 0, 2, 2], torch.float32, 16) == [(1, 3), (1, 0), (2, 2)]


def _sizes(counts: list[int], dtype: torch.dtype, numbers: int, alone: float = float("inf")) -> list[tuple[int, int]]:
    """(experts, rows of each) of each run."""
    return [(run.count, run.size) for run in make_runs(counts, dtype, numbers, alone)]
