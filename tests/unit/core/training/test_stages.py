"""Stages: what a run of several lengths is in each of them, and that it is one run to the bit, stopped or not."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from moelab.checkpoint import read_run_config
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import RunConfig
from moelab.config.stages import StageConfig, planned_tokens
from moelab.data.batches import TrainBatches
from moelab.errors import ConfigError
from moelab.loading import load
from moelab.moe.probe import Probe
from moelab.registry import Registry
from moelab.training.borders import enter, number_at
from moelab.training.setup import Setup, prepare
from moelab.training.trainer import train

SHORT: dict[str, Any] = {"sequence_length": 16, "batch_size": 4, "rope_theta": 1e4, "max_position_embeddings": 16}
LONG: dict[str, Any] = {"sequence_length": 32, "batch_size": 2, "rope_theta": 1e6, "max_position_embeddings": 32}
OF_THE_MACHINE = ("seconds", "perf/")


@pytest.fixture
def staged(small_run: RunConfig) -> RunConfig:
    """Three steps short, three long, every checkpoint kept."""
    small_run.model = copy.deepcopy(small_run.model)
    small_run.train.save_every, small_run.train.keep_checkpoints = 1, 0
    small_run.optimizer.lr = 1e-2
    small_run.stages = [StageConfig("short", 3, **SHORT), StageConfig("long", **LONG)]
    small_run.check()
    return small_run


def _prepared(config: RunConfig) -> Setup:
    return prepare(config, Registry(entry_points=False))


def _rows(run: Path, *, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """metrics.jsonl, but for what hangs on the machine."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    gone = (*OF_THE_MACHINE, *without)
    return [{key: value for key, value in row.items() if not key.startswith(gone)} for row in rows]


def _bytes(checkpoint: Path) -> list[bytes]:
    return [(checkpoint / name).read_bytes() for name in ("model.safetensors", "training.safetensors", "config.yaml")]


def _checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def test_two_stages_alike_are_the_run_without_stages_to_the_bit(small_run: RunConfig, tmp_path: Path) -> None:
    plain = train(small_run)
    small_run.run_dir = str(tmp_path / "staged")
    own = {"sequence_length": 16, "batch_size": 2, "lr": small_run.optimizer.lr}
    small_run.stages = [StageConfig("a", 2, **own), StageConfig("b", **own)]
    staged = train(small_run)
    assert _bytes(_checkpoint(plain, 6))[:2] == _bytes(_checkpoint(staged, 6))[:2]
    told = ("train/stage", "train/sequence_length", "train/rope_theta")
    assert _rows(plain) == _rows(staged, without=told)


def test_each_stage_tells_how_full_its_sequences_are(staged: RunConfig) -> None:
    staged.data.packing = "best_fit"
    run = train(staged)
    fills = [stage["packing"] for stage in json.loads((run / "summary.json").read_text())["stages"]]
    sequences = [fill["sequences"] for fill in fills]
    assert sequences[0] > sequences[1] > 0, "of 16 tokens, and of 32"
    log = (run / "log.txt").read_text()
    for name, fill in zip(("short", "long"), fills, strict=True):
        assert f"stage '{name}'" in log
        assert f" in {fill['sequences']:,} sequences, {fill['fill_rate']:.1%} of positions filled" in log
    assert "data.packing best_fit" not in log, "one stage's, as if it were the run's"


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_run_stopped_in_a_stage_or_at_a_border_resumes_to_the_same_bits(
    staged: RunConfig, tmp_path: Path, step: int
) -> None:
    whole = train(staged)
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    (stopped / "summary.json").unlink()
    for later in range(step + 1, 7):
        shutil.rmtree(_checkpoint(stopped, later))
    staged.run_dir, staged.resume = str(stopped), True
    train(staged)
    for after in range(step + 1, 7):
        theirs, ours = _bytes(_checkpoint(whole, after)), _bytes(_checkpoint(stopped, after))
        assert theirs[:2] == ours[:2], after
    assert _rows(whole) == _rows(stopped)
    facts = [json.loads((run / "summary.json").read_text()) for run in (whole, stopped)]
    for key in ("stages", "data", "flops", "flops_declared", "tokens", "flops_per_token"):
        assert facts[0][key] == facts[1][key], key


