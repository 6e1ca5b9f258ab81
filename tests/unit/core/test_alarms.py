"""When an alarm begins, grows and ends; which numbers raise one, and which of a healthy run raise none."""

from __future__ import annotations

import json
import math

import pytest

from moelab.alarms import LEARNT_NOTHING, RULES, Alarm, AlarmWatch, LayerFacts
from moelab.errors import CheckpointError

EIGHT_BEST_OF_64 = LayerFacts(64, 8)
# Of a trained router: 64 experts, top-8; every tag that a rule reads.
HEALTHY = {
    "experts_per_token": 8.0, "dropped_fraction": 0.0, "load_entropy": 0.97, "max_violation": 0.8, "idle_fraction": 0.0,
    "router_gradient_ratio": 0.05, "text_gradient_share": 0.4, "routed_to_shared": 0.02, "saturation": 0.9,
    "router_entropy": 3.0,
}  # fmt: skip


def watch(layer: LayerFacts = EIGHT_BEST_OF_64, steps: int = 1000) -> AlarmWatch:
    return AlarmWatch({3: layer}, steps)


def numbers(**values: float) -> dict[str, float]:
    return {f"moe/layer_03/{tag}": value for tag, value in values.items()}


def names(
    watched: AlarmWatch, count: int = 12, start: int = 100, layer: LayerFacts | None = None, **bad: float
) -> list[str]:
    """The alarms that are on after `count` logs, every 10 steps, of the healthy numbers with `bad` in their place."""
    for index in range(count):
        watched.look(start + 10 * index, numbers(**{**HEALTHY, **bad}))
    return [alarm.name for alarm in watched.on]


def test_every_rule_reads_a_number_of_the_healthy_run_and_none_is_alarming() -> None:
    assert {rule.tag for rule in RULES} <= HEALTHY.keys()
    watched = watch()
    for step in range(10, 1001, 10):
        assert watched.look(step, numbers(**HEALTHY)) == []
    assert watched.to_json() == []


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("no_expert", {"experts_per_token": 0.0}),
        ("dropped", {"dropped_fraction": 0.6}),
        ("collapse", {"load_entropy": math.log(12) / math.log(64)}),  # as if 12 experts served: 8 + 0.1 x 56 is 13.6
        ("overload", {"max_violation": 4.5}),
        ("dead_experts", {"idle_fraction": 0.3}),
        ("mostly_dead", {"idle_fraction": 0.6}),
        ("no_gradient", {"router_gradient_ratio": 3e-8}),
        ("untaught", {"text_gradient_share": 1e-6}),
        ("early_saturation", {"saturation": 0.99}),
    ],
)
def test_a_planted_fault_raises_its_alarm(name: str, bad: dict[str, float]) -> None:
    assert name in names(watch(), **bad)
    found = watch_after(bad)
    (kept,) = [entry for entry in found if entry["name"] == name]
    assert kept["on"]
    assert kept["nothing_learnt"] == (name in LEARNT_NOTHING)
    assert {entry["name"] for entry in found} <= {name, "dead_experts"}


def watch_after(bad: dict[str, float]) -> list[dict[str, object]]:
    watched = watch()
    names(watched, **bad)
    return json.loads(json.dumps(watched.to_json()))  # type: ignore[no-any-return]


def test_an_undecided_router_behind_a_wide_shared_expert_is_unused() -> None:
    """A small output alone may be what the text wants, and so may indecision; judged in the second half."""
    flat = 0.999 * math.log(64)
    assert names(watch(), start=500, router_entropy=flat, routed_to_shared=0.01) == ["unused"]
    assert names(watch(), start=500, router_entropy=flat, routed_to_shared=0.3) == []
    assert names(watch(), start=500, router_entropy=3.0, routed_to_shared=0.01) == []
    assert names(watch(), start=300, router_entropy=flat, routed_to_shared=0.01) == []


def test_a_collapse_is_told_from_a_layer_of_few_experts() -> None:
    """One of 8 serving all is collapse; all of 8, two a token, is none; nor is a router that serves 6 of 8."""
    assert names(watch(LayerFacts(8, 1)), load_entropy=0.0, router_entropy=1.0, experts_per_token=1.0) == ["collapse"]
    two = math.log(2) / math.log(8)
    assert "collapse" in names(watch(LayerFacts(8, 2)), load_entropy=two, router_entropy=1.0, experts_per_token=2.0)
    assert names(watch(LayerFacts(8, 6)), load_entropy=0.9, router_entropy=1.0, experts_per_token=6.0) == []


