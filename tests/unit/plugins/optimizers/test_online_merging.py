"""Online merging beside its equations in float64, beside AdamW, and through a run that is resumed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.core.training.test_rounded import model_of
from torch import Tensor

import moelab
from moelab import CheckpointError, ConfigError, Registry, session
from moelab.checkpoint import MODEL, TRAINING, checkpoints
from moelab.config.run import OptimizerConfig
from moelab.hookspecs import OPTIMIZERS
from moelab.planning.memory import predict
from moelab.planning.traffic import Problem
from moelab.testing.optimizers import OptimizerCase, Stepped, weights_of
from moelab.training.optimizer import begin, state_bytes
from moelab_plugins.optimizers.online_merging import largest

REGISTRY = Registry(entry_points=False)
COMPONENT = REGISTRY.components(OPTIMIZERS)["online_merging"]
FOLDERS = {"reference": "there", "before": "here"}
RATE, BETAS, EPS = 1e-2, (0.9, 0.95), 1e-8
MERGED = ("layers.0.experts.gate_up", "layers.0.experts.down", "layers.0.o_proj.weight", "layers.0.norm.weight")


def case(weight_decay: float = 0.0, **options: Any) -> OptimizerCase:
    settings = OptimizerConfig(lr=RATE, betas=list(BETAS), eps=EPS, weight_decay=weight_decay)
    return OptimizerCase(COMPONENT, FOLDERS | options, settings)


def tau_of(name: str) -> Tensor:
    """Reference minus base, float64, no larger than 1."""
    found = []
    for folder in FOLDERS.values():
        weights = weights_of(folder, "")
        found.append(torch.empty(weights.shapes[name]))
        weights.read_into(name, found[-1])
    return (found[0] - found[1]).double().clamp(-1, 1)


class Adam:
    """Its steps in float64, without decay."""

    def __init__(self) -> None:
        self.first: Any = 0.0
        self.second: Any = 0.0
        self.count = 0

    def step(self, gradient: Tensor) -> Tensor:
        self.count += 1
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * gradient.double()
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * gradient.double() ** 2
        first = self.first / (1 - BETAS[0] ** self.count)
        second = self.second / (1 - BETAS[1] ** self.count)
        return -RATE * first / (second.sqrt() + EPS)


def top(values: Tensor, share: float, blocks: int) -> Tensor:
    """Equation 6, matrix by matrix: of a stack [E, rows, columns] each block of rows of each expert."""
    rows = (
        values.reshape(-1, values.shape[-2] // blocks * values.shape[-1]) if values.dim() == 3 else values.view(1, -1)
    )
    count = max(1, int(share * rows.shape[1]))
    kept = torch.zeros_like(rows)
    best = rows.abs().topk(count, dim=1).indices
    return kept.scatter(1, best, rows.gather(1, best)).view(values.shape)


def consensus(a: Tensor, b: Tensor) -> Tensor:
    """Equation 7."""
    apart = torch.where(a.abs() >= b.abs(), a, 0.0) + torch.where(b.abs() >= a.abs(), b, 0.0)
    return torch.where(a.sign() == b.sign(), a + b, apart)


def gradients(stepped: Stepped, name: str) -> Tensor:
    found = stepped.model.get_parameter(name).grad
    assert found is not None
    return found


@pytest.mark.parametrize("method", ["ondare", "onties"])
@pytest.mark.parametrize("every", [1, 3])
def test_with_alpha_0_and_all_reserved_it_is_adamw_to_the_bit(method: str, every: int) -> None:
    one = case(0.1, method=method, alpha=0.0, merge_every=every).build()
    plain = OptimizerCase(REGISTRY.components(OPTIMIZERS)["adamw"], settings=case(0.1).settings).build()
    for number in range(7):
        one.step(number)
        plain.step(number)
    for name, value in plain.values().items():
        assert torch.equal(one.values()[name], value), name


@pytest.mark.parametrize(("method", "share"), [("ondare", 1.0), ("onties", 1.0), ("onties", 0.3)])
@pytest.mark.parametrize("every", [1, 2])
def test_a_step_is_that_of_the_papers_equations(method: str, every: int, share: float) -> None:
    """Algorithm 2 with its roll-back, in float64; OnDARE with all reserved, since its masks are drawn."""
    alpha = 0.02
    stepped = case(method=method, alpha=alpha, reserve_rate=share, merge_every=every).build()
    wanted = {name: value.double() for name, value in stepped.values().items()}
    steps, since = {name: Adam() for name in MERGED}, {name: torch.zeros(()).double() for name in MERGED}
    for number in range(1, 5):
        stepped.step(number)
        for name in MERGED:
            delta = steps[name].step(gradients(stepped, name))
            if number == 1 and every == 1:  # Adam's first step has one size, of which no part is the largest
                wanted[name] = stepped.values()[name].double()
                continue
            if number % every:
                since[name] = since[name] + delta
                wanted[name] = wanted[name] + delta
                continue
            wanted[name], delta = wanted[name] - since[name], delta + since[name]
            since[name] = torch.zeros(()).double()
            tau, blocks = tau_of(name), 2 if name.endswith("gate_up") else 1
            if method == "onties":
                kept, told = (top(values, share, blocks) for values in (delta, tau))
                wanted[name] = wanted[name] + consensus((1 - alpha) * kept, alpha * told)
            else:
                wanted[name] = wanted[name] + (1 - alpha) * delta + alpha * tau
    for name in MERGED:
        torch.testing.assert_close(stepped.values()[name].double(), wanted[name], rtol=0, atol=2e-6)


def test_without_gradients_it_drifts_by_alpha_tau_a_step() -> None:
    stepped = case(alpha=1e-3).build()
    before = stepped.values()
    for _ in range(5):
        for parameter in stepped.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        stepped.optimizer.step()
    for name in MERGED:
        moved = (stepped.values()[name] - before[name]).double()
        torch.testing.assert_close(moved, 5e-3 * tau_of(name), rtol=0, atol=1e-6)
    router = "layers.0.router.weight"
    assert torch.equal(stepped.values()[router], before[router])  # which is AdamW's alone
    merged = case(alpha=1e-3, merge_routers=True).build()
    for parameter in merged.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    merged.optimizer.step()
    assert not torch.equal(merged.values()[router], before[router])


def first_steps(draws: int, name: str, **options: Any) -> Tensor:
    """[draws, ...] float64: how far equal gradients move a parameter in each of so many first steps."""
    moved = []
    for number in range(draws):
        stepped = case(**options).build()
        before = stepped.values()[name]
        torch.manual_seed(number)
        stepped.model.get_parameter(name).grad = torch.ones_like(before)
        stepped.optimizer.step()
        moved.append((stepped.values()[name] - before).double())
    return torch.stack(moved)


def test_ondare_keeps_each_number_with_its_probability_and_makes_none_larger() -> None:
    """(1 - a) D, a tau, both or nothing, within 6 standard deviations of the binomial shares."""
    alpha, p, name = 0.25, 0.3, "layers.0.experts.gate_up"
    tau = tau_of(name)
    found, told = first_steps(60, name, alpha=alpha, reserve_rate=p)[:, tau != 0], alpha * tau[tau != 0]
    ours = -(1 - alpha) * RATE
    shares = {
        (1 - p) ** 2: found.abs() < 1e-6,
        p * (1 - p): (found - ours).abs() < 1e-6,
        p * p: (found - ours - told).abs() < 1e-6,
    }
    only_tau = (found - told).abs() < 1e-6
    assert bool((torch.stack(list(shares.values())).any(0) | only_tau).all())
    for expected, which in [*shares.items(), (p * (1 - p), only_tau)]:
        error = math.sqrt(expected * (1 - expected) / found.numel())
        assert abs(float(which.double().mean()) - expected) < 6 * error


def test_the_official_ondare_divides_by_p_and_masks_tau_once() -> None:
    alpha, p, name = 0.25, 0.3, "layers.0.experts.gate_up"
    found, tau = first_steps(20, name, alpha=alpha, reserve_rate=p, compat="official"), tau_of(name)
    told = alpha * (tau / p).clamp(-1, 1)
    ours = -(1 - alpha) * RATE / p
    with_tau = ((found - told).abs() < 1e-6) | ((found - told - ours).abs() < 1e-6)
    without = (found.abs() < 1e-6) | ((found - ours).abs() < 1e-6)
    assert bool((with_tau.all(0) | without.all(0)).all())  # a number of tau is there in each step, or in none
    share = float(with_tau.all(0)[tau != 0].double().mean())
    assert abs(share - p) < 6 * math.sqrt(p * (1 - p) / int((tau != 0).sum()))


@pytest.mark.parametrize(("alpha", "share"), [(0.1, 0.5), (0.1, 1.0), (0.0, 1.0)])
def test_the_official_onties_elects_signs_without_weights(alpha: float, share: float) -> None:
    """With an alpha of 0 as well: where tau says otherwise, AdamW's step is left out."""
    name = "layers.0.o_proj.weight"
    stepped = case(alpha=alpha, reserve_rate=share, method="onties", compat="official").build()
    adam = Adam()
    stepped.step(0)  # whose steps have one size, of which no part is the largest
    adam.step(gradients(stepped, name))
    before = stepped.values()[name].double()
    stepped.step(1)
    kept, tau = top(adam.step(gradients(stepped, name)), share, 1), top(tau_of(name), share, 1)
    majority = torch.where(kept + tau >= 0, 1.0, -1.0)
    step = (1 - alpha) * kept * (kept.sign() == majority) + alpha * tau * (tau.sign() == majority)
    torch.testing.assert_close(stepped.values()[name].double(), before + step, rtol=0, atol=1e-6)