def test_each_checkpoint_says_the_model_that_its_stage_trained(staged: RunConfig) -> None:
    run = train(staged)
    for step, said in {2: SHORT, 3: SHORT, 4: LONG, 6: LONG}.items():
        config = read_run_config(_checkpoint(run, step))
        assert config.train.sequence_length == said["sequence_length"]
        for model in (config.model, load(_checkpoint(run, step)).config):
            assert (model.rope_theta, model.max_position_embeddings) == (
                said["rope_theta"],
                said["max_position_embeddings"],
            )
    assert len(read_run_config(_checkpoint(run, 6)).stages) == 2


def test_flops_count_each_token_at_the_length_of_its_stage(staged: RunConfig) -> None:
    run = train(staged)
    summary = json.loads((run / "summary.json").read_text())
    short, long = summary["stages"]
    tokens = 3 * 4 * 16, 3 * 2 * 32
    assert summary["tokens"] == planned_tokens(staged) == sum(tokens)
    width = staged.model.num_attention_heads * staged.model.attention_head_dim  # 3 passes, 2 products, S / 2 keys
    assert long["flops_per_token"] - short["flops_per_token"] == 3 * 2 * (32 - 16) * width
    expected = tokens[0] * short["flops_per_token"] + tokens[1] * long["flops_per_token"]
    assert summary["flops"] == summary["flops_declared"] == expected
    assert summary["data"]["sequence_length"] == 32


def test_borders_are_logged_steps_that_say_their_stage(staged: RunConfig) -> None:
    run = train(staged)
    seen = {row["step"]: row for row in _rows(run) if "train/stage" in row}
    assert {step: row["train/stage"] for step, row in seen.items()} == {2: 1, 3: 1, 4: 2, 6: 2}
    assert [seen[step]["train/sequence_length"] for step in (3, 4)] == [16, 32]
    assert [seen[step]["train/rope_theta"] for step in (3, 4)] == [1e4, 1e6]
    positions = {row["step"]: sum(key.startswith("eval_position") for key in row) for row in _rows(run)}
    assert positions[6] > positions[3] > 0, "evaluated at a stage's end, at its length"
    assert "stage 2 of 2: 'long', after step 3 up to step 6: 2 sequences of 32" in (run / "log.txt").read_text()


