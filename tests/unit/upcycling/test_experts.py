"""The routed experts' initialisers: the invariants of the reference (I1 to I5, I9, I12), without any checkpoint."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from moelab.errors import ConfigError
from moelab.hookspecs import EXPERT_INITIALISERS
from moelab.initialisers import MATRICES, NO_SOURCE, ExpertInitialiser, UpcycleContext
from moelab.moe.layout import ExpertLayout
from moelab_upcycling.dense import LoadedMatrix
from moelab_upcycling.dtypes import from_float32, to_float32
from moelab_upcycling.streams import normal_table
from moelab_upcycling.worker import light_registry

REGISTRY = light_registry((), False, ())


def context(dense: int = 592, experts: int = 64, width: int = 80, top_k: int = 8, **keys: Any) -> UpcycleContext:
    facts: dict[str, Any] = {
        "hidden_size": 48, "intermediate_size": dense, "layer_id": 0, "num_hidden_layers": 4,
        "layout": ExpertLayout(experts, top_k, width), "shared_intermediate_size": 640,
        "norm_topk_prob": False, "initializer_range": 0.02, "seed": 0,
    }  # fmt: skip
    return UpcycleContext(**(facts | keys))


def build(node: dict[str, Any], where: UpcycleContext) -> ExpertInitialiser:
    return REGISTRY.build(EXPERT_INITIALISERS, node, where, "recipe.experts")


def dense_ffn(count: int, width: int = 48, dtype: str = "BF16") -> dict[str, LoadedMatrix]:
    """Each matrix and each neuron has a mean and a spread of its own."""
    generator = np.random.default_rng(0)
    found = {}
    for place, matrix in enumerate(MATRICES):
        spread = np.linspace(0.5, 2, count)[:, None] * (place + 1)
        values = generator.standard_normal((count, width)) * spread + np.linspace(-1, 2, count)[:, None]
        found[matrix] = LoadedMatrix(from_float32(values.astype(np.float32), dtype), dtype)
    return found


def test_every_dense_neuron_is_used_eight_or_nine_times_as_in_57b_a14b():
    """I3: 9 copies of 18944 make 64 experts of 2560; 6,656 neurons occur 8 times and 12,288 nine times."""
    experts = build({"name": "qwen2"}, context(18944, 64, 2560))
    coverage = Counter(np.concatenate([experts.plan(e).source for e in range(64)]).tolist())
    assert Counter(coverage.values()) == {8: 6656, 9: 12288}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("dense", "experts", "width"), [(592, 64, 80), (100, 7, 99), (100, 9, 100), (64, 5, 33)])
def test_no_expert_holds_a_neuron_twice(dense: int, experts: int, width: int, seed: int):
    """I4, and coverage stays floor or ceil of the expansion."""
    made = build({"name": "qwen2"}, context(dense, experts, width, 1, seed=seed))
    sources = [made.plan(e).source.tolist() for e in range(experts)]
    assert all(len(set(source)) == width for source in sources)
    counts = Counter(j for source in sources for j in source)
    low = experts * width // dense
    assert {counts[j] for j in range(dense)} <= {low, low + 1}


def test_without_deduplication_straddling_experts_hold_twins():
    made = build({"name": "qwen2", "dedup": False}, context())
    assert any(len(set(made.plan(e).source.tolist())) < 80 for e in range(64))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("width", [80, 81, 10])
def test_exactly_the_floor_of_the_fraction_is_redrawn(fraction: float, width: int):
    """I2."""
    made = build({"name": "qwen2", "reinit_fraction": fraction}, context(width=width))
    redrawn = int(round(fraction * 100) * width // 100)
    assert {int(made.plan(e).redrawn["gate"].sum()) for e in range(64)} == {redrawn}


def test_the_source_assignment_does_not_depend_on_the_fraction():
    half, none = (build({"name": "qwen2", "reinit_fraction": r}, context()) for r in (0.5, 0.0))
    assert all(np.array_equal(half.plan(e).source, none.plan(e).source) for e in range(64))


@pytest.mark.parametrize("name", ["qwen2", "drop", "mix"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_neuron_is_kept_whole_or_redrawn_whole(name: str, dtype: str):
    """I1: gate row, up row and down column are all the same dense neuron's, bit for bit, or none is."""
    where = context(num_sources=2 if name == "mix" else 1)
    made, dense = build({"name": name, "reinit_fraction": 0.5}, where), dense_ffn(592, dtype=dtype)
    for e in (0, 7, 63):
        plan = made.plan(e)
        equal = []
        for matrix in MATRICES:
            out = made.materialise(plan, e, matrix, dense[matrix])
            equal.append((out == dense[matrix].values[plan.source]).all(axis=1))
        assert np.array_equal(equal[0], ~plan.redrawn["gate"])
        assert np.array_equal(equal[0], equal[1])
        assert np.array_equal(equal[0], equal[2])
        assert plan.redrawn["gate"].sum() == 40