def test_each_expert_has_its_own_share() -> None:
    """The first one's gradients stay as they are, those of the others turn: their steps are the smaller ones by far."""
    name = "layers.0.experts.down"
    stepped = case(alpha=0.0, reserve_rate=0.25, method="onties").build()
    parameter = stepped.model.get_parameter(name)
    first = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    parameter.grad = first
    stepped.optimizer.step()
    before = stepped.values()[name]
    turned = -first * (torch.rand(first.shape, generator=torch.Generator().manual_seed(2)) * 0.2 + 0.8)
    parameter.grad = torch.cat([first[:1], turned[1:]])
    stepped.optimizer.step()
    moved = (stepped.values()[name] != before).flatten(1).sum(1)
    assert moved[1:].tolist() == [6, 6]


@pytest.mark.parametrize("width", [40, 5000])
def test_of_each_row_the_largest_stay(width: int) -> None:
    """Short rows and long ones, which go other ways; a row of zeros stays one."""
    values = torch.randn(3, width, generator=torch.Generator().manual_seed(width))
    values[1] = 0
    kept = largest(values, 0.05)
    for row, found in zip(values, kept, strict=True):
        expected = torch.zeros_like(row)
        best = row.abs().topk(int(0.05 * width)).indices
        expected[best] = row[best]
        assert torch.equal(found, expected)


