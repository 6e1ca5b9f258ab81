"""Laying one config over another."""

from __future__ import annotations

from moelab.config.overlay import overlay
from moelab.config.run import RunConfig


def test_mappings_merge_and_scalars_replace() -> None:
    assert overlay({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 9}}) == {"a": 1, "b": {"c": 9, "d": 3}}


def test_a_changed_name_drops_the_old_options() -> None:
    assert overlay({"name": "x", "k": 1}, {"name": "y"}) == {"name": "y"}


def test_the_same_name_keeps_them() -> None:
    assert overlay({"name": "x", "k": 1}, {"name": "x", "j": 2}) == {"name": "x", "k": 1, "j": 2}


def test_options_without_a_name_merge_into_the_part() -> None:
    assert overlay({"name": "x", "k": 1}, {"k": 2}) == {"name": "x", "k": 2}


def test_a_name_given_to_a_mapping_without_one_merges() -> None:
    assert overlay({"seed": 1}, {"name": "run"}) == {"seed": 1, "name": "run"}


def test_a_name_in_a_dataclass_is_an_ordinary_key() -> None:
    base = {"name": "a", "schedule": {"name": "cosine", "warmup_steps": 3}}
    merged = overlay(base, {"name": "b", "schedule": {"name": "wsd"}}, RunConfig)
    assert merged == {"name": "b", "schedule": {"name": "wsd", "warmup_steps": 3}}


def test_lists_are_replaced_and_indices_reach_into_them() -> None:
    assert overlay([1, 2], [3]) == [3]
    assert overlay([{"a": 1}, {"a": 2}], {"1": {"a": 5}}) == [{"a": 1}, {"a": 5}]