@pytest.mark.parametrize("name", ["qwen2", "drop"])
def test_redrawn_values_have_the_statistics_of_what_they_replace(name: str):
    """I5: by expert and matrix, within 5 standard errors; the dense matrix as a whole has others."""
    made, dense = build({"name": name}, context(width=160)), dense_ffn(592, 256)
    for e in (0, 5):
        plan = made.plan(e)
        for matrix in MATRICES:
            rows = np.flatnonzero(plan.redrawn[matrix])
            out = made.materialise(plan, e, matrix, dense[matrix])
            new = to_float32(out[rows], "BF16").astype(np.float64)
            old = dense[matrix].float32(plan.source[rows]).astype(np.float64)
            mean, std, n = old.mean(), old.std(ddof=1), old.size
            assert abs(new.mean() - mean) < 5 * std / n**0.5
            assert abs(new.std(ddof=1) - std) < 5 * std / (2 * n) ** 0.5
            assert np.isin(out[rows], normal_table(float(mean), float(std), "BF16")).all()


def test_statistics_of_the_dense_matrix_or_the_config_can_be_chosen():
    dense = dense_ffn(592, 256)["up"]
    for kind, std in (("dense", to_float32(dense.values, "BF16").std()), ("config", 0.02)):
        made = build({"name": "qwen2", "statistics": kind}, context())
        plan = made.plan(0)
        new = to_float32(made.materialise(plan, 0, "up", dense)[plan.redrawn["up"]], "BF16")
        assert new.std() == pytest.approx(std, rel=0.03)


def test_redrawn_blocks_are_never_equal_and_not_correlated():
    """I12: over layers, experts and matrices."""
    dense = dense_ffn(592)["gate"]
    blocks = []
    for layer_id in (0, 1):
        made = build({"name": "qwen2"}, context(layer_id=layer_id))
        for e in (0, 1):
            plan = made.plan(e)
            for matrix in MATRICES:
                values = made.materialise(plan, e, matrix, dense)[plan.redrawn[matrix]]
                blocks.append(to_float32(values, "BF16").ravel())
    correlation = np.corrcoef(np.stack(blocks))
    off = correlation[~np.eye(len(blocks), dtype=bool)]
    assert np.abs(off).max() < 5 / len(blocks[0]) ** 0.5


@pytest.mark.parametrize("name", ["qwen2", "drop"])
def test_independent_sets_keep_an_eighth_of_the_neurons_whole(name: str):
    """What Drop-Upcycling's published code does: at one half, (1/2)^3 of the neurons survive in all three."""
    made = build({"name": name, "index_sets": "independent"}, context(width=592, experts=8, top_k=2))
    whole = [np.mean(~np.logical_or.reduce([made.plan(e).redrawn[m] for m in MATRICES])) for e in range(8)]
    assert abs(np.mean(whole) - 1 / 8) < 0.03


def test_elementwise_redrawing_leaves_no_neuron_whole():
    made, dense = build({"name": "qwen2", "mode": "element"}, context()), dense_ffn(592)["gate"]
    plan = made.plan(3)
    kept = made.materialise(plan, 3, "gate", dense) == dense.values[plan.source]
    assert not kept.all(axis=1).any()
    assert abs(kept.mean() - 0.5) < 0.05


def test_noise_is_added_to_the_marked_neurons_only():
    made = build({"name": "noise", "sigma": 0.25}, context())
    dense = dense_ffn(592, dtype="F32")["up"]
    plan = made.plan(2)
    difference = made.materialise(plan, 2, "up", dense) - dense.values[plan.source]
    noisy = plan.redrawn["up"]
    assert noisy.sum() == 40
    assert not difference[~noisy].any()
    assert difference[noisy].std() == pytest.approx(0.25, rel=0.06)  # 1920 values: 2 standard errors
    assert not np.array_equal(plan.redrawn["up"], plan.redrawn["gate"])


