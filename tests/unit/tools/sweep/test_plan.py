"""What a sweep will run: names, checks before the first run, what seeds share, and matched variants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moelab.errors import ConfigError
from moelab.registry import Registry
from moelab.training.setup import Setup, prepare
from moelab_tools.sweep.axes import parse_words
from moelab_tools.sweep.matching import Matching
from moelab_tools.sweep.plan import plan_run, plan_runs, variant_names
from moelab_tools.sweep.run import SweepRequest, plan_sweep
from sweeping import TINY


def _names(*arguments: str) -> list[str]:
    words = parse_words(arguments)
    return variant_names(words, list(words.choices(of_seeds=False)))


def test_names_say_what_differs_and_hold_nothing_that_is_taken_for_something_else() -> None:
    assert _names("model.moe.router.name=hash,switch", "optimizer.lr=1e-3", "seed=0..1") == [
        "router-hash",
        "router-switch",
    ]
    assert _names("optimizer.lr=1e-3,.5", "a.x=1,-1")[-1] == "lr-.5_x-minus1"
    assert _names("a.width=1,2", "b.width=1,2")[0] == "a.width-1_b.width-1"
    assert _names("a.yaml", "seed=0..3") == ["a"]
    same = _names("x={a: 1},{a; 1},[a 1]")
    assert len(set(same)) == 3
    for name in _names("x={name: u, n: ~/é},../../b"):
        assert not set(name) & set("=/ {}:~,")


def test_every_run_of_a_sweep_is_checked_before_any_starts(tmp_path: Path) -> None:
    for wrong, told in (
        ("model.moe.router.nam=a,b", "no such"),
        ("model.moe.router.name=softmax_topk,softmaxtopk", "did you mean 'softmax_topk'"),
        ("optimizer.lr=1e-3,fast", "could not be converted to Float"),
        ("model.hidden_size=16,17", "num_attention_heads"),
        ("seed=0,-1", "seed"),
    ):
        with pytest.raises(ConfigError, match=told) as raised:
            plan_runs(parse_words([*TINY, wrong]), tmp_path / "out")
        assert wrong.split("=")[0].split(".")[0] in str(raised.value)
    assert not (tmp_path / "out").exists()


def _prepared(tmp_path: Path, *arguments: str) -> Setup:
    run = plan_run("x", [*TINY, *arguments], tmp_path)
    return prepare(run.config, Registry(entry_points=False))


def test_variants_of_a_seed_share_weights_where_shapes_agree_and_batches_always(tmp_path: Path) -> None:
    one = _prepared(tmp_path, "seed=3")
    other = _prepared(tmp_path, "seed=3", "model.moe.router.name=sigmoid_topk", "model.moe.layout.num_experts=6")
    seed = _prepared(tmp_path, "seed=4")
    mine, theirs, later = (dict(s.model.named_parameters()) for s in (one, other, seed))
    shared = [name for name in mine.keys() & theirs.keys() if mine[name].shape == theirs[name].shape]
    assert any("embed" in name for name in shared)
    assert any("shared" in name for name in shared)
    assert any("router" in name or "experts" in name for name in mine if name not in shared)
    for name in shared:
        assert torch.equal(mine[name], theirs[name]), name
    assert not torch.equal(mine["embed_tokens.weight"], later["embed_tokens.weight"])
    for step in range(3):
        first, second, third = (s.batches.batch(step).input_ids for s in (one, other, seed))
        assert torch.equal(first, second)
        assert not torch.equal(first, third), "the order of reading follows the seed"


def test_the_order_of_reading_can_be_held_still(tmp_path: Path) -> None:
    still = [_prepared(tmp_path, f"seed={seed}", "data.order_seed=0") for seed in (0, 1)]
    assert torch.equal(*(one.batches.batch(0).input_ids for one in still))


@pytest.mark.parametrize("measure", ["active", "total", "flops"])
def test_matched_variants_cost_what_the_reference_does(measure: str, tmp_path: Path) -> None:
    axis = "model.moe.layout.num_experts_per_tok=2,4" if measure != "total" else "model.moe.layout.num_experts=4,8"
    dense = "model.moe=null"
    request = SweepRequest([*TINY, axis, "seed=0..1"], tmp_path, matching=Matching(measure))
    planned, matches = plan_sweep(request)
    first, second = planned.values()
    assert [run.config.model.moe is not None for run in (*first, *second)] == [True] * 4
    assert first[0].config.model.moe is not None
    assert second[0].config.model.moe is not None
    assert second[1].config.model.moe is not None
    width = second[0].config.model.moe.layout["moe_intermediate_size"]
    assert width == second[1].config.model.moe.layout["moe_intermediate_size"] == 8
    assert abs(next(iter(matches.values())).error) < 0.02
    moe = "model.moe={layout: {name: uniform, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16}}"
    _, matches = plan_sweep(SweepRequest([*TINY, f"{moe},{dense.split('=')[1]}"], tmp_path, matching=Matching(measure)))
    assert abs(next(iter(matches.values())).error) < 0.02, "a dense variant by its FFN"


def test_what_is_compared_cannot_be_what_is_solved_for(tmp_path: Path) -> None:
    axis = "model.moe.layout.moe_intermediate_size=16,32"
    with pytest.raises(ConfigError, match="matching solves for it"):
        plan_sweep(SweepRequest([*TINY, axis], tmp_path, matching=Matching("active")))
    with pytest.raises(ConfigError, match="nothing to match"):
        plan_sweep(SweepRequest(TINY, tmp_path, matching=Matching("active")))
    with pytest.raises(ConfigError, match=r"--baseline none: no such variant.*lr-1e-3"):
        plan_sweep(SweepRequest([*TINY, "optimizer.lr=1e-3,2e-3"], tmp_path, baseline="none"))