def test_probes_look_at_one_text_through_all_stages(staged: RunConfig) -> None:
    class Watching:
        seen: ClassVar[list[torch.Tensor]] = []

        def on_probe(self, step: int, probe: Probe) -> dict[str, float]:
            self.seen.append(probe.token_id)
            return {}

    layout = {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    staged.model.moe = MoEConfig(layout=layout)
    staged.train.probe_every = 2
    train(staged, observers=[Watching()])
    assert len(Watching.seen) == 4, "before the first step, and at steps 2, 4 and 6"
    assert all(torch.equal(one, Watching.seen[0]) for one in Watching.seen)


def test_a_stage_has_its_batches_positions_and_rate(staged: RunConfig) -> None:
    staged.stages[0].rope_scaling = {"name": "none"}
    staged.stages[1].rope_scaling = {"name": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    staged.stages[0].lr, staged.stages[1].lr = 1e-2, 1e-3
    setup = _prepared(staged)
    assert [number_at(setup, step) for step in (0, 2, 3, 5)] == [0, 0, 1, 1]
    assert setup.model.rope.scaling is None
    assert (setup.model.rope.rope_theta, setup.config.optimizer.lr, setup.end) == (1e4, 1e-2, 3)
    later = enter(setup, 1)
    assert later.model.rope.scaling is not None
    assert (later.model.rope.rope_theta, later.config.optimizer.lr, later.end) == (1e6, 1e-3, 6)
    alone = TrainBatches(setup.corpus.train, 2, 32, staged.order_seed)
    assert torch.equal(later.batches.batch(4).input_ids, alone.batch(4).input_ids)
    assert later.step_settings.micro_batch_size == 2


def test_a_stage_may_read_another_mixture(staged: RunConfig, tmp_path: Path) -> None:
    for name in ("prose", "code"):
        rows = (json.dumps({"text": f"{name} {n} " + f"{name[::-1]} {n * n} " * 9}) + "\n" for n in range(20))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    staged.data.source = {"name": "jsonl", "paths": [str(tmp_path / "prose.jsonl"), str(tmp_path / "code.jsonl")]}
    for stage, name in zip(staged.stages, ("prose", "code"), strict=True):
        stage.mixer = {"name": "weights", "weights": {name: 1.0}}
    run = train(staged)
    read = {row["step"]: row for row in _rows(run) if "data/read/code" in row}
    assert [read[step]["data/read/code"] for step in (3, 4, 6)] == [0.0, 1.0, 1.0]
    short, long = json.loads((run / "summary.json").read_text())["stages"]
    assert (short["mixture"]["prose"]["read"], long["mixture"]["code"]["read"]) == (1.0, 1.0)
    record = json.loads((_checkpoint(run, 6) / "moelab_data.json").read_text())
    assert record


def test_weights_to_start_from_are_held_against_the_first_stage(staged: RunConfig, tmp_path: Path) -> None:
    run = train(staged)
    staged.run_dir, staged.train.init_from = str(tmp_path / "next"), str(_checkpoint(run, 3))
    assert _prepared(staged).start.overrides == {}
    staged.train.init_from = str(_checkpoint(run, 6))
    with pytest.raises(ConfigError, match=r"^model.rope_theta: .* 10000.0 here, 1000000.0 there"):
        _prepared(staged)


def test_resuming_under_other_stages_is_refused(staged: RunConfig) -> None:
    train(staged)
    staged.resume, staged.stages[1].rope_theta = True, 5e5
    with pytest.raises(ConfigError, match=r"stages.1.rope_theta: 1000000.0 then, 500000.0 now"):
        train(staged)


def test_an_open_last_stage_is_lengthened_by_train_steps(staged: RunConfig) -> None:
    staged.schedule.name = "constant"
    train(staged)
    staged.resume, staged.train.steps = True, 8
    run = train(staged)
    assert json.loads((run / "summary.json").read_text())["stages"][1]["steps"] == 5


def _stages(*given: dict[str, Any]) -> list[StageConfig]:
    return [StageConfig(**{"name": f"s{number}", **one}) for number, one in enumerate(given)]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            _stages({"steps": 3, "mixer": {"name": "balanced"}}, {}),
            r"^stages.1.mixer: another stage says it, and here neither 's1' nor data.mixer does",
        ),
        (_stages({}, {}), r"^stages.0.steps: has no value"),
        (_stages({"steps": 0}, {}), r"^stages.0.steps: must be at least 1"),
        (_stages({"steps": 3}, {"name": "s0"}), r"^stages.1.name: "),
        (_stages({"steps": 6}, {}), r"^train.steps: 6, and the stages take 6; give more than 6"),
        (_stages({"steps": 3}, {"steps": 4}), r"^train.steps: 6, and the stages take 7; give just 7"),
        (
            _stages({"steps": 3, "sequence_length": 16}, {"sequence_length": 128}),
            r"^stages.1: in stage 's1', train.sequence_length: 128 exceeds model.max_position_embeddings 64",
        ),
        (_stages({"steps": 3, "lr": -1.0}, {"lr": 1.0}), r"^stages.0: in stage 's0', optimizer.lr: must be positive"),
    ],
)
def test_stages_that_are_none_are_refused_by_key(small_run: RunConfig, stages: list[StageConfig], message: str) -> None:
    small_run.stages = stages
    with pytest.raises(ConfigError, match=message):
        small_run.check()