def activations(gate: np.ndarray, up: np.ndarray, x: np.ndarray) -> np.ndarray:
    g = x @ gate.T
    return g / (1 + np.exp(-g)) * (x @ up.T)


def outputs(made: ExpertInitialiser, experts: int, dense: dict[str, LoadedMatrix], x: np.ndarray) -> list[np.ndarray]:
    """Each expert's own output, in float64."""
    found = []
    for e in range(experts):
        plan = made.plan(e)
        gate, up, down = (
            to_float32(made.materialise(plan, e, m, dense[m]), dense[m].dtype).astype(np.float64) for m in MATRICES
        )
        found.append(activations(gate, up, x) @ down)
    return found


def dense_output(dense: dict[str, LoadedMatrix], x: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    gate, up, down = (to_float32(dense[m].values, dense[m].dtype).astype(np.float64) for m in MATRICES)
    a = activations(gate, up, x)
    return (a if weight is None else a * weight) @ down


X = np.random.default_rng(1).standard_normal((4, 48)) * 0.2


def test_without_redrawing_the_experts_sum_to_the_neurons_times_their_coverage():
    """I9."""
    made, dense = build({"name": "qwen2", "reinit_fraction": 0}, context()), dense_ffn(592)
    coverage = np.bincount(np.concatenate([made.plan(e).source for e in range(64)]), minlength=592)
    assert np.allclose(sum(outputs(made, 64, dense, X)), dense_output(dense, X, coverage), rtol=1e-10)


@pytest.mark.parametrize("by", ["contiguous", "random", "kmeans"])
def test_a_split_uses_each_neuron_once_and_sums_to_the_dense_ffn(by: str):
    made, dense = build({"name": "split", "by": by}, context(592, 8, 74, 2)), dense_ffn(592)
    if hasattr(made, "prepare"):
        made.prepare(dense.__getitem__)
    assert sorted(np.concatenate([made.plan(e).source for e in range(8)]).tolist()) == list(range(592))
    assert np.allclose(sum(outputs(made, 8, dense, X)), dense_output(dense, X), rtol=1e-10)


def test_kmeans_finds_clusters_that_are_there():
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((4, 48))
    label = generator.permutation(np.repeat(np.arange(4), 20))
    values = (centres[label] + 0.1 * generator.standard_normal((80, 48))).astype(np.float32)
    made = build({"name": "split", "by": "kmeans"}, context(80, 4, 20, 2, seed=3))
    made.prepare(lambda matrix: LoadedMatrix(values, "F32"))
    assert all(len(set(label[made.plan(e).source])) == 1 for e in range(4))


def test_virtual_groups_each_make_up_the_dense_ffn():
    """I10: any run of G = 8 experts, shards padded from 592 to 640 neurons whose down is zero."""
    made, dense = build({"name": "virtual_group"}, context()), dense_ffn(592)
    found = outputs(made, 64, dense, X)
    for first in (0, 8, 56):
        assert np.allclose(sum(found[first : first + 8]), dense_output(dense, X), rtol=1e-10)
    assert sum(int((made.plan(e).source == NO_SOURCE).sum()) for e in range(8)) == 48
    for matrix in MATRICES:
        first, again = (made.materialise(made.plan(e), e, matrix, dense[matrix]) for e in (3, 11))
        assert np.array_equal(first, again)


def test_sparse_experts_are_the_dense_ffn_also_shuffled():
    for shuffle in (False, True):
        made = build({"name": "sparse", "shuffle": shuffle}, context(592, 4, 592, 2))
        dense = dense_ffn(592)
        assert all(np.allclose(y, dense_output(dense, X), rtol=1e-10) for y in outputs(made, 4, dense, X))


def test_mixed_experts_come_from_their_source():
    block = build({"name": "mix"}, context(592, 6, 592, 2, num_sources=3))
    assert [block.plan(e).checkpoint for e in range(6)] == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(block.plan(4).source, np.arange(592))
    turns = build({"name": "mix", "assign": "interleaved"}, context(num_sources=3))
    assert [turns.plan(e).checkpoint for e in range(4)] == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("node", "where", "words"),
    [
        ({"name": "sparse"}, context(), "moe_intermediate_size must be the dense FFN's 592, not 80"),
        ({"name": "split"}, context(), "64 of 80 make 5120"),
        ({"name": "virtual_group"}, context(experts=60), "8 experts of 80, which does not divide num_experts 60"),
        ({"name": "mix"}, context(), "source=[DIR, DIR"),
        ({"name": "qwen2"}, context(width=600), "twins"),
        ({"name": "qwen2", "reinit_fraction": 1.5}, context(), "must be in 0 .. 1, not 1.5"),
        ({"name": "qwen2", "mode": "row"}, context(), "neuron, element, not 'row'"),
        ({"name": "qwen3"}, context(), "did you mean 'qwen2'?"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_with_the_cure(node: dict, where: UpcycleContext, words: str):
    with pytest.raises(ConfigError) as error:
        build(node, where)
    assert words in str(error.value)
    assert "recipe.experts" in str(error.value)


def test_svd_moves_the_small_singular_values_alone_and_each_copy_its_own_way() -> None:
    """Of a shard: the same vectors, the same `kept` largest values, and noise of `scale` means on the others."""
    where, ffn = context(96, 8, 24), dense_ffn(96, dtype="F32")
    plain, moved = build({"name": "virtual_group"}, where), build({"name": "svd", "kept": 3, "scale": 0.2}, where)
    noise = []
    for expert in (1, 5):  # copies of one shard of four
        plan = moved.plan(expert)
        assert np.array_equal(plan.source, plain.plan(1).source)
        for matrix in MATRICES:
            before = plain.materialise(plan, expert, matrix, ffn[matrix]).astype(np.float64)
            left, values, right = np.linalg.svd(before, full_matrices=False)
            made = left.T @ np.asarray(moved.materialise(plan, expert, matrix, ffn[matrix]), np.float64) @ right.T
            scale = 1e-5 * values[0]
            assert np.abs(made - np.diag(np.diag(made))).max() < scale
            assert np.abs(np.diag(made)[:3] - values[:3]).max() < scale
            noise.append((np.diag(made)[3:] - values[3:]) / values[3:].mean())
    assert np.std(noise) == pytest.approx(0.2, rel=0.25)
    assert abs(np.corrcoef(noise)[np.triu_indices(6, 1)]).max() < 0.8
    silent = build({"name": "svd"}, context(90, 8, 24))  # the last shard is filled up
    plans = [silent.plan(expert) for expert in range(4)]
    for expert, plan in enumerate(plans):
        down = np.asarray(silent.materialise(plan, expert, "down", dense_ffn(90, dtype="F32")["down"]))
        assert not down[plan.source == NO_SOURCE].any()
    assert sum((plan.source == NO_SOURCE).sum() for plan in plans) == 6
    same = build({"name": "svd", "scale": 0}, where)
    for matrix in MATRICES:
        one, other = (part.materialise(part.plan(2), 2, matrix, ffn[matrix]) for part in (same, plain))
        assert np.array_equal(one, other)


def difference(made: ExpertInitialiser, expert: int, matrix: str, ffn: dict[str, LoadedMatrix]) -> np.ndarray:
    """What an expert has beyond the dense FFN."""
    values = made.materialise(made.plan(expert), expert, matrix, ffn[matrix])
    return np.asarray(values, np.float64) - ffn[matrix].values


def test_experts_of_one_source_are_the_ffn_and_a_sparse_difference_of_their_own() -> None:
    """Exactly the asked share of each row, drawn with the asked spread; one hundredth of 48 is a half: at least one."""
    ffn, where = dense_ffn(96, dtype="F32"), context(96, 4, 96)
    made = build({"name": "deltas", "density": 0.25, "scale": 0.1}, where)
    for matrix in MATRICES:
        first, second = (difference(made, expert, matrix, ffn) for expert in (0, 3))
        assert ((first != 0).sum(1) == 12).all()
        assert ((first != 0) != (second != 0)).any()
        spread = first[first != 0].std() / ffn[matrix].values.std()
        assert spread == pytest.approx(0.1, rel=0.1)
    fewest = difference(build({"name": "deltas"}, where), 0, "up", ffn)
    assert ((fewest != 0).sum(1) == 1).all()


def test_experts_of_one_source_are_the_ffn_and_a_difference_of_low_rank() -> None:
    ffn = dense_ffn(96, dtype="F32")
    made = build({"name": "deltas", "form": "low_rank", "rank": 3, "scale": 0.1}, context(96, 4, 96))
    for matrix in MATRICES:
        sizes = np.linalg.svd(difference(made, 1, matrix, ffn), compute_uv=False)
        assert sizes[3] < 1e-5 * sizes[0]  # rounding of the sum
        assert np.sqrt((sizes**2).mean() / 96) / ffn[matrix].values.std() == pytest.approx(0.1, rel=0.5)
        assert sizes[2] > 0.1 * sizes[0]


def test_without_a_difference_they_are_the_dense_function_and_say_so() -> None:
    ffn = dense_ffn(96)
    made = build({"name": "deltas", "scale": 0.0}, context(96, 4, 96, norm_topk_prob=True))
    assert np.array_equal(made.materialise(made.plan(2), 2, "down", ffn["down"]), ffn["down"].values)
    assert made.keeps_with == {"shared": ("zero",), "scaling": ("none",)}
    assert build({"name": "deltas"}, context(96, 4, 96, norm_topk_prob=True)).keeps_with is None


@pytest.mark.parametrize(
    ("node", "error"),
    [
        ({"form": "sparse", "density": 0.25}, None),
        ({"form": "sparse", "density": 1.0}, 0.0),
        ({"form": "low_rank", "rank": 5}, None),
        ({"form": "low_rank", "rank": 48}, 0.0),
        ({"form": "quantised", "bits": 3}, None),
        ({"form": "quantised", "bits": 8}, None),
    ],
    ids=str,
)
def test_of_several_sources_what_each_has_beyond_the_first_is_made_light(node: dict, error: float | None) -> None:
    """No form of that lightness is nearer: the largest values, the first singular ones, the nearest levels."""
    base, others = dense_ffn(96, dtype="F32"), []
    for seed in (1, 2):
        drawn = np.random.default_rng(seed).normal(0, 0.1, (96, 48)).astype(np.float32)
        others.append({matrix: LoadedMatrix(base[matrix].values + drawn, "F32") for matrix in MATRICES})
    made = build({"name": "deltas", **node}, context(96, 5, 96, num_sources=3))
    made.prepare(lambda matrix: base[matrix])
    assert [made.plan(expert).checkpoint for expert in range(5)] == [1, 2, 1, 2, 1]
    for expert in (0, 3):
        true = others[expert % 2]["up"].values.astype(np.float64) - base["up"].values
        plan = made.plan(expert)
        values = made.materialise(plan, expert, "up", others[expert % 2]["up"])
        found = np.asarray(values, np.float64) - base["up"].values
        left = np.abs(found - true)
        if error is not None:
            assert left.max() < 1e-5
        elif node["form"] == "sparse":
            assert ((found != 0).sum(1) == 12).all()
            kept, gone = np.where(found != 0, np.abs(true), np.inf), np.where(found == 0, np.abs(true), 0)
            assert (kept.min(1) >= gone.max(1) - 1e-6).all()
            assert left[found != 0].max() < 1e-5
        elif node["form"] == "low_rank":
            rest = np.linalg.svd(true, compute_uv=False)[5:]
            assert np.sqrt((left**2).sum()) == pytest.approx(np.sqrt((rest**2).sum()), rel=1e-4)
        else:
            step = np.abs(true).max(1, keepdims=True) / (2 ** (node["bits"] - 1) - 1)
            assert (left <= step / 2 + 1e-5).all()
            assert all(len(np.unique(np.rint(row))) <= 2 ** node["bits"] - 1 for row in found / step)


@pytest.mark.parametrize(
    ("node", "where", "words"),
    [
        ({"name": "deltas"}, context(96, 4, 48), "must be the dense FFN's 96, not 48"),
        ({"name": "deltas", "form": "quantised"}, context(96, 4, 96), "is of several sources"),
        ({"name": "deltas", "density": 0.0}, context(96, 4, 96), "density must be above 0"),
        ({"name": "deltas", "bits": 1}, context(96, 4, 96), "bits must be in 2 .. 8"),
        ({"name": "deltas", "rank": 0}, context(96, 4, 96), "rank must be at least 1"),
    ],
)
def test_differences_that_can_not_be_are_refused(node: dict, where: UpcycleContext, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(node, where)
