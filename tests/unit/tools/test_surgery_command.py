"""`moelab surgery` from a run folder to one that trains on: what stays, what is told, and what is refused untouched."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moelab
from later_keys import later
from moelab.checkpoint import (
    MODEL,
    TRAINING,
    newest_checkpoint,
    read_run_config,
    read_state,
    shard_name,
    stored_tensors,
)
from moelab.components import came_later
from moelab.config.adapters import AdapterConfig
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import DataConfig, EvaluationConfig, OptimizerConfig, RunConfig, TrainConfig
from moelab.data.lineage import Lineage, lineage_of
from moelab.data.seen import RECORD
from moelab.hf.save import save_hf
from moelab.integrity import inspect
from moelab.layouts import build_layouts
from moelab.manifest import MANIFEST, manifest_bytes, plain_entry
from moelab.surgery.patient import open_patient
from moelab.tensor_file import write_tensors
from moelab_plugins.surgeries.split import SplitOptions
from moelab_tools.checkpoints import evaluation_config
from moelab_tools.cli import run
from moelab_tools.surgery import operating
from moelab_tools.surgery.texts import texts_of

LAYERS = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps of a model whose first layer is dense; its folder."""
    base = tmp_path_factory.mktemp("surgery")
    lines = [json.dumps({"text": f"document {n} says {n * n} and {n} times {n} " * 12}) for n in range(40)]
    (base / "a.jsonl").write_text("\n".join(lines) + "\n")
    moe = MoEConfig(
        layout={"name": "first_dense", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        router={"name": "sigmoid_topk", "norm_topk_prob": False},
        shared_expert={"name": "gated", "intermediate_size": 8},
    )
    model = ModelConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, moe=moe, tie_word_embeddings=True,
    )  # fmt: skip
    config = RunConfig(
        run_dir=str(base / "run"),
        model=model,
        data=DataConfig(source={"name": "jsonl", "paths": [str(base / "a.jsonl")]}, validation_fraction=0.3),
        train=TrainConfig(steps=8, batch_size=2, sequence_length=32, save_every=4, threads=1, log_every=3),
        optimizer=OptimizerConfig(lr=3e-3),
        evaluation=EvaluationConfig(every=4, sequences=4, sample_tokens=0),
        observers=[],
    )
    moelab.train(dataclasses.replace(config, train=dataclasses.replace(config.train, keep_checkpoints=2)))
    shutil.rmtree(newest_checkpoint(base / "run"))  # so that four of its eight steps are done
    return base / "run"


