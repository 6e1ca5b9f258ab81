"""The event file is read back with TensorBoard's own reader."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.summary.writer import event_file_writer
from tensorboard.util import tensor_util

from moelab.alarms import Alarm, AlarmChange
from moelab.hookspecs import OBSERVERS
from moelab.registry import Registry
from moelab.training.parts import components
from moelab_plugins.observers._load_image import load_image
from moelab_plugins.observers._tensorboard_hparams import METRICS, SHOWN_FIRST, hparams

CONFIG: dict[str, Any] = {
    "run_dir": "runs/a",
    "seed": 7,
    "optimizer": {"lr": 3e-4, "weight_decay": 0.1},
    "train": {"steps": 20, "batch_size": 4, "sequence_length": 64, "dtype": "float32", "init_from": None},
    "schedule": {"name": "cosine", "warmup_steps": 2},
    "data": {"source": {"name": "embedded"}},
    "model": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "moe": {
            "layout": {"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            "router": {"name": "softmax_topk", "norm_topk_prob": False},
            "shared_expert": {"name": "none"},
            "backend": {"name": "auto"},
            "balance_losses": [{"name": "load_balance", "weight": 0.01}, {"name": "router_z", "weight": 0.001}],
            "layers": {"0": {"router": {"name": "hash"}}},
        },
    },
}
FACTS: dict[str, Any] = {
    "parameters": {"total": 1000, "active": 400},
    "flops_per_token": 2400.0,
    "components": components(CONFIG["model"]["moe"]),
    "options": {
        "router": {"norm_topk_prob": False},
        "layout": {"num_experts": 8, "every": 2},
        "balance_losses.0": {"weight": 0.01},
    },
}
HPARAM_TAGS = {metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG}
LOADS = {0: [1 / 8] * 8, 1: [0.5, 0.5] + [0.0] * 6}


@pytest.fixture(autouse=True)
def _files_of_one_second_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read by their names, which end in a number of the process's: the tenth before the ninth."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def observer(run_dir: Path, step: int = 0, **options: Any) -> Any:
    run_dir.mkdir(exist_ok=True)
    built: Any = Registry(entry_points=False).build(OBSERVERS, {"name": "tensorboard", **options}, run_dir, "observers")
    built.on_train_begin(run_dir=run_dir, config=CONFIG, facts=FACTS, step=step)
    return built


def log(
    run: Any,
    step: int,
    metrics: Any = None,
    loads: Any = None,
    alarms: Any = (),
    changes: Any = (),
    backends: Any = (),
) -> None:
    run.on_log(step, metrics or {}, loads or {}, list(alarms), list(changes), list(backends))


def read(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir), size_guidance={"tensors": 0, "scalars": 0, "images": 0})
    events.Reload()
    return events


def texts(events: EventAccumulator, tag: str) -> list[str]:
    return [tensor_util.make_ndarray(e.tensor_proto).item().decode() for e in events.Tensors(tag)]


def test_scalars_of_both_hooks_come_back_at_their_steps(tmp_path: Path) -> None:
    run = observer(tmp_path)
    run.on_evaluate(0, {"eval/loss": 5.5}, [])
    log(run, 10, {"train/loss": 2.5, "moe/layer_00/max_violation": 0.5})
    run.on_evaluate(20, {"eval/loss": 2.25}, ["def f():\n    `x`"])
    run.on_train_end(20, {}, None)
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("Training/loss")] == [(10, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("Training/held_out_loss")] == [(0, 5.5), (20, 2.25)]
    assert [(e.step, e.value) for e in events.Scalars("layers_max_violation/layer_00")] == [(10, 0.5)]
    assert texts(events, "samples/0") == ["    def f():\n        `x`"]


def test_text_holds_the_config_and_facts(tmp_path: Path) -> None:
    observer(tmp_path).on_train_end(0, {}, None)
    events = read(tmp_path)
    assert "norm_topk_prob: false" in texts(events, "config")[0]
    assert "flops_per_token: 2400.0" in texts(events, "facts")[0]


def test_backends_are_told_whenever_they_change(tmp_path: Path) -> None:
    run = observer(tmp_path)
    first, second = ["cpu float32: batched (why)"], ["cpu float32: grouped_mm (why)"]
    for step, backends in ((10, first), (20, first), (30, second)):
        log(run, step, backends=backends)
    run.on_train_end(30, {}, None)
    assert texts(read(tmp_path), "expert_backends") == [f"- {first[0]}", f"- {second[0]}"]


def test_expert_load_is_a_readable_image(tmp_path: Path) -> None:
    run = observer(tmp_path)
    log(run, 10, loads=LOADS)
    run.on_train_end(10, {}, None)
    (event,) = read(tmp_path).Images("Pictures/expert_load")
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert picture.shape == (event.height, event.width, 3)
    np.testing.assert_array_equal(picture, load_image(LOADS, 10))


def test_a_dense_run_has_no_picture_and_no_word_of_one(tmp_path: Path) -> None:
    run = observer(tmp_path)
    log(run, 10, {"train/lm_loss": 2.0})
    run.on_train_end(10, {}, None)
    events = read(tmp_path)
    assert events.Tags()["images"] == []
    assert set(events.Tags()["tensors"]) - {"custom_scalars__config__"} == {"config", "facts"} | HPARAM_TAGS


def test_hparams_are_in_the_runs_own_event_file(tmp_path: Path) -> None:
    run = observer(tmp_path)
    run.on_train_end(0, {}, None)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    found = read(tmp_path).PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(found[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["router"].string_value == "softmax_topk"
    assert start.hparams["router_options"].string_value == "norm_topk_prob=False"
    assert start.hparams["balance_losses"].string_value == "load_balance + router_z"
    assert start.hparams["other_options"].string_value == "layout: every=2; load_balance: weight=0.01"
    assert start.hparams["layers"].string_value == "0: router hash"
    assert start.hparams["optimizer.lr"].number_value == 3e-4
    assert start.hparams["parameters.active"].number_value == 400
    experiment = metadata.parse_experiment_plugin_data(found[metadata.EXPERIMENT_TAG])
    assert {info.name for info in experiment.hparam_infos} == set(start.hparams)
    assert {info.name for info in experiment.hparam_infos if info.differs} == set(SHOWN_FIRST)  # the first columns
    assert {info.name.tag: info.display_name for info in experiment.metric_infos} == METRICS
    end = metadata.parse_session_end_info_plugin_data(found[metadata.SESSION_END_INFO_TAG])
    assert end.status == api_pb2.STATUS_SUCCESS


def test_hparams_have_the_same_columns_for_a_dense_model() -> None:
    """TensorBoard takes the columns from the first run it meets."""
    dense = {**CONFIG, "model": {**CONFIG["model"], "moe": None}}
    row = hparams(dense, {})
    sparse = hparams(CONFIG, FACTS)
    assert list(row) == list(sparse)
    assert [type(value) for value in row.values()] == [type(value) for value in sparse.values()]
    assert row["router"] == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("loss is NaN at step 3"), api_pb2.STATUS_FAILURE), (KeyboardInterrupt(), None)],
)
def test_a_failed_run_says_so_and_an_interrupted_one_stays_open(
    tmp_path: Path, error: BaseException, status: int | None
) -> None:
    observer(tmp_path).on_train_end(3, {}, error)
    events = read(tmp_path)
    assert type(error).__name__ in texts(events, "alarms/now")[-1]
    found = events.PluginTagToContent("hparams")
    if status is None:
        assert metadata.SESSION_END_INFO_TAG not in found
    else:
        end = metadata.parse_session_end_info_plugin_data(found[metadata.SESSION_END_INFO_TAG])
        assert end.status == status


def test_the_text_tab_says_what_is_wrong_now_and_what_was_before(tmp_path: Path) -> None:
    run = observer(tmp_path)
    alarm = Alarm("dead_experts", 1, 0.5, 0.25, "take fewer experts")
    worse = replace(alarm, value=0.75)
    log(run, 1)
    log(run, 2, alarms=[alarm], changes=[AlarmChange(2, "begins", alarm)])
    log(run, 3, alarms=[worse])
    run.on_train_end(3, {}, None)
    events = read(tmp_path)
    assert [event.step for event in events.Tensors("alarms/now")] == [2, 3]
    assert [event.step for event in events.Tensors("alarms/past")] == [2]
    first, last = texts(events, "alarms/now")
    assert first.startswith("**Step 2: 1 alarm is on**\n\n- **dead_experts** layer 1: 0.5 of the experts")
    assert "0.75 of the experts" in last
    assert sorted(["alarms/past", "alarms/now"])[0] == "alarms/now"  # TensorBoard's order


def test_what_is_over_is_said_to_be_and_a_sound_run_has_no_text_of_alarms(tmp_path: Path) -> None:
    alarm = Alarm("dead_experts", 1, 0.5, 0.25, "take fewer experts")
    run, sound = observer(tmp_path / "a"), observer(tmp_path / "b")
    log(run, 2, alarms=[alarm], changes=[AlarmChange(2, "begins", alarm)])
    log(run, 4, changes=[AlarmChange(4, "ends", replace(alarm, value=0.1))])
    for one in (run, sound):
        log(one, 5)
        one.on_train_end(5, {}, None)
    events = read(tmp_path / "a")
    assert texts(events, "alarms/now")[-1] == "**Step 4: no alarm is on**"
    assert [event.step for event in events.Tensors("alarms/past")] == [2, 4]
    assert not [tag for tag in read(tmp_path / "b").Tags()["tensors"] if tag.startswith("alarms")]


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    run = observer(tmp_path)
    for step in (10, 20, 30):
        log(run, step, {"train/loss": 1.0})
    run.writer.close()  # killed: no on_train_end
    later = observer(tmp_path, step=10)
    log(later, 20, {"train/loss": 2.0})
    later.on_train_end(20, {}, None)
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("Training/loss")] == [(10, 1.0), (20, 2.0)]


def test_a_resumed_run_no_longer_says_that_it_has_stopped(tmp_path: Path) -> None:
    observer(tmp_path).on_train_end(10, {}, KeyboardInterrupt())
    later = observer(tmp_path, step=10)
    for step in (20, 30):
        log(later, step)
    later.on_train_end(30, {}, None)
    assert texts(read(tmp_path), "alarms/now")[1:] == ["**Step 20: no alarm is on**"]


def test_ending_before_the_beginning_is_harmless(tmp_path: Path) -> None:
    built: Any = Registry(entry_points=False).build(OBSERVERS, {"name": "tensorboard"}, tmp_path, "observers")
    built.on_train_end(0, {}, RuntimeError("no corpus"))
    assert list(tmp_path.iterdir()) == []
