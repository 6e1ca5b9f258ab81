"""Whether what lies in a run's folder is the run that is planned, though a version before the newest key made it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from later_keys import later
from moelab.config.run import DataConfig, TrainConfig
from moelab.errors import UserError
from moelab_plugins.routers.softmax_topk import SoftmaxTopKOptions
from moelab_tools.sweep.plan import PlannedRun, plan_run
from moelab_tools.sweep.run import SweepRequest, refuse_changed, run_sweep
from moelab_tools.sweep.state import identity, state_of
from sweeping import TINY, InProcess, quiet

KEPT = Path(__file__).with_name("kept_run")  # as it was written before any key that is given here
HASH = "c5e58b912797294089f52ce21e9ab007f7b319302649ac9eb0c845928b7d5eca"  # which stamps of then hold
ARGUMENTS = [
    "seed=0", "train.steps=2", "train.batch_size=2", "train.sequence_length=32", "model.vocab_size=257",
    "model.hidden_size=16", "model.intermediate_size=48", "model.num_hidden_layers=1", "model.num_attention_heads=2",
    "model.num_key_value_heads=1", "model.max_position_embeddings=64",
    "model.moe={layout: {name: uniform, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16}}",
    "model.moe.router={name: softmax_topk, norm_topk_prob: true}", "entry_points=false",
]  # fmt: skip


def _planned(out: Path, *more: str) -> PlannedRun:
    run = plan_run("small", [*ARGUMENTS, *more], out)
    if not run.folder.is_dir():
        shutil.copytree(KEPT, run.folder)
    return run


def test_a_kept_run_is_the_one_that_is_planned_and_its_stamps_hold(tmp_path: Path) -> None:
    run = _planned(tmp_path)
    assert state_of(run).kind == "partial", state_of(run).why
    assert identity(run) == HASH


def test_a_key_and_an_option_that_came_later_make_no_other_run_of_it(tmp_path: Path) -> None:
    with (
        later(TrainConfig, "later", "float", 0.5),
        later(DataConfig, "later_list", "list[int] | None", None),
        later(SoftmaxTopKOptions, "later_option", "int", 3),
    ):
        run = _planned(tmp_path)
        assert run.tree()["train.later"] == 0.5, "the key is there"
        assert run.tree()["model.moe.router.later_option"] == 3, "the option too"
        assert state_of(run).kind == "partial", state_of(run).why
        assert identity(run) == HASH


def test_another_value_of_a_key_that_came_later_is_another_run(tmp_path: Path) -> None:
    with later(TrainConfig, "later", "float", 0.5), later(SoftmaxTopKOptions, "later_option", "int", 3):
        state = state_of(_planned(tmp_path, "train.later=2"))
        assert (state.kind, state.why) == ("changed", "train.later: 0.5 there, 2.0 here")
        state = state_of(_planned(tmp_path, "model.moe.router.later_option=4"))
        assert (state.kind, state.why) == ("changed", "model.moe.router.later_option: 3 there, 4 here")


def test_a_default_that_changed_is_told_as_one(tmp_path: Path) -> None:
    with later(TrainConfig, "grad_clip", "float", 0.25):
        state = state_of(_planned(tmp_path))
        assert state.why == "train.grad_clip: 1.0 there, 0.25 here by default"
        with pytest.raises(UserError, match=r"0\.25 here by default.*Give the values that are there \(KEY=VALUE\)"):
            refuse_changed({"small_seed0": state}, force=False)
        assert state_of(_planned(tmp_path, "train.grad_clip=1.0")).kind == "partial", "what the line says to do"


def test_a_sweep_within_a_memory_budget_goes_on(tmp_path: Path) -> None:
    """What the budget chose stands in the folder, and not in the plan."""
    request = SweepRequest([*TINY, "train.memory_budget=8 GB", "seed=0,1"], tmp_path / "sweep")
    run_sweep(request, quiet(), InProcess())
    worker = InProcess()
    run_sweep(request, quiet(), worker)
    assert not worker.started
