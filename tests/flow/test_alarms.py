"""Alarms of planted faults reach the log, the summary, metrics.jsonl, TensorBoard and compare; a sound run has none."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.training.trainer import train
from moelab_tools.compare.comparison import compare
from moelab_tools.compare.runs import read_runs

SMALL = [
    "train.steps=12", "train.batch_size=4", "train.sequence_length=32", "train.log_every=2", "train.probe_every=4",
    "train.threads=1", "evaluation.sequences=4", "evaluation.sample_tokens=0", "train.gradient_shares_every=4",
    "data.source.domains=[code_py,legal]", "data.source.max_bytes_per_domain=60000", "plugins=[planted]",
]  # fmt: skip
TOP_1 = ["model.moe.layout.num_experts_per_tok=1", "model.moe.router.norm_topk_prob=true"]
PLANTED = """
from dataclasses import dataclass
import torch
from moelab import component, hookimpl, Routing
from moelab_plugins.routers.softmax_topk import SoftmaxTopK, SoftmaxTopKOptions

class Frozen(SoftmaxTopK):
    def __init__(self, options, context):
        super().__init__(options, context)
        self.weight.requires_grad_(False)

class OnPurpose(Frozen):
    learns = False

class Stuck(SoftmaxTopK):
    def select(self, scores, info):
        return torch.arange(self.top_k, device=scores.device).expand(len(scores), -1)

@hookimpl
def moelab_routers():
    parts = {"frozen": Frozen, "on_purpose": OnPurpose, "stuck": Stuck}
    return [component(name, SoftmaxTopKOptions, kind) for name, kind in parts.items()]
"""
CASES: dict[str, tuple[list[str], set[str]]] = {
    "healthy": ([], set()),
    "balance_alone": (TOP_1, {"untaught"}),
    "no_loss": ([*TOP_1, "model.moe.balance_losses=[]"], {"untaught", "no_gradient"}),
    "frozen": (["model.moe.router={name: frozen}", "model.moe.balance_losses=[]"], {"no_gradient"}),
    "stuck": (["model.moe.router={name: stuck}"], {"mostly_dead", "early_saturation"}),
    "on_purpose": (["model.moe.router={name: on_purpose}", "model.moe.balance_losses=[]"], set()),
}
# What else a case may raise: with nothing that balances it, a router sends nearly all of some texts one way.
MAY: dict[str, set[str]] = {"no_loss": {"mostly_dead"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run folder for each case, and in `told` what was logged."""
    root, folder = Path(__file__).resolve().parents[2], tmp_path_factory.mktemp("runs")
    (folder / "planted.py").write_text(PLANTED)
    for name, (overrides, _) in CASES.items():
        arguments = [str(root / "configs/train/tiny_moe.yaml"), *SMALL, *overrides, f"run_dir={folder / name}"]
        config = load_config([*arguments, f"name={name}"], RunConfig).config
        config.search_path = [str(folder)]
        train(config)
    return folder


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_in_the_summary_and_a_sound_run_has_none(runs: Path, name: str) -> None:
    alarms = [alarm for alarm in summary(runs / name)["alarms"] if alarm["name"] not in MAY.get(name, ())]
    assert {alarm["name"] for alarm in alarms} == CASES[name][1]
    assert {alarm["layer"] for alarm in alarms} == ({0, 1} if alarms else set())
    assert all(alarm["on"] for alarm in alarms)
    assert any(alarm["nothing_learnt"] for alarm in alarms) == bool(alarms)
    fixed = summary(runs / name)["fixed_routers"]
    assert fixed == ({"0": "OnPurpose", "1": "OnPurpose"} if name == "on_purpose" else {})


@pytest.mark.parametrize("name", CASES)
def test_each_alarm_is_logged_once_and_stands_in_the_metrics_and_in_tensorboard(runs: Path, name: str) -> None:
    expected, run = CASES[name][1], runs / name
    log = [line for line in (run / "log.txt").read_text().splitlines() if " WARNING " in line]
    may = MAY.get(name, set())
    told = [line for line in log if "alarm: " in line and not any(f"alarm: {other}:" in line for other in may)]
    before = [line for line in log if "no gradient:" in line or "no parameter of this router is trainable" in line]
    assert len(before) == (1 if {"untaught", "no_gradient"} & expected else 0)
    later = {"balance_alone": 0, "no_loss": 2, "frozen": 0, "stuck": 4}.get(name, 0)  # one for each layer
    assert len(told) == later
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {alarm["name"] for row in rows for alarm in row.get("alarms", [])} - may == expected
    events = EventAccumulator(str(run), size_guidance={"tensors": 0})
    events.Reload()
    assert ("alarms/now" in events.Tags()["tensors"]) == bool(expected)


def test_compare_names_no_run_best_whose_router_learnt_nothing(runs: Path) -> None:
    comparison = compare(read_runs([runs / name for name in CASES]))
    untaught = {line.name for line in comparison.lines if line.untaught}
    assert untaught == {name for name, (_, alarms) in CASES.items() if alarms}
    assert comparison.baseline in ("healthy", "on_purpose")


def test_the_probe_has_its_numbers_and_its_file(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / "healthy" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "moe/mean/churn" in row] == [4, 8, 12]
    assert (runs / "healthy" / "recorder.safetensors").exists()
    assert "moe/mean/token_specialisation_at_start" in rows[-2]


def test_a_resumed_run_has_the_same_alarms_and_numbers(runs: Path, tmp_path: Path) -> None:
    """Stopped after step 6, between two looks: all but times are those of the run that was not."""
    root = Path(__file__).resolve().parents[2]
    base = [str(root / "configs/train/tiny_moe.yaml"), *SMALL, *CASES["no_loss"][0], f"run_dir={tmp_path / 'b'}"]

    class Stop:
        def on_save(self, step: int) -> None:
            if step == 6:
                raise KeyboardInterrupt

    config = load_config([*base, "train.save_every=6", "name=no_loss"], RunConfig).config
    config.search_path = [str(runs)]
    with pytest.raises(KeyboardInterrupt):
        train(config, observers=[Stop()])
    config.resume = True
    logging.getLogger("moelab").handlers.clear()
    train(config)
    assert summary(tmp_path / "b")["alarms"] == summary(runs / "no_loss")["alarms"]
    pairs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "b", runs / "no_loss")
    ]
    for mine, theirs in zip(*pairs, strict=True):
        kept = {key for key in theirs if key.startswith(("moe/", "train/")) or key == "alarms"}
        assert {key: mine.get(key) for key in kept} == {key: theirs[key] for key in kept}
