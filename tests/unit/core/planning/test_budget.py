"""`train.memory_budget`: what is chosen fits and is the cheapest that does, and what nothing fits is told once."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from moelab.config.alignment import AlignmentConfig
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import RunConfig, TrainConfig
from moelab.config.stages import StageConfig, in_stage
from moelab.errors import ConfigError
from moelab.planning.budget import EVERY, MARGIN, Choice, choose, price_of, write
from moelab.planning.memory import predict
from moelab.planning.of_run import problem_of
from moelab.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry(entry_points=False)


def _run(**train: object) -> RunConfig:
    layout = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = ModelConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, moe=MoEConfig(layout=layout),
    )  # fmt: skip
    return RunConfig(run_dir="x", model=model, train=TrainConfig(steps=1, batch_size=16, sequence_length=64, **train))


def _chosen(run: RunConfig, registry: Registry, budget: float) -> Choice:
    run.train.memory_budget = f"{budget:.0f}"
    return choose(run, registry, "cuda")


def _whole(registry: Registry, **train: object) -> float:
    """The budget that just holds the step as the config has it."""
    run = _run(**train)
    return predict(run.model, problem_of(run, "cuda"), registry).memory.peak / (1 - MARGIN) + 1


def test_where_everything_fits_nothing_is_computed_twice_or_in_pieces(registry: Registry) -> None:
    found = _chosen(_run(), registry, 1e12)
    assert (found.micro_batch_sizes, found.checkpointing, found.recompute_logits) == ((16,), 0, False)


def test_less_memory_is_never_cheaper_and_what_is_chosen_fits_by_the_plan(registry: Registry) -> None:
    prices, least = [], _whole(registry, micro_batch_size=1, activation_checkpointing=1, recompute_logits=True)
    for budget in (1e12, 1.5 * least, 1.2 * least, least):
        run = _run()
        found = _chosen(run, registry, budget)
        found.write(run)
        plan = predict(run.model, problem_of(run, "cuda"), registry).memory
        assert plan == found.memory
        assert plan.peak <= (1 - MARGIN) * budget
        prices.append(found.price)
    assert prices == sorted(prices)
    assert prices[0] < prices[-1]


def test_what_the_config_says_stays(registry: Registry) -> None:
    run = _run(micro_batch_size=8, recompute_logits=True)
    found = _chosen(run, registry, 1e12)
    assert (found.micro_batch_sizes, found.checkpointing, found.recompute_logits) == ((8,), 0, True)
    small = _whole(registry, micro_batch_size=8, recompute_logits=True, activation_checkpointing=2)
    assert _chosen(run, registry, small).micro_batch_sizes == (8,)
    assert _chosen(run, registry, small).checkpointing > 0
    fixed = _run(activation_checkpointing=3)
    assert _chosen(fixed, registry, 1e12).checkpointing == 3


def test_a_budget_that_nothing_fits_is_told_with_the_smallest_that_would(registry: Registry) -> None:
    with pytest.raises(ConfigError, match=r"^train\.memory_budget: 1000 is too little") as error:
        _chosen(_run(), registry, 1000)
    least = re.search(r"the least is ([\d.]+) GB", str(error.value))
    assert least is not None
    assert _chosen(_run(), registry, 1e9 * float(least[1])).memory.peak <= 1e9 * float(least[1])


def test_each_stage_has_a_micro_batch_of_its_own(registry: Registry) -> None:
    run = _run()
    run.stages = [StageConfig("short", 1, 32, 32), StageConfig("long", sequence_length=512, batch_size=32)]
    run.train.steps = 2
    found = _chosen(run, registry, _whole(registry, micro_batch_size=8) * 2)
    found.write(run)
    short, long = found.micro_batch_sizes
    assert short > long
    assert [stage.micro_batch_size for stage in run.stages] == [short, long]


def _two_stages() -> RunConfig:
    run = _run()
    run.stages = [StageConfig("short", 1, 32, 4), StageConfig("long", 1, sequence_length=256, batch_size=6)]
    run.train.steps = 2
    return run


@pytest.fixture(scope="module")
def every_way(registry: Registry) -> list[tuple[float, float]]:
    """(peak, price of a token) of all that the two stages could be together."""
    found, known = [], {}
    for short, long, every, logits in itertools.product((1, 2, 4), (1, 2, 3, 6), EVERY, (False, True)):
        each = _two_stages()
        write(each, (short, long), every, logits)
        stages = [replace(in_stage(each, number), stages=[]) for number in range(2)]
        for one in stages:
            if repr(one) not in known:  # 70 stages are 120 pairs
                peak = predict(one.model, problem_of(one, "cuda"), registry).memory.peak
                known[repr(one)] = peak, price_of(one, registry, "cuda")
        peaks, prices = zip(*(known[repr(one)] for one in stages), strict=True)
        tokens = [one.train.batch_size * one.train.sequence_length for one in stages]
        found.append((max(peaks), sum(p * n for p, n in zip(prices, tokens, strict=True)) / sum(tokens)))
    return found


@pytest.mark.parametrize("part", [0.45, 0.6, 0.8])
def test_what_is_chosen_for_stages_is_the_cheapest_of_all_that_they_could_be_together(
    part: float, registry: Registry, every_way: list[tuple[float, float]]
) -> None:
    budget = part * max(peak for peak, _ in every_way)
    chosen = _chosen(_two_stages(), registry, budget)
    assert chosen.price == pytest.approx(min(price for peak, price in every_way if peak <= (1 - MARGIN) * budget))


def test_many_stages_are_looked_at_one_by_one(registry: Registry) -> None:
    """Six of them with seven micro-batches each are a million together, hours to price."""
    run = _run()
    run.stages = [StageConfig(f"part {n}", 1, 16, 64) for n in range(6)]
    run.train.steps = 6
    found = _chosen(run, registry, _whole(registry, micro_batch_size=8))
    assert len(found.micro_batch_sizes) == 6
    with pytest.raises(ConfigError, match="too little for any way"):
        _chosen(run, registry, 1000)


@pytest.mark.parametrize("said", ["lots", "8 GBs", "0", "-3 GB"])
def test_what_is_no_size_is_refused(said: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.memory_budget: '.*' is no size; write 8 GB"):
        _run(memory_budget=said).check()


def test_post_training_which_is_not_planned_refuses_a_budget() -> None:
    run = _run(memory_budget="8 GB", init_from="runs/mine")
    run.alignment = [AlignmentConfig(stage="sft", data="chats.jsonl")]
    with pytest.raises(ConfigError, match=r"^train\.memory_budget: plans a step on text, and not the answers"):
        run.check()
