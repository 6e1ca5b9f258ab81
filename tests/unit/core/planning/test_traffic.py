"""What a device sends, from sizes and declarations alone, beside what real processes hand to their collectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import parallel_grid as grid
from collectives import Case, counted_steps
from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import ParallelConfig
from moelab.planning.machine import Machine
from moelab.planning.memory import predict
from moelab.planning.times import seconds_of
from moelab.planning.traffic import (
    EXCHANGE,
    GATHER,
    PARAMETERS,
    SUM,
    TOKENS,
    Collective,
    Problem,
    communication,
    units_of,
)
from processes import run_on


@pytest.mark.parametrize(
    ("router", "experts"),
    [
        ({"name": "softmax_topk"}, 2),
        ({"name": "null_experts", "num_null_experts": 8}, 1),
        ({"name": "mixture_of_depths", "capacity": 0.25}, 0.5),
    ],
)
def test_tokens_go_to_as_many_experts_as_the_routers_declare(router: dict[str, Any], experts: float) -> None:
    """Two layers; there and back, forward and backward; three quarters of 4 x 32 tokens leave their device."""
    layout = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    moe = MoEConfig(layout=layout, router=router, allow_noncausal=True)
    model = build_model(ModelConfig(64, 16, 32, 2, 2, 1, moe=moe), device="meta", seed=None)
    sent = communication(model, Problem(4, 32, parallel=ParallelConfig(shard=4, expert=4)))
    counts = 2 * 8 * 8  # of both layers' 8 experts
    assert sent.of(TOKENS) == (4 * (2 * 4 * 32 * experts * 16) * 4 + counts) * 3 / 4


def test_a_backend_that_computes_every_expert_sends_each_token_to_each() -> None:
    """Forward alone, there and back, beside the K; a layer that is computed again does it again; counts each time."""
    layout = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = ModelConfig(64, 16, 32, 1, 2, 1, moe=MoEConfig(layout=layout, backend={"name": "densemixer"}))
    mesh, tokens, row = ParallelConfig(shard=4, expert=4), 4 * 32, 16 * 4
    for checkpointing, passes in ((0, 1), (1, 2)):
        sent = predict(config, Problem(4, 32, parallel=mesh, checkpointing=checkpointing)).communication
        rows = tokens * 2 * 2 * (passes + 1) + tokens * 8 * 2 * passes
        assert sent.of(TOKENS) == (rows * row + 2 * passes * 8 * 8) * 3 / 4


def test_a_step_sends_what_the_formula_says(tmp_path: Path) -> None:
    """To the byte and the call, over all ranks: of one rank more tokens may leave than come.

    With one micro-batch a rank and with two, which a loss wants counted beforehand; with a layer computed twice; with
    layers that stay whole.
    """
    cases = [
        Case({"shard": 2}, batch=8, micro=4, length=24),
        Case({"shard": 2, "expert": 2}, batch=8, micro=2, length=24, dtype=torch.bfloat16, checkpointing=2),
        Case({"replicate": 2}, batch=8, micro=2, length=24),
        Case({"shard": 2, "accumulate": "pieces"}, batch=8, micro=2, length=24),
        Case({"shard": 2, "reshard_after_forward": False}, batch=8, micro=4, length=24),
        Case({"shard": 2, "expert": 2, "reshard_after_forward": False}, batch=8, micro=2, length=24, checkpointing=2),
    ]
    ranks = run_on(2, counted_steps, tmp_path, grid.model_config("softmax_global"), cases)
    for place, case in enumerate(cases):
        for kind in ranks[0][place]:
            rows = [rank[place][kind] for rank in ranks]
            formula, _, counted, calls, made = (sum(column) for column in zip(*rows, strict=True))
            assert (formula, calls) == (pytest.approx(counted, rel=1e-12), made), (case.parallel, kind)


def test_rows_are_padded_to_the_devices_tensor_by_tensor() -> None:
    """Of 8 experts each of two owners has 4, which 8 devices pad to 8."""
    layout = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 3}
    moe = MoEConfig(layout=layout, shared_expert={"name": "none"})
    model = build_model(ModelConfig(63, 16, 32, 1, 2, 1, moe=moe), device="meta", seed=None)
    units = units_of(model, ParallelConfig(shard=16, expert=2))
    assert units.banks == (8 * (6 * 16 + 3 * 16),)
    assert units.root == 2 * 64 * 16 + 16  # table and head of 63 rows, the norm
    assert units_of(model, ParallelConfig(shard=8, expert=4)).banks == (2 * (6 * 16 + 3 * 16),)


def test_a_ring_through_nodes_has_as_many_ways_out_as_devices_inside() -> None:
    """16 devices on two nodes of 8: 8 ways of 50 are slower than one of 450 inside; of 4 strided ones each has one."""
    machine = Machine(8, inside=450.0, between=50.0, latency_inside=1.0, latency_between=10.0)
    gather = Collective(PARAMETERS, GATHER, 16, 1, 1600.0, 1)
    assert seconds_of(gather, machine) == pytest.approx(1500 / 400 + 14 * 1 + 1 * 10)
    assert seconds_of(Collective(PARAMETERS, GATHER, 4, 8, 400.0, 1), machine) == pytest.approx(300 / 50 + 3 * 10)
    assert seconds_of(Collective(PARAMETERS, GATHER, 8, 1, 800.0, 2), machine) == pytest.approx(700 / 450 + 2 * 7)
    exchange = Collective(TOKENS, EXCHANGE, 16, 1, 1600.0, 3)
    assert seconds_of(exchange, machine) == pytest.approx(800 / 50 + 3 * 10)
    assert seconds_of(Collective("sums", SUM, 16, 1, 0.0, 1), machine) == pytest.approx(2 * 10 + 6 * 1)
