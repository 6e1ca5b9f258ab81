"""Neuron by neuron and moment by moment: a tensor made by a plan is what a loop over its numbers makes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from moelab.errors import ConfigError
from moelab.moe.surgery import ExpertRows, LayerPlan, NewExpert
from moelab.surgery.tensors import FIRST, SECOND, VALUES, LayerSurgery
from moelab.testing.surgeries import Held

E, F, D = 5, 6, 4
ROWS = ExpertRows(("weight", "bias", "shared"), "share", ("shared",))
COPY = NewExpert((1,), copies=2, weight=0.5)
HALF = NewExpert((3,), neurons=(np.array([5, 1, 4]),), down=2.0, weight=0.5, copies=2)
MEAN = NewExpert((0, 2), (0.25, 0.75), (np.array([0, 1, 2]), np.array([2, 0, 1])))
WIDE = LayerPlan((COPY, COPY, NewExpert((4,))), 2, F, exact=False, because="a test")
NARROW = LayerPlan((HALF, MEAN), 1, F // 2, exact=False, because="a test")


def _surgery(plan: LayerPlan) -> LayerSurgery:
    return LayerSurgery(1, plan, ROWS, E, F, seed=7)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def _neurons(expert: NewExpert) -> list[list[int]]:
    return [list(range(F))] * len(expert.sources) if expert.neurons is None else [of.tolist() for of in expert.neurons]


def _loop(plan: LayerPlan, old: Tensor, blocks: int, share: Callable[[NewExpert, int], float]) -> Tensor:
    """Number by number: new[e, b F' + f, d] = sum over sources of share * old[source, b F + neuron, d]."""
    width = plan.moe_intermediate_size
    new = torch.zeros(len(plan.experts), blocks * width, D, dtype=torch.float64)
    for e, expert in enumerate(plan.experts):
        for place, (source, neurons) in enumerate(zip(expert.sources, _neurons(expert), strict=True)):
            for block in range(blocks):
                for f, neuron in enumerate(neurons):
                    new[e, block * width + f] += share(expert, place) * old[source, block * F + neuron].double()
    return new


@pytest.mark.parametrize("plan", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize(("name", "blocks"), [("gate_up", 2), ("gate_up", 1), ("down", 1)])
def test_every_neuron_is_where_a_loop_puts_it(plan: LayerPlan, name: str, blocks: int) -> None:
    old = _random(E, blocks * F, D)
    made = _surgery(plan).make(f"experts.{name}", VALUES, Held(old))
    down = name == "down"
    wanted = _loop(plan, old, blocks, lambda expert, place: expert.shares[place] * (expert.down if down else 1))
    torch.testing.assert_close(made.double(), wanted, rtol=1e-6, atol=1e-7)
    if plan is WIDE:  # what is copied is copied to the bit
        assert torch.equal(made, old[[1, 1, 4]])


@pytest.mark.parametrize("plan", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_moments_are_those_of_a_known_multiple_of_the_gradient(plan: LayerPlan, name: str) -> None:
    """A factor d on down and a part w of the routing weight: w d for gate and up, w for down; sums over sources."""
    blocks = 2 if name == "gate_up" else 1
    old = _random(E, blocks * F, D).abs()

    def ratio(expert: NewExpert) -> float:
        return expert.weight * (expert.down if name == "gate_up" else 1)

    for moment, power in ((FIRST, 1), (SECOND, 2)):
        made = _surgery(plan).make(f"experts.{name}", moment, Held(old))
        wanted = _loop(plan, old, blocks, lambda expert, place, power=power: ratio(expert) ** power)
        torch.testing.assert_close(made.double(), wanted, rtol=1e-6, atol=1e-7)


def test_rows_of_the_router_follow_their_experts_and_those_behind_stay() -> None:
    old = _random(E + 2, D)  # two choices that are no experts
    made = _surgery(NARROW).make("router.weight", VALUES, Held(old))
    wanted = torch.stack([old[3], 0.25 * old[0] + 0.75 * old[2], old[5], old[6]])
    torch.testing.assert_close(made, wanted)
    first = _surgery(NARROW).make("router.weight", FIRST, Held(old))
    torch.testing.assert_close(first, torch.stack([old[3] / 2, old[0] + old[2], old[5], old[6]]))
    second = _surgery(NARROW).make("router.weight", SECOND, Held(old))
    torch.testing.assert_close(second, torch.stack([old[3] / 4, old[0] + old[2], old[5], old[6]]))
    bias = _random(E)
    torch.testing.assert_close(_surgery(WIDE).make("router.bias", VALUES, Held(bias)), bias[[1, 1, 4]])
    shared = _surgery(WIDE).make("router.shared", VALUES, Held(bias))
    torch.testing.assert_close(shared, bias[[1, 1, 4]] * torch.tensor([0.5, 0.5, 1.0]))


def test_biases_of_the_experts_add_up_to_what_they_were() -> None:
    """Each by its weight: w b' over the copies is b, whether they share the weight or each has all of it."""
    old = _random(E, D)
    whole = NewExpert((1,), copies=2, weight=1.0, down=0.5)
    plan = LayerPlan((COPY, COPY, whole, whole), 2, F, exact=False, because="a test")
    made = _surgery(plan).make("experts.down_bias", VALUES, Held(old))
    for pair, weight in ((made[:2], 0.5), (made[2:], 1.0)):
        torch.testing.assert_close(weight * pair.sum(0), old[1])
    up = _random(E, 2 * F)
    half = _surgery(NARROW).make("experts.gate_up_bias", VALUES, Held(up))
    torch.testing.assert_close(half[0], up[3, [5, 1, 4, 11, 7, 10]])


def test_noise_is_of_the_matrix_and_of_its_own_stream() -> None:
    old = _random(E, 2 * F, 500)
    noisy = NewExpert((1,), noise=0.1, row_noise=0.1)
    plan = LayerPlan((NewExpert((1,)), noisy, noisy), 1, F, exact=False, because="a test")
    surgery = _surgery(plan)
    made = surgery.make("experts.gate_up", VALUES, Held(old))
    assert torch.equal(made, surgery.make("experts.gate_up", VALUES, Held(old)))
    assert torch.equal(made[0], old[1])
    for expert in (1, 2):
        assert float((made[expert] - old[1]).std() / old[1].std()) == pytest.approx(0.1, rel=0.05)
    assert abs(float(torch.corrcoef(torch.stack([m.flatten() for m in made[1:] - old[1]]))[0, 1])) < 0.1
    bias = _random(E)
    assert torch.equal(surgery.make("router.bias", VALUES, Held(bias)), bias[[1, 1, 1]])  # it counts loads
    assert torch.equal(surgery.make("experts.gate_up", FIRST, Held(old))[1], old[1])


def test_the_type_stays_and_what_no_rule_is_about_is_refused() -> None:
    old = _random(E, 2 * F, D, dtype=torch.bfloat16)
    assert _surgery(NARROW).make("experts.gate_up", VALUES, Held(old)).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="layer 1: its experts hold 'scale', and surgery knows no rule"):
        _surgery(NARROW).make("experts.scale", VALUES, Held(old))
    with pytest.raises(ConfigError, match="holds whole numbers"):
        _surgery(NARROW).make("router.bias", VALUES, Held(torch.arange(E)))
