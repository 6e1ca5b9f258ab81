"""What comparing relies on in a run's config.yaml and summary.json, checked once: other keys are free."""

from __future__ import annotations

from dataclasses import fields

from moelab.data.seen import SeenText
from moelab.records import Record
from moelab.training.format import BEST_EVALUATION, ENDED_EARLY, NAMED_WEIGHTS, REPLANNED

_COUNTS = [field.name for field in fields(SeenText) if field.name not in ("source", "unknown")]


def check_config(config: Record) -> None:
    """Sections are mappings, seeds whole numbers. Raises the record's error naming file and key."""
    config.record("model").record("moe", optional=True)
    config.text("name", None)
    config.integer("seed", None)
    config.record("data", optional=True).integer("order_seed", None)
    config.record("train", optional=True).text("init_from", None)


def check_summary(summary: Record) -> None:
    """Numbers, texts and mappings where they belong. Raises the record's error naming file and key."""
    for key in ("name", "status", "device", "dtype", "init_from"):
        summary.text(key, None)
    for key in ("tokens", "flops", "flops_declared", "seconds"):
        summary.number(key, None, least=0)
    for key, number in summary.record("parameters").values.items():
        if number is not None:
            summary.record("parameters").number(key, least=0)
    summary.record("final").numbers(finite=False)
    for key in ("versions", "plugins", "components"):
        summary.record(key, optional=True)
    summary.listed("backends", str, optional=True)
    loads = summary.record("expert_load", optional=True)
    for layer in loads.values:
        if not layer.isdecimal() or len(layer) > 9:
            loads.refuse(layer, "under the number of a layer")
        loads.listed(layer, float)
    _check_ending(summary)
    noncausal = summary.record("noncausal", optional=True)
    for mode in ("training", "evaluation"):
        noncausal.listed(mode, int, optional=True)
    _check_lineage(summary.record("lineage", optional=True))
    named = summary.record(NAMED_WEIGHTS, optional=True)
    _check_stages(named)
    recipes = named.record("recipes", optional=True)
    for key in recipes.values:
        recipes.text(key)
    seen = summary.record("data").record("seen", optional=True)
    seen.text("source", None)
    seen.listed("unknown", str, optional=True)
    for key in _COUNTS:
        seen.integer(key, 0, least=0)


def _check_ending(summary: Record) -> None:
    for number, change in enumerate(summary.listed(REPLANNED, dict, optional=True)):
        one = Record(f"{summary.where}: {REPLANNED}.{number}", change, summary.reading)
        for key in ("step", "planned", "steps"):
            one.integer(key, least=0)
        one.integer("rewarm_steps", None, least=0)
        one.number("factor", least=0)
    best = summary.record(BEST_EVALUATION, optional=True)
    best.integer("step", None, least=0)
    best.number("loss", None)
    best.integer("evaluations", 0, least=0)
    ended = summary.record(ENDED_EARLY, optional=True)
    for key in ("planned", "patience"):
        ended.integer(key, None, least=0)


def _check_lineage(lineage: Record) -> None:
    lineage.text("recipe", None)
    _check_stages(lineage)


def _check_stages(lineage: Record) -> None:
    for stage in lineage.listed("stages", list, optional=True):
        if len(stage) != 2:
            lineage.refuse("stages", "a list of [stage, seeds]")
