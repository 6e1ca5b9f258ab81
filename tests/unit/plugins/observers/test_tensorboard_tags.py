"""Where numbers stand in TensorBoard: the first page answers three questions at any depth, and none is lost."""

from __future__ import annotations

from typing import Any

from tensorboard.plugins.custom_scalar import layout_pb2

from moelab.alarms import RULE_OF, Alarm, AlarmChange
from moelab_plugins.observers import _tensorboard_layout as layout
from moelab_plugins.observers import _tensorboard_tags as tags
from moelab_plugins.observers._tensorboard_hparams import METRICS
from moelab_plugins.observers._tensorboard_texts import now, past

PAGE = 12  # cards of a group that TensorBoard shows at once


def logged(layers: int) -> dict[str, float]:
    """The numbers of one log of a model so deep; layer i has i of each."""
    metrics = ("max_violation", "dead_fraction", "load_entropy", "router_entropy", "saturation")
    found = {f"moe/layer_{layer:02d}/{metric}": float(layer) for layer in range(layers) for metric in metrics}
    found |= {f"moe/mean/{metric}": 1.0 for metric in metrics}
    found |= {"train/lm_loss": 2.0, "train/loss": 2.1, "train/lr": 1e-3, "perf/tokens_per_second": 9.0}
    found |= {"perf/memory_gb": 1.0, "perf/mfu": 0.5, "compute/served_flops_per_token": 7.0}
    return found | {"compute/served_active_parameters": 5.0, "mine/number": 4.0}


def groups(shown: dict[str, float]) -> dict[str, int]:
    """{group: cards} in TensorBoard's order: by ASCII."""
    names = sorted(tag.partition("/")[0] for tag in shown)
    return {name: names.count(name) for name in names}


def test_the_first_group_answers_the_three_questions_at_any_depth() -> None:
    for depth in (1, 2, 28, 80):
        evaluated = {"eval/loss": 3.0, "eval/perplexity": 20.0, "eval/bits_per_byte": 1.5}
        shown = tags.shown(logged(depth)) | tags.alarms_on([]) | tags.shown(evaluated)
        found = groups(shown)
        assert next(iter(found)) == "Overview"
        assert found["Overview"] == 8 <= PAGE
        first = sorted(tag for tag in shown if tag.startswith("Overview"))[:4]
        assert first == [tags.HELD_OUT, tags.ALARMS, tags.FLOPS, tags.TRAINING_LOSS]
        assert len(found) == 4 + 1 + 5  # a group more for each metric of layers, not for each layer
        layers = [name for name in found if name.startswith("layers_")]
        assert list(found)[-len(layers) - 1 :][:-1] == layers  # below all but the stranger's
        assert all(found[name] == depth for name in layers)


def test_pictures_are_the_second_group_that_tensorboard_opens() -> None:
    names = [*tags.shown(logged(2)), tags.PICTURE]
    assert list(groups(dict.fromkeys(names, 0.0)))[:2] == ["Overview", "Pictures"]


def test_one_number_has_one_curve_but_for_its_other_unit() -> None:
    evaluated = {"eval/loss": 3.0, "eval/perplexity": 20.0, "eval/bits_per_byte": 1.5, "eval_domain/loss/py": 2.0}
    assert tags.shown(evaluated) == {tags.HELD_OUT: 1.5, tags.LOSS: 3.0, "eval_domain/loss/py": 2.0}
    del evaluated["eval/bits_per_byte"]
    assert tags.shown(evaluated)[tags.HELD_OUT_LOSS] == 3.0  # the first chart is never empty


def test_nothing_else_is_lost_or_laid_upon_another() -> None:
    metrics = logged(28)
    shown = tags.shown(metrics)
    own = {tags.tag_of(name): value for name, value in metrics.items()}
    assert len(own) == len(metrics)
    assert own.items() <= shown.items()
    assert shown["mine/number"] == 4.0
    assert shown["Routers/max_violation/mean"] == 1.0
    assert shown["layers_max_violation/layer_27"] == 27.0


def test_the_worst_layer_is_worst_by_what_its_alarm_is_about() -> None:
    shown = tags.shown(logged(3))
    assert shown[tags.FULLEST] == shown[tags.DEAD] == 2.0
    assert shown["Routers/load_entropy/worst_layer"] == 0.0  # the alarm is below its threshold
    assert shown["Routers/saturation/worst_layer"] == 2.0
    assert "Routers/router_entropy/worst_layer" not in shown  # high or low: no rule says which is bad
    assert tags.shown({"train/lm_loss": 1.0}) == {tags.TRAINING_LOSS: 1.0}  # a dense run has no layers


def test_the_layout_shows_six_charts_of_what_is_logged_and_hparams_too() -> None:
    (value,) = layout.layout_summary().value
    content = layout_pb2.Layout.FromString(value.tensor.string_val[0])
    first, by_layer = content.category
    assert len(first.chart) == len(by_layer.chart) == 6
    assert not first.closed
    assert by_layer.closed
    titles = [chart.title.partition(":")[0] for chart in first.chart]
    assert titles == ["Cost"] * 2 + ["Dying"] * 2 + ["Better"] * 2  # TensorBoard shows the last first
    known = {*tags.shown(logged(2) | {"eval/bits_per_byte": 1.0}), *tags.shown({"eval/loss": 1.0}), tags.ALARMS}
    charted = {series.value for chart in first.chart for series in chart.margin.series}
    assert charted <= known
    assert set(METRICS) <= known
    assert all(s.value == s.lower == s.upper for chart in first.chart for s in chart.margin.series)  # not smoothed
    assert layout.layout_summary() == layout.layout_summary()  # equal charts are joined


def alarm(layer: int, value: float, name: str = "dead_experts") -> Alarm:
    return Alarm(name, layer, value, 0.25, RULE_OF[name].advice)


def test_a_deep_model_has_a_line_for_each_rule_and_not_for_each_layer() -> None:
    dead = [alarm(layer, 0.3 + (layer == 5) * 0.6) for layer in (0, 1, 2, 5, 9, 10)]
    told = now(40, [*dead, alarm(3, 0.1, "collapse"), alarm(4, 0.05, "collapse")])
    assert told.startswith("**Step 40: 8 alarms are on**")
    lines: list[Any] = [line for line in told.split("\n") if line.startswith("- ")]
    assert len(lines) == 2
    assert "layer 5: 0.9 of the experts" in lines[0]
    assert lines[0].endswith("(and in layers 0-2, 9-10)")
    assert "layer 4" in lines[1]  # below its threshold: the smallest is the worst
    assert lines[1].endswith("(and in layer 3)")
    changes = [AlarmChange(40, "begins", one) for one in dead] + [AlarmChange(40, "ends", alarm(7, 0.1))]
    assert len(past(changes).split("\n")) == 2
    assert past(changes).split("\n")[0].endswith("(and in layers 0-2, 9-10)")


def test_hparams_tell_optimizers_apart() -> None:
    from moelab_plugins.observers._tensorboard_hparams import hparams

    rows = [hparams({"optimizer": {"algorithm": {"name": name}}}, {}) for name in ("adamw", "muon")]
    assert rows[0] != rows[1]