def test_it_says_what_it_holds() -> None:
    model = model_of()
    total = sum(p.numel() for p in model.parameters())
    routers = sum(p.numel() for name, p in model.named_parameters() if ".router." in name)
    for options, more in (({}, 4), ({"tau_dtype": "bfloat16"}, 2), ({"merge_every": 2}, 8)):
        algorithm = {"name": "online_merging", **FOLDERS, **options}
        found = predict(model.config, Problem(1, 8, device="cpu", algorithm=algorithm)).memory.optimizer
        assert found == 8 * total + more * (total - routers)
    stepped = case(merge_every=2).build()
    assert state_bytes(stepped.optimizer) > state_bytes(stepped.optimizer, stored=True)


def test_what_it_can_not_do_is_refused_by_name() -> None:
    kit = case().build().model
    asked = case()
    for other, told in (({"processes": 2}, "for one process"), ({"adapters": True}, "train.adapters trains factors")):
        with pytest.raises(ConfigError, match=told):
            COMPONENT.build(asked.options, asked.context(kit, **other))
    with pytest.raises(ConfigError, match="holds the same weights as the reference"):
        begin(COMPONENT.build(asked.options.__class__("here", "here"), asked.context(kit)))
    with pytest.raises(ConfigError, match=r"exclude: 'nrom\*' matches no parameter"):
        case(exclude=["nrom*"]).build()
    for wrong in ({"alpha": 1.0}, {"reserve_rate": 0.0}, {"method": "dare"}, {"merge_every": 0}):
        with pytest.raises(ConfigError):
            REGISTRY.select(OPTIMIZERS, {"name": "online_merging", **FOLDERS, **wrong}, "optimizer.algorithm")
    unread = COMPONENT.build(asked.options, asked.context(kit))
    for parameter in kit.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(CheckpointError, match=r"call begin\(\) before the first step"):
        unread.step()


