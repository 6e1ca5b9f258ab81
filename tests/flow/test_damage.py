"""A bit flips on the disk: whatever reads the checkpoint says so, and `--resume` goes on from the one before."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import moelab
from dense_checkpoints import recipe_config, upcycle, write_dense
from moelab.checkpoint import checkpoints, newest_checkpoint
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import DataConfig, EvaluationConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from moelab.config.stored import to_yaml
from moelab.errors import CheckpointError
from moelab.integrity import inspect, newest_whole
from moelab.manifest import MANIFEST
from moelab.training.trainer import train
from moelab_tools import cli

STEPS = 6


def run_config(folder: Path, **train: Any) -> RunConfig:
    return RunConfig(
        run_dir=str(folder),
        model=ModelConfig(
            vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
            moe=MoEConfig(
                layout={"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
                router={"name": "softmax_topk"},
                shared_expert={"name": "gated", "intermediate_size": 8},
                balance_losses=[{"name": "load_balance", "weight": 0.01}],
            ),
        ),
        data=DataConfig(source={"name": "embedded", "domains": ["code_py"], "max_bytes_per_domain": 20000}),
        train=TrainConfig(
            **{"steps": STEPS, "batch_size": 2, "sequence_length": 16, "save_every": 2, "keep_checkpoints": 0,
               "log_every": 1, "threads": 1, **train}
        ),
        optimizer=OptimizerConfig(),
        schedule=ScheduleConfig(),
        evaluation=EvaluationConfig(sequences=2, sample_tokens=0),
        observers=[],
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(run_config(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def config(run: Path) -> str:
    """The file that the run is resumed with."""
    path = run.parent / "config.yaml"
    path.write_text(to_yaml(run_config(run)))
    return str(path)


def flip(path: Path, byte: int, bit: int = 3) -> None:
    """In place, as a disk does it."""
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 1 << bit]))


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line, on one line each: the terminal's width folds them."""
    capsys.readouterr()
    code = cli.run(list(arguments))
    told = capsys.readouterr()
    return code, told.out, told.err


def spans(checkpoint: Path) -> list[tuple[str, str, int, int]]:
    """(file, tensor or nothing, first byte, bytes) of every file and tensor."""
    files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
    found = [
        (name, "", 0, said["header"]["bytes"] if "header" in said else said["bytes"]) for name, said in files.items()
    ]
    for name, said in files.items():
        found += [(name, tensor, it["offset"], it["bytes"]) for tensor, it in said.get("tensors", {}).items()]
    return [*found, (MANIFEST, "", 0, (checkpoint / MANIFEST).stat().st_size)]


def test_one_bit_in_each_tensor_and_each_file_is_noticed_and_named(run: Path) -> None:
    newest = step(run, STEPS)
    places = spans(newest)
    assert {name for name, *_ in places} == {path.name for path in newest.iterdir()}
    assert len(places) > 40
    for number, (name, tensor, begin, size) in enumerate(places):
        place = begin + number * 7919 % size
        flip(newest / name, place, number % 8)
        [problem] = inspect(newest).problems
        assert problem.startswith(f"{name}: {tensor}"), problem
        with pytest.raises(
            CheckpointError, match=rf"{STEPS}/{name}: .*{tensor}.*; use .*step_00000004, which is whole"
        ):
            moelab.load(run)
        assert newest_whole(run).folder == step(run, STEPS - 2)
        flip(newest / name, place, number % 8)
    moelab.load(run)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "config.yaml", MANIFEST])
