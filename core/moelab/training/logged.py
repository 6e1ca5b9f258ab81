"""A logged step: its numbers, what the probe found, the alarms they raise, and who is told."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from moelab.alarms import AlarmWatch
from moelab.data.lineage import CONVERSION
from moelab.training.borders import as_in, stage_metrics
from moelab.training.budget import tell_measured
from moelab.training.loop import Loop, due, served_backends
from moelab.training.mixture import mixture_metrics
from moelab.training.probe import look, probe_batch
from moelab.training.router_gradient import frozen_by_config
from moelab.training.router_numbers import layer_facts
from moelab.training.setup import Setup
from moelab.training.step import StepResult
from moelab.training.summary import MEMORY, log_metrics

logger = logging.getLogger("moelab")


def log_step(loop: Loop, result: StepResult, rate: float) -> None:
    loop.lock.check()
    chosen = served_backends(loop)
    if chosen != loop.backends:  # `auto` decides when it sees a size for the first time
        logger.info("expert backends: %s", "; ".join(chosen))
        loop.backends = chosen
    elapsed = loop.progress.seconds - loop.progress.logged[0]
    report = log_metrics(result, rate, loop.progress, loop.setup)
    step, train = loop.progress.step, loop.setup.config.train
    probed = probe(loop) if due(step, train.probe_every) or step == train.steps else {}
    metrics = probed | report.metrics | mixture_metrics(loop.setup.batches, step, loop.setup.first)
    metrics |= stage_metrics(loop.setup) | dict(loop.setup.step_settings.objective.metrics())
    if loop.setup.compiled is not None and loop.setup.compiled.line() != loop.told_compiled:
        loop.told_compiled = loop.setup.compiled.line()  # again whenever another shape was compiled
        logger.info("%s", loop.told_compiled)
    taken = metrics[MEMORY]
    loop.too_much = tell_measured(loop.setup.config, loop.setup.planned, taken, step, loop.too_much)
    metrics |= loop.reading.metrics(step, elapsed, loop.setup.ranks)
    loop.loads = {str(layer): shares for layer, shares in report.loads.items()}
    changes = loop.alarms.look(step, metrics)
    for change in changes:
        logger.warning("%s", change.sentence())
    on = [{"name": alarm.name, "layer": alarm.layer, "value": alarm.value} for alarm in loop.alarms.on]
    loop.metrics.write(loop.progress.row() | metrics | ({"alarms": on} if on else {}))
    loop.observers.hook.on_log(
        step=step, metrics=metrics, loads=report.loads, alarms=loop.alarms.on, changes=loop.changes + changes,
        backends=chosen,
    )  # fmt: skip
    loop.changes = []


def probe(loop: Loop) -> dict[str, float]:
    """Show a fixed batch to the observers that want to see one; -> the numbers that they found, by tag.

    Through all stages of a run it is that of the first, so that what moves is the routes and not the text.
    """
    setup, hook = loop.setup, loop.observers.hook.on_probe
    if setup.config.train.probe_every == 0 or not setup.blocks:
        return {}
    if not setup.ranks.any(loop.observers.listens("on_probe")):
        return {}
    first = as_in(setup, 0)
    batch = probe_batch(first.validation, first.step_settings.micro_batch_size)
    shown = look(setup.model, batch, list(setup.corpus.domains), setup.step_settings.precision)
    found = hook(step=loop.progress.step, probe=shown)
    return {tag: float(value) for numbers in reversed(found) if numbers for tag, value in numbers.items()}


def alarm_watch(setup: Setup, state: Mapping[str, Any]) -> AlarmWatch:
    """As it was when a resumed run left off; what a new one found before its first step has been told."""
    lineage = setup.lineage
    untrained = lineage is None or any(stage == CONVERSION for stage, _ in lineage.stages[-1:])
    frozen = frozen_by_config(setup.model, setup.blocks, setup.config.train)
    facts = layer_facts(setup.blocks, untrained=untrained, frozen=frozen)
    watch = AlarmWatch(facts, setup.config.train.steps)
    if state:
        watch.restore(state.get("alarms", []))
    else:
        watch.look(0, {}, [alarm for alarm in setup.alarms if alarm.layer is None or facts[alarm.layer].learns])
    return watch
