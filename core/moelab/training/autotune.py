"""`train.autotune`: which way a run's products, attention and experts go, measured before its first step.

The places that have a choice are those that ask `moelab.ways`. Each problem is measured alone, on the first batch; a
way that wins there must then win in whole passes of the run's next batches too, where caches are as cold, and shapes as
new, as in a step: of bf16 products that were measured again and again, a quarter was faster alone only. What was found
is kept for each machine, so that the same command computes the same again, and what was chosen is in the run's
checkpoints, so that it goes on as it began, wherever that is. Sums differ in their last bits between ways:
`train.autotune: false` leaves all to constants, and so does a run too short to win back what measuring takes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from moelab.checkpoint import STATE
from moelab.errors import CheckpointError
from moelab.records import Record
from moelab.safe_files import Reading
from moelab.training.borders import as_in, enter
from moelab.training.objective import Place
from moelab.training.rehearsal import no_trace
from moelab.training.setup import Setup
from moelab.training.step import batch_terms
from moelab.ways import Found, Measuring, Ways, using, wait
from moelab.ways_file import keep, machine_facts, place_of, read_kept

logger = logging.getLogger("moelab")
WAYS = "ways"  # of state.json and summary.json
LONG = {"cpu": 3e14}  # FLOPs of a run: about an hour of two cores; elsewhere it was not tried, and is only asked for
PAIRS = 5  # of passes with and without a way that is faster alone, after one of each that warms up
WINS = 0.99  # of a pass's time, at most, is what such a way must leave
STORED = Reading(CheckpointError, "use an earlier checkpoint, or restore it")


def find_ways(setup: Setup, state: Mapping[str, Any]) -> Ways | None:
    """The run's table, before its first step; None: constants decide. `state`: of the checkpoint that it goes on from.

    Raises CheckpointError for a state that no run wrote.
    """
    if state:
        stored = Record(STATE, state, STORED).record(WAYS, optional=True)
        return Ways({problem: stored.text(problem) for problem in stored.values}) if stored.values else None
    return _measured(setup) if _wanted(setup) else None


def _wanted(setup: Setup) -> bool:
    """Whether it was asked for, or pays: of a long run of one process whose memory is not planned to the byte."""
    train = setup.config.train
    if setup.ranks.size > 1 or setup.config.alignment or train.autotune is False:
        return False
    if train.autotune:
        return True
    device = setup.step_settings.precision.device.type
    return train.memory_budget is None and device in LONG and _flops(setup) >= LONG[device]


def _flops(setup: Setup) -> float:
    """Of all steps, as the routers declare."""
    total = 0.0
    for number in range(len(setup.stages)) or (0,):
        stage = as_in(setup, number)
        tokens = stage.config.train.batch_size * stage.config.train.sequence_length
        total += stage.flops_per_token * tokens * (stage.end - stage.first)
    return total


def _measured(setup: Setup) -> Ways:
    """By what is kept of this machine, and what isn't, now; told in lines."""
    machine = machine_facts(setup.threads, setup.step_settings.precision.device)
    path = place_of(machine)
    if path is None or not os.path.exists(path):
        logger.warning("train.autotune: measuring ways to compute a step, of which nothing is known of this machine")
    began = time.perf_counter()
    table = measure_ways(setup, read_kept(path, machine))
    if table.fresh:
        kept = read_kept(path, machine, tell=False)
        for problem in table.fresh:  # another run has kept the same meanwhile: one answer for both
            if problem in kept and kept[problem].seconds.keys() == table.found[problem].seconds.keys():
                table.take(problem, kept[problem])
        keep(path, machine, {**kept, **table.found})
    count, fresh, seconds = len(table.chosen), len(table.fresh), time.perf_counter() - began
    tell = logger.warning if fresh else logger.info
    tell("train.autotune: %d choices, %d of them measured now (%.1f s); %s", count, fresh, seconds, path or "not kept")
    for problem, found in table.found.items():
        usual, took = table.usual[problem], found.seconds
        if found.way != usual:
            share = took[found.way] / took[usual]
            tell("train.autotune: %s: %s, in %.2f of the time of %s", problem, found.way, share, usual)
    return Ways(table.chosen)


def measure_ways(setup: Setup, known: Mapping[str, Found]) -> Measuring:
    """Every stage's first micro-batch once forwards: a choice that isn't `known` is measured on the way, and tried."""
    table = Measuring(known)
    for number in reversed(range(max(len(setup.stages), 1))):  # the first one last: the model stays in it
        stage, before = enter(setup, number), len(table.fresh)
        with no_trace(stage.model), using(table), torch.no_grad():
            _forwards(stage, 0)
        for problem in table.fresh[before:]:
            if table.chosen[problem] != table.usual[problem]:
                _try(stage, table, problem)
    return table


def _try(setup: Setup, table: Measuring, problem: str) -> None:
    """Back to the usual way, unless whole passes are faster by the other one."""
    found, given = table.found[problem], Ways(table.chosen)
    without = Ways({**table.chosen, problem: table.usual[problem]})
    ratios = []
    with no_trace(setup.model):
        for number in range(1 + PAIRS):
            order = (given, without) if number % 2 else (without, given)
            taken = {id(ways): _pass(setup, ways, number) for ways in order}
            ratios.append(taken[id(given)] / taken[id(without)])
    ratio = median(ratios[1:])
    table.take(problem, replace(found, step=ratio, way=found.way if ratio < WINS else table.usual[problem]))


def _pass(setup: Setup, ways: Ways, number: int) -> float:
    """Seconds of a micro-batch forwards and backwards; no gradient is left."""
    with using(ways), torch.enable_grad():
        wait()
        began = time.perf_counter()
        terms = _forwards(setup, number)
        torch.stack([value * weight for value, weight in terms.values()]).sum().backward()
        wait()
        taken = time.perf_counter() - began
    for parameter in (*setup.model.parameters(), *setup.learner.parameters()):
        parameter.grad = None
    return taken


def _forwards(setup: Setup, number: int) -> Any:
    """The terms of the first micro-batch of the stage's batch `number`."""
    settings, step = setup.step_settings, min(setup.first + number, setup.end - 1)
    batch = setup.batches.batch(step)
    part = batch.split(settings.micro_batch_size)[0].to(settings.precision.device)
    place = Place(step, 0, part.token_count / batch.token_count, batch.token_count)
    return batch_terms(setup.model.train(), setup.balance_losses, part, None, place, settings)[0]
