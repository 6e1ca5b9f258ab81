"""What Python and notebooks call does what the command line does."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moelab
from moelab import session
from moelab.config.run import RunConfig
from moelab.config.stored import to_yaml
from moelab.errors import CheckpointError, ConfigError
from moelab.training.setup import prepare as prepare_run
from moelab_tools.checkpoints import load_run
from moelab_tools.samples import Request, continue_prompts

PROMPTS = ["document 1", "document 12 says", ""]


def test_tab_finds_every_public_name() -> None:
    names = dir(moelab)
    assert {"load", "load_config", "prepare", "train", "Routing", "hookimpl", "__version__"} <= set(names)
    assert names == sorted(moelab.__all__)
    assert all(hasattr(moelab, name) for name in names)
    assert moelab.train is session.train, "and no package of that name stands in its way"


def test_a_config_in_python_is_the_one_of_the_command_line() -> None:
    arguments = ["train/tiny_moe", "run_dir=runs/x", "model.moe.router.name=sigmoid_topk", "seed=3"]
    found, other = session.load_config(*arguments), load_run(arguments)
    assert found == other.config
    assert found.search_path, "plugins are looked for beside the file"
    with pytest.raises(ConfigError, match=r"train\.stepz: no such key, did you mean 'steps'.*set by train.stepz=4"):
        session.load_config("train/tiny_moe", "train.stepz=4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> session.TrainedRun:
    folder = tmp_path_factory.mktemp("session")
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"document {n} says {n * n} " * 8}) + "\n" for n in range(20))
    )
    (folder / "own.yaml").write_text(
        "model: {vocab_size: 300, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, "
        "num_attention_heads: 2, num_key_value_heads: 1}\n"
        "data: {source: {name: jsonl, paths: [a.jsonl]}, validation_fraction: 0.2}\n"
        "train: {steps: 4, batch_size: 2, sequence_length: 16, keep_best: true, log_every: 2}\n"
        "evaluation: {every: 2, sequences: 4, sample_tokens: 0}\nobservers: []\n"
    )
    return session.train(folder / "own.yaml", f"run_dir={folder / 'run'}", "seed=1", progress=False)


def test_a_run_from_files_and_overrides_says_what_became_of_it(trained: session.TrainedRun) -> None:
    assert trained.summary["seed"] == 1
    assert [row["step"] for row in trained.metrics if "eval/loss" in row] == [0, 2, 4]
    assert "finished at step 4; held-out" in repr(trained)
    assert f"{trained.summary['final']['eval/bits_per_byte']:.4f} bits per byte" in repr(trained)
    assert not trained.model.training
    assert trained.best_model.state_dict().keys() == trained.model.state_dict().keys()


def test_a_model_writes_what_the_command_writes(trained: session.TrainedRun) -> None:
    """By the folder's own tokenizer; a prompt has the random numbers of its place."""
    cases: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_p": 0.5, "top_k": 9, "seed": 7}]
    for options in cases:
        request = Request(PROMPTS, {"max_new_tokens": 12, **options})
        told = [sample.text for sample in continue_prompts(trained.run_dir, request)]
        assert trained.model.generate(PROMPTS, 12, **options) == told
        assert trained.model.generate(PROMPTS[0], 12, **options) == told[0]
        assert moelab.generate(trained.run_dir, PROMPTS, 12, **options) == told
        assert moelab.generate(trained.model, PROMPTS, 12, **options) == told
    with pytest.raises(ConfigError, match="generate: takes a model of moelab or the folder of one, not dict"):
        moelab.generate({}, "x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no setting 'temprature', did you mean 'temperature'"):
        trained.model.generate("x", temprature=1.0)
    assert len(trained.model.generate("x", 3, samples=2)) == 2
    assert trained.model.generate("x", 12, seed=1) != trained.model.generate("x", 12, seed=2)
    assert copy.deepcopy(trained.model).generate("x", 4) == trained.model.generate("x", 4)


def test_a_model_without_a_tokenizer_asks_for_one(small_run: RunConfig, tmp_path: Path) -> None:
    model = moelab.build(small_run.model)
    with pytest.raises(ConfigError, match="give tokenizer='bytes'"):
        model.generate("a")
    assert model.generate("a", 3, tokenizer="bytes").startswith("a")
    small = moelab.build(dataclasses.replace(small_run.model, vocab_size=200))
    with pytest.raises(ConfigError, match="gives ids up to 256, and the model has 200 rows"):
        small.generate("a", tokenizer="bytes")


def test_an_export_writes_with_its_own_tokenizer_and_says_when_it_has_none(
    trained: session.TrainedRun, tmp_path: Path
) -> None:
    from moelab_tools.exporting import export

    export(trained.run_dir, tmp_path / "hf")
    assert moelab.load(tmp_path / "hf").generate("document", 8) == trained.model.generate("document", 8)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        moelab.load(tmp_path / "hf").generate("document", 8)


def test_a_config_object_is_trained_as_it_is_and_stays_so(small_run: RunConfig) -> None:
    before = to_yaml(small_run)
    run = session.train(small_run, progress=False)
    assert to_yaml(small_run) == before
    assert run.summary["steps"] == 6
    small_run.train.steps, small_run.schedule.rewarm_steps = 8, 1
    assert session.train(small_run, resume=True, progress=False).summary["steps"] == 8
    with pytest.raises(CheckpointError, match="best"):
        _ = run.best_model


def test_what_can_t_be_meant_is_refused(small_run: RunConfig) -> None:
    with pytest.raises(ConfigError, match="or one RunConfig alone"):
        session.train(small_run, "seed=1")
    with pytest.raises(ConfigError, match="one goes on, the other deletes"):
        session.train(small_run, resume=True, force=True)
    with pytest.raises(ConfigError, match=r"unknown_loss.*set by model.moe.balance_losses=\[\{name: unknown_loss\}\]"):
        session.train("train/tiny_moe", "run_dir=unused", "model.moe.balance_losses=[{name: unknown_loss}]")


def test_prepare_gives_what_the_trainer_begins_with(small_run: RunConfig) -> None:
    setup, other = session.prepare(small_run), prepare_run(small_run, moelab.Registry())
    assert setup.batches.batch(3).input_ids.equal(other.batches.batch(3).input_ids)
    assert all(value.equal(other.model.state_dict()[name]) for name, value in setup.model.state_dict().items())


@pytest.mark.parametrize(("widgets", "drawn"), [(True, True), (False, False)])
def test_a_notebook_gets_a_bar_where_it_can_draw_one_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, widgets: bool, drawn: bool
) -> None:
    from rich.console import Console

    from moelab_tools import progress

    make: Callable[[], Console] = lambda: Console(force_jupyter=True)  # noqa: E731
    monkeypatch.setattr(progress, "make_console", make)
    monkeypatch.setattr(progress, "find_spec", lambda name: sys if widgets else None)
    assert progress.TrainingProgress(10)._bar.disable is not drawn
