"""The event file is read back with TensorBoard's own reader."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.util import tensor_util

from moelab.alarms import Alarm, AlarmChange
from moelab.hookspecs import OBSERVERS
from moelab.registry import Registry
from moelab_plugins.observers._load_image import colour, load_image, png
from moelab_plugins.observers.tensorboard import SHOWN_FIRST, hparams

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
        },
    },
}
FACTS = {"parameters": {"total": 1000, "active": 400}, "flops_per_token": 2400.0}
LOADS = {0: [1 / 8] * 8, 1: [0.5, 0.5] + [0.0] * 6}


def observer(run_dir: Path, step: int = 0, **options: Any) -> Any:
    run_dir.mkdir(exist_ok=True)
    built: Any = Registry(entry_points=False).build(OBSERVERS, {"name": "tensorboard", **options}, run_dir, "observers")
    built.on_train_begin(run_dir=run_dir, config=CONFIG, facts=FACTS, step=step)
    return built


def read(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir), size_guidance={"tensors": 0, "scalars": 0, "images": 0})
    events.Reload()
    return events


def texts(events: EventAccumulator, tag: str) -> list[str]:
    return [tensor_util.make_ndarray(e.tensor_proto).item().decode() for e in events.Tensors(f"{tag}/text_summary")]


def test_scalars_of_both_hooks_come_back_at_their_steps(tmp_path: Path) -> None:
    run = observer(tmp_path)
    run.on_log(10, {"train/loss": 2.5, "moe/layer_00/max_violation": 0.5}, LOADS, [], [])
    run.on_evaluate(20, {"eval/loss": 2.25}, ["def f():\n    `x`"])
    run.on_train_end(20, {}, None)
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(20, 2.25)]
    assert [(e.step, e.value) for e in events.Scalars("moe/layer_00/max_violation")] == [(10, 0.5)]
    assert texts(events, "samples/0") == ["    def f():\n        `x`"]


def test_text_holds_the_config_and_facts(tmp_path: Path) -> None:
    observer(tmp_path).on_train_end(0, {}, None)
    events = read(tmp_path)
    assert "norm_topk_prob: false" in texts(events, "config")[0]
    assert "flops_per_token: 2400.0" in texts(events, "facts")[0]
    assert "fair share" in texts(events, "expert_load_legend")[0]


def test_backends_are_told_whenever_they_change(tmp_path: Path) -> None:
    run = observer(tmp_path)
    first, second = ["cpu float32: batched (why)"], ["cpu float32: grouped_mm (why)"]
    for step, backends in ((10, first), (20, first), (30, second)):
        run.on_log(step, {}, {}, [], backends)
    run.on_train_end(30, {}, None)
    assert texts(read(tmp_path), "expert_backends") == [f"- {first[0]}", f"- {second[0]}"]


def test_expert_load_is_a_readable_image(tmp_path: Path) -> None:
    run = observer(tmp_path)
    run.on_log(10, {}, LOADS, [], [])
    run.on_train_end(10, {}, None)
    (event,) = read(tmp_path).Images("moe/expert_load")
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert picture.shape == (event.height, event.width, 3)
    assert event.width >= 900
    assert event.height >= 100
    np.testing.assert_array_equal(picture, load_image(LOADS))


def test_hparams_are_in_the_runs_own_event_file(tmp_path: Path) -> None:
    run = observer(tmp_path)
    run.on_train_end(0, {}, None)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    found = read(tmp_path).PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(found[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["router"].string_value == "softmax_topk(norm_topk_prob=False)"
    assert start.hparams["balance_losses"].string_value == "load_balance(weight=0.01) + router_z(weight=0.001)"
    assert start.hparams["optimizer.lr"].number_value == 3e-4
    assert start.hparams["parameters.active"].number_value == 400
    experiment = metadata.parse_experiment_plugin_data(found[metadata.EXPERIMENT_TAG])
    assert {info.name for info in experiment.hparam_infos} == set(start.hparams)
    assert {info.name for info in experiment.hparam_infos if info.differs} == set(SHOWN_FIRST)  # the first columns
    assert "eval/loss" in {info.name.tag for info in experiment.metric_infos}
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
    assert type(error).__name__ in texts(events, "alarms")[-1]
    found = events.PluginTagToContent("hparams")
    if status is None:
        assert metadata.SESSION_END_INFO_TAG not in found
    else:
        end = metadata.parse_session_end_info_plugin_data(found[metadata.SESSION_END_INFO_TAG])
        assert end.status == status


def test_the_text_tab_tells_what_alarms_do_and_nothing_in_between(tmp_path: Path) -> None:
    run = observer(tmp_path)
    alarm = Alarm("dead_experts", 1, 0.5, 0.25, "take fewer experts")
    for step, changes in (
        (1, []),
        (2, [AlarmChange(2, "begins", alarm)]),
        (3, []),
        (4, [AlarmChange(4, "ends", alarm)]),
    ):
        run.on_log(step, {}, {}, changes, [])
    run.on_train_end(5, {}, None)
    told = read(tmp_path).Tensors("alarms/text_summary")
    assert [event.step for event in told] == [2, 4]
    assert "layer 1: 0.5 of the experts" in tensor_util.make_ndarray(told[0].tensor_proto).item().decode()


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    run = observer(tmp_path)
    for step in (10, 20, 30):
        run.on_log(step, {"train/loss": 1.0}, {}, [], [])
    run.writer.close()  # killed: no on_train_end
    later = observer(tmp_path, step=10)
    later.on_log(20, {"train/loss": 2.0}, {}, [], [])
    later.on_train_end(20, {}, None)
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("train/loss")] == [(10, 1.0), (20, 2.0)]


def test_ending_before_the_beginning_is_harmless(tmp_path: Path) -> None:
    built: Any = Registry(entry_points=False).build(OBSERVERS, {"name": "tensorboard"}, tmp_path, "observers")
    built.on_train_end(0, {}, RuntimeError("no corpus"))
    assert list(tmp_path.iterdir()) == []


def test_colours_mark_dead_fair_and_overloaded_experts() -> None:
    dead, fair, full, fuller = colour(np.array([0.0, 1.0, 4.0, 9.0]))
    assert dead.tolist() == [0, 0, 0]
    assert fair.min() > 220
    assert full.tolist() == fuller.tolist()
    assert full[0] > 3 * full[2]  # red


def test_png_is_what_pillow_reads() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)


def test_layers_of_different_widths_share_one_image() -> None:
    image = load_image({0: [1.0], 3: [0.25] * 4})
    assert image.shape[1] == 960 // 4 * 4