def test_every_command_refuses_a_changed_checkpoint_and_names_the_one_before(
    run: Path, config: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(step(run, STEPS) / name, (step(run, STEPS) / name).stat().st_size - 40)
    output = run.parent / "out"
    for arguments in (
        ["generate", str(run), "--tokens", "2"],
        ["evaluate", str(run)],
        ["export", str(run), str(output)],
        ["train", config, f"run_dir={output}", f"train.init_from={run}", "model={}"],
    ):
        code, _, told = command(capsys, *arguments)
        assert code == 2, told
        assert f"step_00000006/{name}: " in told
        assert not output.exists()
        if arguments[0] != "train":
            assert f"use {step(run, STEPS - 2)}, which is whole" in told
    assert command(capsys, "generate", str(step(run, STEPS - 2)), "--tokens", "2")[0] == 0


def test_not_verified_is_done_when_asked_for_and_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = step(run, STEPS) / "model.safetensors"
    flip(weights, weights.stat().st_size - 4, 0)
    for arguments in (
        ["generate", str(run), "--tokens", "2"],
        ["evaluate", str(run)],
        ["export", str(run), f"{run}-out"],
    ):
        code, _, told = command(capsys, *arguments, "--no-verify")
        assert code == 0, told
        assert "not verified, as asked" in told
    assert moelab.load(run, verify=False)


def test_resume_goes_on_from_the_newest_that_is_whole_and_says_why(
    finished: Path, run: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three are damaged; in the end everything is as if nothing had happened."""
    moments = step(run, 4) / "training.safetensors"
    flip(moments, moments.stat().st_size - 3)
    (step(run, 6) / "state.json").unlink()
    code, _, told = command(capsys, "train", config, "--resume")
    assert code == 0, told
    log = (run / "log.txt").read_text()
    for said in (told.replace("\n", " "), log):
        assert "step_00000006 is damaged and passed over: state.json: is missing" in said
        assert "step_00000004 is damaged and passed over: training.safetensors: optimizer/" in said
        assert "going on from" in said
        assert "step_00000002" in said
    for number in (2, 4, 6):
        assert not inspect(step(run, number)).problems
        for name in ("model.safetensors", "training.safetensors"):
            assert (step(run, number) / name).read_bytes() == (step(finished, number) / name).read_bytes()
    ours, theirs = ([_steps(path)] for path in (run, finished))
    assert ours == theirs


def _steps(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("train/loss", row.get("eval/loss"))) for row in rows]


def test_where_no_checkpoint_is_whole_nothing_is_touched_and_each_reason_is_named(
    run: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(step(run, 2) / "config.yaml", 30)
    shutil.rmtree(step(run, 4))
    (step(run, 6) / "tokenizer.json").unlink()
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    code, _, told = command(capsys, "train", config, "--resume")
    assert code == 2
    assert "none of its 2 checkpoints" in told
    assert "step_00000002/config.yaml: was changed after it was written" in told
    assert "step_00000006/tokenizer.json: is missing" in told
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize(
    ("save_every", "keep", "left"),
    [(3, 1, [["3", "4", "6"], ["6"]]), (5, 2, [["2", "5", "6"], ["5", "6"]])],
)
def test_pruning_never_takes_a_whole_checkpoint_for_a_damaged_one(
    run: Path, save_every: int, keep: int, left: list[list[str]]
) -> None:
    """Of steps 2, 4 and 6 the later two are damaged: what lies ahead stays until a whole one supersedes it."""
    for number in (4, 6):
        flip(step(run, number) / "model.safetensors", 5000)
    seen: list[list[str]] = []

    class Watch:
        @moelab.hookimpl
        def on_save(self, path: Path) -> None:
            whole = [folder for folder in checkpoints(run) if not inspect(folder).problems]
            assert path in whole
            seen.append([folder.name[-1] for folder in checkpoints(run)])

    settings = run_config(run, save_every=save_every, keep_checkpoints=keep)
    settings.resume = True
    train(settings, observers=[Watch()])
    assert seen == left
    assert not inspect(step(run, 6)).problems


def test_a_checkpoint_of_an_earlier_version_is_read_and_that_it_can_not_be_verified_is_told(
    run: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = step(run, STEPS)
    (newest / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json: is missing"):  # its state.json says that it has one
        moelab.load(run)
    state = json.loads((newest / "state.json").read_text())
    del state["manifest"]
    (newest / "state.json").write_text(json.dumps(state))
    with caplog.at_level(logging.WARNING, logger="moelab"):
        moelab.load(run)
    assert "can't be verified: it has no manifest.json" in caplog.text
    assert command(capsys, "verify", str(newest))[0] == 2
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert newest_whole(run).folder == step(run, STEPS - 2), "what its own header shows is noticed"


def test_what_was_added_to_a_checkpoint_is_told(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (step(run, STEPS) / "generation_config.json").write_text("{}")
    (step(run, STEPS) / ".#config.yaml").symlink_to("somebody@somewhere.7")  # an editor's lock
    with caplog.at_level(logging.WARNING, logger="moelab"):
        moelab.load(run)
    assert "holds .#config.yaml, generation_config.json, added after it was written" in caplog.text


def test_verify_tells_what_became_of_each_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, _ = command(capsys, "verify", str(run))
    assert code == 0
    assert told.count(": whole: ") == 3
    flip(step(run, 4) / "model.safetensors", (step(run, 4) / "model.safetensors").stat().st_size - 1)
    code, told, problem = command(capsys, "verify", str(run))
    assert code == 1
    assert "step_00000004: DAMAGED: model.safetensors: " in told
    assert told.count(": whole: ") == 2
    assert "1 of 3 checkpoints damaged: step_00000004; the newest that is whole: " in problem
    assert command(capsys, "verify", str(step(run, 2)))[0] == 0
    assert command(capsys, "verify", str(step(run, 4)))[0] == 1
    code, _, problem = command(capsys, "verify", str(run), "--source", str(run))
    assert (code, "--source: is for an upcycled checkpoint" in problem) == (2, True)
    code, _, problem = command(capsys, "verify", str(run.parent))
    assert (code, "holds nothing to verify" in problem) == (2, True)
    for more in ([], ["--source", str(run)]):
        code, _, problem = command(capsys, "verify", str(run / "nowhere"), *more)
        assert (code, "nowhere: no such folder; give a run folder" in problem) == (2, True)


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_every_file_and_folder_that_a_command_makes_has_the_mode_that_the_umask_gives(
    tmp_path: Path, umask: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = os.umask(umask)
    try:
        settings = run_config(tmp_path / "run", steps=1)
        settings.observers = [{"name": "tensorboard"}]
        run = train(settings)
        assert command(capsys, "export", str(run), str(tmp_path / "out"))[0] == 0
        assert command(capsys, "compare", str(run), "--output", str(tmp_path / "report"))[0] == 0
        upcycle(recipe_config(write_dense(tmp_path / "dense")), tmp_path / "upcycled")
    finally:
        os.umask(before)
    wrong = {
        str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777)
        for folder in ("run", "out", "report", "upcycled")
        for path in (tmp_path / folder, *(tmp_path / folder).rglob("*"))
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert not wrong


def _resigned(checkpoint: Path, **changed: Any) -> None:
    """state.json with other keys, and a manifest that agrees: someone changed it on purpose, or wrote it otherwise."""
    from moelab.manifest import manifest_bytes, plain_entry

    path = checkpoint / "state.json"
    state = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({key: value for key, value in state.items() if value is not None}))
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    files["state.json"] = plain_entry(path.read_bytes())
    (checkpoint / MANIFEST).write_bytes(manifest_bytes(files))


@pytest.mark.parametrize(
    "changed", [{"data_fingerprint": None}, {"step": "x"}, {"logged": [1, 2]}, {"plugins": {"a": 1}}]
)
def test_a_state_that_lacks_a_key_or_holds_another_kind_of_value_is_refused_before_anything_is_touched(
    run: Path, config: str, changed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _resigned(step(run, STEPS), **changed)
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    code, _, told = command(capsys, "train", config, "--resume")
    assert code == 2
    assert f"step_00000006/state.json: {next(iter(changed))}" in told
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before


def test_other_versions_than_the_checkpoints_are_told_old_and_new(
    run: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert newest_checkpoint(run) is not None
    shutil.rmtree(step(run, 6))
    state = json.loads((step(run, 4) / "state.json").read_text())
    plugins = {**state["plugins"], "moelab_ghost": "1.0"}
    _resigned(step(run, 4), plugins=plugins, versions={**state["versions"], "torch": "2.11.0"})
    code, _, told = command(capsys, "train", config, "--resume")
    assert code == 0, told
    for said in (told.replace("\n", " "), (run / "log.txt").read_text()):
        assert f"torch: 2.11.0 wrote the checkpoint, {state['versions']['torch']} goes on from it" in said
        assert "moelab_ghost: 1.0 wrote the checkpoint, not there goes on" in said
        assert "python: " not in said
