"""Shared experts, routers and scalings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moelab.errors import ConfigError
from moelab.hookspecs import OUTPUT_SCALINGS, ROUTER_INITIALISERS, SHARED_INITIALISERS
from moelab.initialisers import MATRICES, NO_SOURCE, PromptReader, UpcycleContext, redrawn_of
from moelab.moe.layout import ExpertLayout
from moelab_upcycling.dense import LoadedMatrix
from moelab_upcycling.top_k_mass import top_k_mass
from moelab_upcycling.worker import light_registry

REGISTRY = light_registry((), False, ())


def context(**keys: Any) -> UpcycleContext:
    facts: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 100, "layer_id": 0, "num_hidden_layers": 4,
        "layout": ExpertLayout(16, 8, 13), "shared_intermediate_size": 120,
        "norm_topk_prob": False, "initializer_range": 0.02, "seed": 0,
    }  # fmt: skip
    return UpcycleContext(**(facts | keys))


def shared(node: dict[str, Any], **keys: Any) -> Any:
    return REGISTRY.build(SHARED_INITIALISERS, node, context(**keys), "recipe.shared")


def router(node: dict[str, Any], **keys: Any) -> Any:
    return REGISTRY.build(ROUTER_INITIALISERS, node, context(**keys), "recipe.router")


def dense_ffn() -> dict[str, LoadedMatrix]:
    values = np.random.default_rng(0).standard_normal((3, 100, 32)).astype(np.float32)
    return {matrix: LoadedMatrix(values[i], "F32") for i, matrix in enumerate(MATRICES)}


def swiglu(ffn: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    g = x @ ffn["gate"].T.astype(np.float64)
    return (g / (1 + np.exp(-g)) * (x @ ffn["up"].T.astype(np.float64))) @ ffn["down"].astype(np.float64)


def made_ffn(part: Any) -> dict[str, np.ndarray]:
    plan, dense = part.plan(), dense_ffn()
    return {matrix: part.materialise(plan, matrix, dense[matrix]) for matrix in MATRICES}


@pytest.mark.parametrize("node", [{"name": "copy"}, {"name": "copy", "extra": "random"}, {"name": "qwen2"}], ids=str)
def test_what_a_shared_expert_redraws_is_what_it_makes_of_those_rows(node: dict[str, Any]):
    part = shared(node)
    plan, redrawn = part.plan(), redrawn_of(part)
    assert redrawn is not None
    for matrix, rows in made_ffn(part).items():
        changed, dense = plan.changed(matrix), dense_ffn()[matrix]
        assert np.array_equal(redrawn(plan, matrix, dense), rows[changed])
        assert np.array_equal(dense.values[plan.source[~changed]], rows[~changed])


X = np.random.default_rng(1).standard_normal((5, 32))
DENSE = swiglu({m: d.values for m, d in dense_ffn().items()}, X)


def test_the_copied_shared_expert_is_the_dense_ffn_with_silent_extra_neurons():
    part = shared({"name": "copy"})
    ffn = made_ffn(part)
    for matrix in MATRICES:
        assert np.array_equal(ffn[matrix][:100], dense_ffn()[matrix].values)
    assert not ffn["down"][100:].any()
    assert ffn["gate"][100:].std() == pytest.approx(1, rel=0.15)
    assert part.gain == 2
    assert np.all(part.gate() == np.float32(1e-12))
    assert part.gate().shape == (1, 32)


@pytest.mark.parametrize("name", ["copy", "dup"])
def test_the_shared_expert_alone_gives_the_dense_output(name: str):
    """sigmoid(1e-12 x) = 1/2, times the gain of 2."""
    part = shared({"name": name})
    gate = 1 / (1 + np.exp(-(X @ part.gate().T.astype(np.float64))))
    assert np.allclose(gate * part.gain * swiglu(made_ffn(part), X), DENSE, rtol=1e-9)


def test_the_gain_leaves_the_share_that_scaling_gives_to_the_routed_experts():
    assert shared({"name": "copy"}, routed_share=0.5).gain == 1
    assert shared({"name": "copy", "gain": 3.0}, routed_share=0.5).gain == 3
    assert shared({"name": "copy", "gate": "normal"}).gain == 1
    assert shared({"name": "copy", "gate": "normal"}).gate().std() == pytest.approx(0.02, rel=0.4)


def test_a_narrower_shared_expert_takes_distinct_neurons_and_says_so():
    part = shared({"name": "copy"}, shared_intermediate_size=40)
    assert len(set(part.plan().source.tolist())) == 40
    assert "40 of 100" in part.warnings[0]


def test_an_exact_zero_gate_is_warned_about():
    assert "llama.cpp" in shared({"name": "copy", "gate_value": 0}).warnings[0]


def test_the_qwen2_shared_expert_is_more_experts_from_the_same_copies():
    part = shared({"name": "qwen2"}, shared_intermediate_size=104)
    plan = part.plan()
    assert plan.redrawn["gate"].sum() == 8 * 6  # floor(13 / 2) of each of 8
    assert NO_SOURCE not in plan.source


def test_random_and_zero_shared_experts_use_no_dense_neuron():
    assert made_ffn(shared({"name": "random"}))["down"].std() == pytest.approx(0.02, rel=0.1)
    assert not made_ffn(shared({"name": "zero"}))["down"].any()
    assert made_ffn(shared({"name": "zero"}))["gate"].any()


@pytest.mark.parametrize(
    ("node", "std", "peak"),
    [
        ({"name": "normal"}, 0.02, 0.09),
        ({"name": "normal", "std": 0.1}, 0.1, 0.45),
        ({"name": "centred_uniform"}, 0.02, 0.04),
        ({"name": "uniform_linear"}, 32**-0.5 / 3**0.5, 32**-0.5),
        ({"name": "zeros"}, 0, 0),
        ({"name": "tied_groups"}, 0.02, 0.09),
    ],
)
def test_routers_have_their_spread(node: dict, std: float, peak: float):
    part = router(node, layout=ExpertLayout(64, 8, 13))
    weight = part.weight()
    assert weight.shape == (64, 32)
    assert weight.dtype == np.float32
    assert part.std == pytest.approx(std)
    assert weight.std() == pytest.approx(std, rel=0.12)
    assert np.abs(weight).max() <= peak


def test_a_centred_router_has_mean_zero_exactly():
    assert abs(router({"name": "centred_uniform"}).weight().astype(np.float64).mean()) < 1e-9


def test_tied_groups_repeat_each_row_for_a_whole_dense_ffn():
    weight = router({"name": "tied_groups"}).weight().reshape(2, 8, 32)  # ceil(100 / 13) = 8
    assert np.all(weight == weight[:, :1])
    assert not np.array_equal(weight[0, 0], weight[1, 0])


def test_a_router_from_prompts_points_at_their_embeddings():
    embedding = np.eye(32, dtype=np.float32)
    reader = PromptReader(
        encode=lambda text: [ord(c) - 97 for c in text],
        embed=lambda ids: embedding[list(ids)],
        hidden=lambda layer, texts: [],
    )
    part = router({"name": "cheap_embed", "positive": [["ab"], ["c"]], "negative": [[], ["d"]]},
                  layout=ExpertLayout(2, 1, 13))  # fmt: skip
    part.prepare(reader)
    weight = part.weight()
    assert np.allclose(weight[0, :4], [0.5**0.5, 0.5**0.5, 0, 0])
    assert np.allclose(weight[1, :4], [0, 0, 0.5**0.5, -(0.5**0.5)])
    with pytest.raises(ConfigError, match="each of the 16 experts, has 1"):
        router({"name": "cheap_embed", "positive": [["a"]]})


@pytest.mark.parametrize(("std", "mass"), [(0, 0.125), (0.5, 0.254), (1, 0.428), (1.2, 0.500), (2, 0.744)])
def test_the_expected_top_8_of_64_mass_is_the_measured_one(std: float, mass: float):
    """shared/reference: Monte Carlo of another program, three digits."""
    assert top_k_mass(64, 8, std, False) == pytest.approx(mass, abs=0.004)
    assert top_k_mass(64, 8, std, True) == 1


def test_scalings_are_the_published_factors():
    """NVIDIA's 59.2 for 7B -> 57B with integer granularity 8 is 64; the expected mass at logit std 1.2 gives 14.8."""
    where = context(intermediate_size=18944, layout=ExpertLayout(64, 8, 2560))
    build = lambda node, w=where: REGISTRY.build(OUTPUT_SCALINGS, node, w, "recipe.scaling")  # noqa: E731
    assert build({"name": "none"}).factors(where, 1.2) == {}
    assert build({"name": "virtual_group", "share": 1.0}).factors(where, 1.2) == {"down": 64}
    normed = context(intermediate_size=18944, layout=ExpertLayout(64, 8, 2560), norm_topk_prob=True)
    assert build({"name": "virtual_group", "share": 1.0}, normed).factors(normed, 1.2) == {"down": 8}
    mass = {"name": "expected_mass", "share": 1.0}
    assert build(mass | {"power_of_two": False}).factors(where, 1.2)["down"] == pytest.approx(14.8, rel=0.01)
    assert build(mass).factors(where, 1.2) == {"down": 16}
    spread = build(mass | {"power_of_two": False, "placement": "up_down"}).factors(where, 1.2)
    assert spread["up"] * spread["down"] == pytest.approx(14.8, rel=0.01)