def test_what_chance_and_the_first_steps_do_is_no_alarm() -> None:
    """A number of one step must stay beyond its threshold over three logs, and loads are judged from step 100."""
    assert names(watch(), count=2, load_entropy=0.1) == []
    assert names(watch(), start=10, count=9, load_entropy=0.1, max_violation=6.0, idle_fraction=0.4) == []
    assert names(watch(), start=10, count=9, idle_fraction=0.75) == ["mostly_dead"]
    watched = watch()
    for index in range(12):
        watched.look(100 + 10 * index, numbers(**HEALTHY | ({"load_entropy": 0.1} if index % 3 else {})))
    assert watched.on == []


def test_a_router_by_design_raises_no_alarm_of_learning() -> None:
    fixed = LayerFacts(64, 8, learns=False)
    bad = {"idle_fraction": 0.6, "router_gradient_ratio": 0.0, "text_gradient_share": 0.0, "saturation": 1.0}
    assert names(watch(fixed), load_entropy=0.2, **bad) == ["dead_experts"]


def test_a_router_that_was_trained_before_may_keep_its_mind() -> None:
    assert names(watch(LayerFacts(64, 8, untrained=False)), saturation=1.0) == []


def test_an_alarm_is_told_when_it_begins_grows_and_ends_and_not_between() -> None:
    watched, told = watch(), []
    for step, share in ((10, 0.6), (20, 0.61), (30, 0.65), (40, 0.9), (50, 0.91), (60, 0.1), (70, 0.2), (80, 0.7)):
        told += [(c.step, c.change) for c in watched.look(step, numbers(dropped_fraction=share))]
    assert told == [(10, "begins"), (40, "grows"), (60, "ends"), (80, "begins")]
    (entry,) = watched.to_json()
    assert (entry["first_step"], entry["last_step"], entry["worst"], entry["on"]) == (10, 80, 0.91, True)


def test_a_number_that_was_not_measured_changes_nothing() -> None:
    watched = watch()
    watched.look(50, numbers(text_gradient_share=0.0))
    assert watched.look(60, numbers(load_entropy=0.9)) == []
    assert [alarm.name for alarm in watched.on] == ["untaught"]


def test_a_number_that_is_none_is_an_alarm_of_the_whole_run() -> None:
    watched = watch()
    (change,) = watched.look(10, {"train/loss": math.nan, "train/lr": 1.0})
    assert (change.alarm.name, change.alarm.layer) == ("not_finite", None)
    assert "train/loss" in change.sentence()
    assert [c.change for c in watched.look(20, {"train/loss": 1.0})] == ["ends"]


def test_what_was_found_before_the_first_step_stays_until_it_is_measured_otherwise() -> None:
    watched = watch()
    watched.look(0, {}, [Alarm("untaught", 3, 0.0, 0.01, "do this")])
    assert [entry["first_step"] for entry in watched.to_json()] == [0]
    assert watched.look(10, numbers(load_entropy=0.9)) == []
    assert [c.change for c in watched.look(50, numbers(text_gradient_share=0.4))] == ["ends"]


@pytest.mark.parametrize("stopped", range(1, 8))
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(stopped: int) -> None:
    shares = [0.1, 0.6, 0.7, 0.3, 0.6, 0.6, 0.6, 0.6]
    whole, before, after = watch(), watch(), watch()
    for index, share in enumerate(shares):
        whole.look(200 + index, numbers(idle_fraction=share))
        if index < stopped:
            before.look(200 + index, numbers(idle_fraction=share))
    after.restore(json.loads(json.dumps(before.state())))
    for index, share in list(enumerate(shares))[stopped:]:
        after.look(200 + index, numbers(idle_fraction=share))
    assert after.to_json() == whole.to_json()
    assert after.state() == whole.state()


@pytest.mark.parametrize("state", [3, [3], [{}], [{"alarm": {"name": "x"}}], "alarms", [{"alarm": None}]])
def test_a_state_that_is_none_is_refused(state: object) -> None:
    with pytest.raises(CheckpointError, match="alarms"):
        watch().restore(state)