def test_the_best_is_the_last_stages_whatever_a_shorter_one_had(staged: RunConfig, tmp_path: Path) -> None:
    """The same, too, of a run that was stopped at the border, whose best is then still the short stage's."""
    staged.train.keep_best, staged.evaluation.every = True, 1
    staged.optimizer.lr = 1e-6  # hardly learns, so that which length is easier decides
    train(staged)
    run = Path(staged.run_dir)
    losses = {row["step"]: row["eval/loss"] for row in _rows(run) if "eval/loss" in row}
    long = {step: loss for step, loss in losses.items() if step > 3}
    best = json.loads((run / "summary.json").read_text())["best_evaluation"]
    assert best["step"] == min(long, key=lambda step: long[step])
    assert (best["loss"], best["evaluations"]) == (long[best["step"]], len(losses) - 1)
    assert json.loads((run / "best" / "state.json").read_text())["step"] == best["step"]
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for step in (4, 5, 6):
        shutil.rmtree(_checkpoint(again, step))
    (again / "summary.json").unlink()
    staged.run_dir, staged.resume = str(again), True
    train(staged)
    assert json.loads((again / "summary.json").read_text())["best_evaluation"] == best
    assert json.loads((again / "best" / "state.json").read_text())["step"] == best["step"]


def test_patience_ends_the_last_stage_alone(staged: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that never falls: three looks in the short stage end nothing, and one lower and two more the long one."""
    staged.train.patience, staged.evaluation.every = 2, 1
    staged.stages[1].steps, staged.train.steps = 5, 8
    rising = iter(range(100))
    monkeypatch.setattr("moelab.training.evaluation.Evaluation.loss", lambda self: 1.0 + next(rising))
    train(staged)
    summary = json.loads((Path(staged.run_dir) / "summary.json").read_text())
    assert max(row["step"] for row in _rows(Path(staged.run_dir))) == 6
    assert summary["best_evaluation"]["step"] == 4
    assert summary["ended_early"] == {"planned": 8, "patience": 2}


def test_a_stage_that_cannot_be_is_told_before_the_first_step(staged: RunConfig) -> None:
    staged.stages[0].rope_scaling = {"name": "none"}
    staged.stages[1].rope_scaling = {"name": "yarn", "factor": 0.5}
    with pytest.raises(ConfigError, match=r"^stages.1.rope_scaling: 'yarn'.*factor must be at least 1"):
        train(staged)
    staged.stages[1].rope_scaling = {"name": "none"}
    staged.stages[1].sequence_length = staged.stages[1].max_position_embeddings = 100_000
    with pytest.raises(Exception, match=r"^stages.1: in stage 'long', train.sequence_length: the training text has"):
        train(staged)
    assert not Path(staged.run_dir).exists()


def test_what_a_stage_leaves_out_is_the_runs_own_and_stays_it(small_run: RunConfig) -> None:
    small_run.model = dataclasses.replace(small_run.model, rope_theta=2e4)
    small_run.stages = _stages({"steps": 3}, {"rope_theta": 1e6, "rope_scaling": {"name": "linear", "factor": 2.0}})
    small_run.check()
    small_run.check()
    assert (small_run.stages[0].rope_theta, small_run.stages[0].rope_scaling) == (2e4, {"name": "none"})
    assert (small_run.model.rope_theta, small_run.train.sequence_length) == (1e6, 16)
    assert small_run.stages[0].lr is None, "what no stage says stays the run's"


def test_a_config_in_stages_stands_as_in_its_last_one(staged: RunConfig) -> None:
    assert isinstance(staged.model, ModelConfig)
    assert (staged.model.rope_theta, staged.train.sequence_length, staged.train.batch_size) == (1e6, 32, 2)
