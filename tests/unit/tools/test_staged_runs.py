"""What commands say of a run in stages: a checkpoint is its stage's, and a config's figures are those of the last."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from moelab_tools.checkpoints import evaluation_config
from moelab_tools.cli import moelab

STAGES = (
    "stages=[{name: short, steps: 2, sequence_length: 16}, {name: long, sequence_length: 32, rope_theta: 5000000.0}]"
)
SOURCE = "data.source={name: embedded, domains: [code_py], max_bytes_per_domain: 60000}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    _train(folder / "run", SOURCE)
    return folder / "run"


def _train(folder: Path, *more: str) -> None:
    result = CliRunner().invoke(
        moelab,
        [
            "train", "train/tiny_moe", f"run_dir={folder}", STAGES, "train.steps=4", "train.batch_size=2",
            "train.save_every=1", "train.keep_checkpoints=0", "evaluation.sequences=4", "evaluation.sample_tokens=0",
            "observers=[]", *more,
        ],
    )  # fmt: skip
    assert result.exit_code == 0, result.output


def test_a_checkpoint_of_an_earlier_stage_is_evaluated_as_what_it_is(run: Path) -> None:
    for step, length, theta in ((2, 16, 1e6), (4, 32, 5e6)):
        config, _ = evaluation_config(run / "checkpoints" / f"step_{step:08d}", ())
        assert (config.train.sequence_length, config.model.rope_theta) == (length, theta)


@pytest.mark.parametrize("step", [1, 3])
def test_the_same_command_resumes_it_though_its_checkpoint_says_the_model_of_a_stage(
    run: Path, tmp_path: Path, step: int
) -> None:
    """The first stage leaves rope_theta to the run and the config to its default, which is not the last stage's."""
    stopped = tmp_path / "run"
    shutil.copytree(run, stopped)
    (stopped / "summary.json").unlink()
    for later in range(step + 1, 5):
        shutil.rmtree(stopped / "checkpoints" / f"step_{later:08d}")
    _train(stopped, SOURCE, "resume=true")
    last = "checkpoints/step_00000004/model.safetensors"
    assert (run / last).read_bytes() == (stopped / last).read_bytes()


def test_what_is_predicted_from_a_config_is_of_the_last_stage_and_says_so() -> None:
    result = CliRunner().invoke(moelab, ["explain", "train/tiny_moe", STAGES, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sequence_length"] == 32
    assert "that of the last one, 'long'" in result.stderr


def test_a_stage_that_changes_the_vocabulary_is_refused_by_key() -> None:
    result = CliRunner().invoke(
        moelab, ["train", "train/tiny_moe", "run_dir=unused", STAGES, "stages.1.vocab_size=300"], standalone_mode=False
    )
    assert "stages.1.vocab_size: no such key; it takes: name, steps" in str(result.exception)