WORDS = [
    "train/tiny_moe", "train.batch_size=2", "train.sequence_length=32", "train.threads=1", "train.save_every=2",
    "evaluation.sequences=2", "evaluation.sample_tokens=0", "data.source.domains=[code_py]",
    "data.source.max_bytes_per_domain=30000", "observers=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of one step, one that goes on from it, and one of another width."""
    folder = tmp_path_factory.mktemp("runs")
    found = {name: folder / name for name in ("base", "reference", "narrow")}
    run(found["base"], "train.steps=1")
    run(found["reference"], "train.steps=2", f"train.init_from={found['base']}")
    run(found["narrow"], "train.steps=1", "model.hidden_size=32")
    return found


def run(folder: Path, *words: str) -> None:
    session.train(moelab.load_config(*WORDS, f"run_dir={folder}", *words), progress=False)


def merging(trained: dict[str, Path], **options: Any) -> list[str]:
    said = {"name": "online_merging", "reference": trained["reference"], "before": trained["base"], **options}
    return [f"optimizer.algorithm={{{', '.join(f'{key}: {value}' for key, value in said.items())}}}"]


@pytest.mark.parametrize(
    "options", [{"reserve_rate": 0.5}, {"method": "onties", "reserve_rate": 0.5, "merge_every": 3}]
)
def test_a_run_goes_on_to_the_same_bits(trained: dict[str, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    words = ["train.steps=4", f"train.init_from={trained['reference']}", *merging(trained, alpha=1e-3, **options)]
    run(tmp_path / "run", *words)
    last = checkpoints(tmp_path / "run")[-1]
    kept = {name: (last / name).read_bytes() for name in (MODEL, TRAINING)}
    shutil.rmtree(last)
    run(tmp_path / "run", *words, "resume=true")
    assert {name: (last / name).read_bytes() for name in kept} == kept
    if "method" in options:
        return
    shutil.rmtree(last)
    elsewhere = tmp_path / "elsewhere"  # the folder is called the same and holds other weights
    shutil.move(trained["base"], elsewhere)
    try:
        shutil.copytree(trained["narrow"], trained["base"])
        with pytest.raises(ConfigError, match=r"before: .* is another model .*model.hidden_size: 64 here, 32 there"):
            run(tmp_path / "run", *words, "resume=true")
        shutil.rmtree(trained["base"])
        run(trained["base"], "train.steps=1", "seed=1")
        with pytest.raises(CheckpointError, match=r"was written with another optimizer.algorithm.reference or before"):
            run(tmp_path / "run", *words, "resume=true")
    finally:
        shutil.rmtree(trained["base"], ignore_errors=True)
        shutil.move(elsewhere, trained["base"])


def test_what_is_no_such_model_is_told_before_the_data(trained: dict[str, Path], tmp_path: Path) -> None:
    start = f"train.init_from={trained['reference']}"
    for other, told in (
        ({"before": trained["narrow"]}, r"optimizer.algorithm.before: .*narrow.* is another model"),
        ({"reference": tmp_path / "none"}, r"optimizer.algorithm.reference: .*none: no such folder"),
    ):
        with pytest.raises(moelab.UserError, match=told):
            run(tmp_path / "run", "train.steps=2", start, *merging(trained, **other), "data.source={name: text}")
        assert not (tmp_path / "run").exists()