@pytest.fixture
def operate(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command; -> (exit code, the output folder, what it printed)."""

    def command(*arguments: str, source: Path = trained, name: str = "out") -> tuple[int, Path, str]:
        code = run(["surgery", str(source), str(tmp_path / name), *arguments, "--tokens", "2048"])
        told = capsys.readouterr()
        return code, tmp_path / name, told.out + told.err

    return command


def _tensors(folder: Path, file: str) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in stored_tensors(folder, file).items()}


def _checkpoint(folder: Path) -> Path:
    found = newest_checkpoint(folder)
    assert found is not None
    return found


def test_a_split_run_goes_on_with_the_same_function_step_and_moments(
    trained: Path, operate: Callable[..., Any]
) -> None:
    code, output, told = operate("split", "parts=2")
    assert code == 0, told
    before, after = _checkpoint(trained), _checkpoint(output)
    assert (after.name, inspect(after).problems) == (before.name, ())
    assert (after / RECORD).read_bytes() == (before / RECORD).read_bytes()
    old, new = read_state(before), read_state(after)
    assert all(old[key] == new[key] for key in ("step", "tokens", "seconds", "served_weights", "data_fingerprint"))
    assert old["counts"] and not new["counts"] and old["expert_load"].keys() == {"1", "2"} and not new["expert_load"]
    assert old["best_evaluation"] and "best_evaluation" not in new
    one, other = _tensors(before, MODEL), _tensors(after, MODEL)
    assert one.keys() == other.keys()
    changed = {name for name in one if one[name].shape != other[name].shape}
    parts = ("experts.gate_up", "experts.down", "router.weight", "router.bias")
    assert changed == {f"layers.{layer}.mlp.{part}" for layer in (1, 2) for part in parts}
    assert all(torch.equal(one[name], other[name]) for name in one.keys() - changed)
    moments = [_tensors(folder, TRAINING) for folder in (before, after)]
    assert moments[0].keys() == moments[1].keys()
    name = "optimizer/layers.2.mlp.experts.gate_up/exp_avg"  # gate rows, then up rows; the parts are contiguous
    rows = moments[0][name].view(6, 2, 2, 4, 16).transpose(1, 2).reshape(12, 8, 16)
    assert torch.equal(moments[1][name], rows)
    assert moments[0]["optimizer/layers.0.mlp.down_proj.weight/step"] == 4
    report = json.loads((output / "surgery.json").read_text())
    assert report["receipt"]["kind"] == "same" and "the same function as before" in told
    assert report["receipt"]["tokens"] >= 2048 and report["receipt"]["documents"] > 1
    assert run(["train", str(output / "config.yaml"), "--resume"]) == 0
    assert read_state(_checkpoint(output))["step"] == 8
    assert json.loads((output / "summary.json").read_text())["status"] == "finished"


def test_adapters_are_operated_on_as_part_of_the_weights_and_begin_anew(
    trained: Path, operate: Callable[..., Any], tmp_path: Path
) -> None:
    config = read_run_config(_checkpoint(trained))
    config.run_dir, config.observers = str(tmp_path / "adapted"), []
    adapters = [AdapterConfig("layers.*.mlp.experts.*", r=2)]
    config.train = dataclasses.replace(config.train, steps=4, init_from=str(trained), adapters=adapters)
    moelab.train(config)
    folder = Path(config.run_dir)
    code, output, told = operate("split", "parts=2", source=folder)
    assert code == 0 and "train.adapters: what they learned is operated on as part of the weights" in told
    before, after = _tensors(_checkpoint(folder), MODEL), _tensors(_checkpoint(output), MODEL)
    rows = before["layers.2.mlp.experts.gate_up"].view(6, 2, 2, 4, 16).transpose(1, 2).reshape(12, 8, 16)
    assert torch.equal(after["layers.2.mlp.experts.gate_up"], rows)
    assert not _tensors(_checkpoint(output), TRAINING)
    assert run(["train", str(output / "config.yaml"), "--resume", "train.steps=5", "schedule.rewarm_steps=0"]) == 0
    ended = _checkpoint(output)
    assert read_state(ended)["step"] == 5
    assert torch.equal(_tensors(ended, TRAINING)["adapters/layers.2.mlp.experts.gate_up.base"], rows)


def test_the_receipt_says_what_evaluation_says(trained: Path, operate: Callable[..., Any]) -> None:
    code, output, told = operate("prune", "num_experts=3", "by=reap", "--layers", "2")
    assert code == 0, told
    config = read_run_config(_checkpoint(output))
    layouts = build_layouts(config.model, moelab.Registry(entry_points=False))
    assert {layer: layout.num_experts for layer, layout in layouts.items()} == {1: 6, 2: 3}
    receipt = json.loads((output / "surgery.json").read_text())["receipt"]
    probe = texts_of(_checkpoint(trained), *evaluation_config(trained, ())).probe(2048)
    nats = []
    for folder in (trained, output):
        with torch.no_grad():
            logits = moelab.load(folder)(probe.ids).logits.double()
        nats.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), probe.targets.flatten(), reduction="none"))
    assert receipt["tokens"] == len(nats[0])
    assert receipt["loss_before"] == pytest.approx(float(nats[0].mean()), abs=1e-6)
    assert receipt["loss_after"] == pytest.approx(float(nats[1].mean()), abs=1e-6)
    low, middle, high = receipt["loss_difference"]
    assert low < middle < high
    assert middle == pytest.approx(float((nats[1] - nats[0]).mean()), abs=1e-6)


def test_what_was_chosen_is_told_with_what_it_was_chosen_by(operate: Callable[..., Any]) -> None:
    code, output, told = operate("prune", "num_experts=4", "by=load", "--no-receipt")
    assert code == 0
    report = json.loads((output / "surgery.json").read_text())
    for layer in ("1", "2"):
        part = report["layers_of_the_model"][layer]
        load = part["measured"]["load"]
        kept = sorted(sorted(range(6), key=lambda e: load[e])[2:])
        assert [int(source) for one in part["experts"] for source in one] == kept
        assert (part["before"], part["after"], part["exact"]) == ([6, 2, 8], [4, 2, 8], False)
    assert "receipt" not in report and "decided by" in told
    lineage = lineage_of(_checkpoint(output), "x")
    assert [stage for stage, _ in lineage.stages] == ["training", "conversion"]


def test_files_of_several_processes_are_read_as_one(trained: Path, operate: Callable[..., Any], tmp_path: Path) -> None:
    """The same run as two processes would have left it gives the same bytes."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    _in_two(_checkpoint(copy))
    folders = []
    for source, name in ((trained, "one"), (copy, "two")):
        code, output, told = operate("split", "--no-receipt", source=source, name=name)
        assert code == 0, told
        folders.append(_checkpoint(output))
    for file in (MODEL, TRAINING):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


def _in_two(folder: Path) -> None:
    """Rewrite a checkpoint as two processes write it: the upper half of each tensor's rows in a second file."""
    entries: dict[str, Any] = {}
    for file in (MODEL, TRAINING):
        halves: list[dict[str, torch.Tensor]] = [{}, {}]
        cut = {}
        for name, tensor in _tensors(folder, file).items():
            if tensor.dim() == 0 or len(tensor) < 2:
                halves[0][name] = tensor
                continue
            cut[name] = (len(tensor) // 2, len(tensor))
            halves[0][name], halves[1][name] = tensor[: len(tensor) // 2], tensor[len(tensor) // 2 :]
        (folder / file).unlink()
        for rank, half in enumerate(halves):
            path = folder / shard_name(file, rank, 2)
            entries[path.name] = write_tensors(path, half).entry()
            for name in cut.keys() & half.keys():
                rows = {"first": cut[name][0] * rank, "of": cut[name][1]}
                entries[path.name]["tensors"][name]["rows"] = rows
    small = {path.name: plain_entry(path.read_bytes()) for path in folder.iterdir() if path.suffix != ".safetensors"}
    del small[MANIFEST]
    (folder / MANIFEST).write_bytes(manifest_bytes(small | entries))


@pytest.mark.parametrize("where", ["carry_out.sync", "carry_out.finish"])
def test_one_that_is_interrupted_leaves_nothing(
    where: str, operate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    target = "moelab_tools.surgery.operating.finish" if where == "carry_out.finish" else f"moelab.surgery.{where}"
    monkeypatch.setattr(target, stop)
    code, output, _ = operate("split", "--no-receipt")
    assert code == 130
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert operate("split", "--no-receipt")[0] == 0 and output.is_dir()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("prune", "num_experts=1"), "2 of the 1 experts that are left"),
        (("split", "--layers", "0"), "layer 0 is dense"),
        (("split", "--layers", "7"), "the model has layers 0 .. 2"),
        (("prune", "experts=[6]"), "6 is none of the experts 0 .. 5"),
        (("amputate",), "no surgery 'amputate'"),
        (("split", "part=2"), "has no such option, did you mean 'parts'"),
        (("split", "2"), "is no option of a surgery"),
        (("prune", "num_experts=4", "--trace", "nowhere"), "need the model"),
        (("split", "--trace", "nowhere"), "--trace: split as asked for looks at no routes"),
        (("grow", "num_experts=1000000000"), "num_experts: must be 1048576 at most"),
        (
            ("grow", "num_experts=9", "noise=.inf"),
            "noise: 'grow' (moelab_plugins.surgeries.grow): must be a finite number",
        ),
        (("prune", "num_experts=4", "by=load", "--trace", "nowhere"), "holds no trace"),
    ],
)
def test_what_can_t_be_done_is_one_line_reads_no_text_and_leaves_nothing(
    arguments: tuple[str, ...],
    said: str,
    operate: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[Any] = []
    monkeypatch.setattr(operating, "texts_of", lambda *given: read.append(given))
    code, _, told = operate(*arguments)
    assert code == 2
    assert said in told.splitlines()[-1]
    assert not read and list(tmp_path.iterdir()) == []


def test_a_plan_that_no_text_decides_is_refused_before_the_receipts_text_is_read(
    operate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise moelab.ConfigError("no layout says that")

    read: list[Any] = []
    monkeypatch.setattr(operating, "texts_of", lambda *given: read.append(given))
    monkeypatch.setattr(operating, "prepare_operation", refuse)
    code, _, told = operate("split", "parts=2")
    assert (code, read, list(tmp_path.iterdir())) == (2, [], []) and "no layout says that" in told


def test_a_full_disk_is_told_before_anything_is_written(
    operate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9 - 5000, free=5000))
    code, _, told = operate("split")
    assert code == 2
    assert "are free on that disk; free some space and operate again" in told.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays_as_it_is(operate: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    code, output, told = operate("split")
    assert code == 2 and "is there already" in told
    assert [path.name for path in output.iterdir()] == ["mine"]


def test_a_dry_run_tells_the_plan_alone(operate: Callable[..., Any], tmp_path: Path) -> None:
    code, output, told = operate("grow", "num_experts=12", "num_experts_per_tok=4", "--dry-run", "--layers", "1")
    assert code == 0 and not output.exists()
    assert "layer 1: 6 experts of 8, top 2 -> 12 of 8, top 4; exact" in told and "layer 2" not in told


def test_a_trace_decides_as_the_pass_that_it_recorded(
    trained: Path, operate: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["trace", str(trained), "--out", str(tmp_path / "trace"), "--data", "train", "--tokens", "2048"]) == 0
    capsys.readouterr()
    kept = []
    for name, extra in (("by_trace", ["--trace", str(tmp_path / "trace")]), ("by_pass", [])):
        code, output, told = operate("prune", "num_experts=4", "by=load", "--no-receipt", *extra, name=name)
        assert code == 0, told
        report = json.loads((output / "surgery.json").read_text())["layers_of_the_model"]
        kept.append([report[layer]["experts"] for layer in ("1", "2")])
    assert kept[0] == kept[1]


def test_a_router_that_can_t_be_cut_is_named_with_its_reason(trained: Path) -> None:
    patient = open_patient(_checkpoint(trained))
    config = dataclasses.replace(patient.config.model, moe=dataclasses.replace(patient.config.model.moe))
    said = {"hash": "its table deals token ids", "moe_plus_plus": "its residual joins every choice"}
    for name, reason in said.items():
        config.moe.router = {"name": name}
        model = moelab.build_model(config, patient.registry, device="meta", seed=None)
        other = dataclasses.replace(patient, model=model)
        with pytest.raises(moelab.ConfigError, match=f"layer 1: router '{name}' can't be cut by experts: {reason}"):
            other.context(1, 0)


def test_what_is_no_run_with_experts_is_refused(operate: Callable[..., Any], tmp_path: Path, trained: Path) -> None:
    dense = ModelConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    save_hf(moelab.build(dense), tmp_path / "hf", dtype=torch.float32)
    code, output, told = operate("split", source=tmp_path / "hf")
    assert code == 2 and "is a Hugging Face folder" in told and not output.exists()


def test_an_operation_is_the_same_under_an_option_that_came_later(operate: Callable[..., Any]) -> None:
    def made(name: str, *words: str) -> Lineage:
        code, out, told = operate("split", *words, "--no-receipt", name=name)
        assert code == 0, told
        found = lineage_of(_checkpoint(out), "")
        assert read_state(_checkpoint(out))["lineage"] == found.to_json()
        return found

    before = made("before")
    with later(SplitOptions, "later_option", "int", field(default=3, metadata=came_later(3))):
        assert made("after") == before
        assert made("other", "later_option=4").recipe != before.recipe
