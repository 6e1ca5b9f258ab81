"""What several configs differ in."""

from __future__ import annotations

from typing import Any

from moelab.config.differing import commonest, differing, short_keys, shown


def _moe(**parts: Any) -> dict[str, Any]:
    return {"model": {"moe": parts}}


def test_equal_configs_differ_in_nothing_and_bookkeeping_is_no_difference() -> None:
    assert differing([]) == []
    assert differing([{"seed": 1}]) == [{}]
    assert differing([{"seed": 1, "run_dir": "a"}, {"seed": 1, "run_dir": "b"}]) == [{}, {}]


def test_parts_of_other_names_differ_in_the_name_alone() -> None:
    a, b, c = ({"name": "switch", "k": 1}, {"name": "switch", "k": 2}, {"name": "hash", "salt": 3})
    key = "model.moe.router"
    assert differing([_moe(router=r) for r in (a, b, c)]) == [
        {f"{key}.name": "switch", f"{key}.k": 1}, {f"{key}.name": "switch", f"{key}.k": 2}, {f"{key}.name": "hash"},
    ]  # fmt: skip
    assert differing([_moe(router=a), _moe(router=b)]) == [{f"{key}.k": 1}, {f"{key}.k": 2}]


def test_a_section_with_a_name_is_no_part() -> None:
    schedules = [{"schedule": {"name": name, "warmup_steps": n}} for name, n in (("cosine", 1), ("wsd", 2))]
    assert differing(schedules) == [
        {"schedule.name": "cosine", "schedule.warmup_steps": 1}, {"schedule.name": "wsd", "schedule.warmup_steps": 2},
    ]  # fmt: skip


def test_a_dense_model_differs_in_having_no_experts() -> None:
    sparse = [_moe(router={"name": "hash", "salt": salt}) for salt in (1, 2)]
    found = differing([*sparse, {"model": {"moe": None}}])
    assert found == [{"model.moe.router.salt": 1}, {"model.moe.router.salt": 2}, {"model.moe": None}]


def test_lists_of_the_same_parts_are_compared_part_by_part() -> None:
    def losses(*pairs: tuple[str, float]) -> dict[str, Any]:
        return {"losses": [{"name": name, "weight": weight} for name, weight in pairs]}

    one, two = losses(("z", 1.0), ("b", 2.0)), losses(("z", 1.0), ("b", 3.0))
    assert differing([one, two]) == [{"losses.1.weight": 2.0}, {"losses.1.weight": 3.0}]
    other = losses(("z", 1.0))
    found = differing([one, other, {"losses": []}])
    assert [shown(each["losses"]) for each in found] == ["z + b", "z", "[]"]


def test_a_key_that_an_older_version_did_not_write_is_no_choice() -> None:
    assert differing([{"train": {"steps": 1}}, {"train": {"steps": 1, "new": 5}}]) == [{}, {}]
    layers = [_moe(layers={}), _moe(layers={"0-3": {"router": {"name": "hash"}}})]
    assert differing(layers) == [{}, {"model.moe.layers.0-3": {"router": {"name": "hash"}}}]


def test_short_keys_tell_apart_and_call_a_part_by_its_key() -> None:
    keys = ["seed", "data.seed", "model.moe.router.name", "model.moe.losses.0.weight", "a.lr", "b.lr"]
    assert list(short_keys(keys).values()) == ["seed", "data.seed", "router", "weight", "a.lr", "b.lr"]
    assert short_keys(["x.losses.0", "x.losses.1"]) == {"x.losses.0": "losses.0", "x.losses.1": "losses.1"}


def test_what_most_have_is_more_than_half_of_at_least_three() -> None:
    assert commonest([{"a": 1}, {"a": 1}, {"a": 2}]) == {"a": 1}
    assert commonest([{"a": 1}, {"a": 2}]) == {}
    assert commonest([{"a": 1}, {"a": 1}, {}, {}]) == {}
