"""Which way products of a few rows go on the machine at hand: measured once, for generation.

A problem is the sizes of matrices that read the same rows, and how many rows. What is unknown of a model is measured
in one go, in 0.1 to 0.5 s, and kept beside the ways of training (ways_file.py), so that the same command computes the
same again. Ways take turns on the model's own matrices, and other weights of it are read before each turn, as a token's
are: matrices that still lie in the processor's caches are read another way best.
D columns, N outputs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from moelab.moe.thin_product import (
    BAGGED,
    ONEDNN,
    ORIGINAL,
    PACKED,
    TURNED,
    Copy,
    WayOf,
    few_product,
    readable,
    reads_matrices_faster,
    usual_way,
)  # fmt: skip
from moelab.ways import Calls, Clock, Found, Seconds, fastest, take_turns
from moelab.ways_file import keep, machine_facts, place_of, read_kept

logger = logging.getLogger("moelab")
MOST_ROWS = 64  # that are told apart, in powers of two; prompts have more, and are read as the texts are
SAMPLES = 3  # of a problem: layers are alike
MOST_BYTES = 1 << 28  # of all matrices that are measured; as much and half as much again are their copies
BETWEEN = 1 << 26  # bytes of other weights that are read before each turn
ROUNDS = 5, 15  # at least and at most; each way once a round, on every problem
COPIES = (TURNED, BAGGED, PACKED)
MAKING = "making "  # what a copy takes to be made, beside what a product takes
Group = tuple[Tensor, ...]  # matrices that read the same rows


@dataclass(frozen=True)
class Table:
    """What is known of this machine, by this process: what another one finds out meanwhile changes nothing here."""

    machine: Mapping[str, str]
    path: Path | None
    found: dict[str, Found]
    lock: Lock


@cache
def table_of(threads: int) -> Table:
    machine = machine_facts(threads, torch.device("cpu"))
    path = place_of(machine)
    return Table(machine, path, read_kept(path, machine), Lock())


def measured_way(
    groups: Iterable[Group], rows: int, tokens: int, others: Callable[[], Iterable[Tensor]], autotune: bool | None
) -> WayOf | None:
    """The way of each of `groups` for products of `rows` rows, of which `tokens` are to come; None: `usual_way`.

    others: all weights. `autotune`: whether to go by measurements; None: where there are no constants.
    """
    if autotune is False or (autotune is None and reads_matrices_faster()):
        return None
    rows = min(MOST_ROWS, 1 << (rows - 1).bit_length())
    problems: dict[str, list[Group]] = {}
    for some in groups:
        if readable(some):
            problems.setdefault(_title(some, rows), []).append(some)
    if not problems:
        return None
    table = table_of(torch.get_num_threads())
    with table.lock:
        unknown = {title: each for title, each in problems.items() if not _knows(table.found.get(title), rows)}
        if unknown:
            _find_out(table, unknown, rows, others())

    def way_of(some: Group) -> str:
        found, usual = table.found.get(_title(some, rows)), usual_way(some, rows)
        return usual if found is None or not found.seconds else fastest(_whole(found.seconds, tokens), usual)

    return way_of


def _title(some: Group, rows: int) -> str:
    return f"few rows {rows} x {some[0].shape[1]} to {' + '.join(str(len(one)) for one in some)} float32"


def _ways(rows: int) -> tuple[str, ...]:
    return tuple(way for way in (ORIGINAL, ONEDNN, *COPIES) if way != BAGGED or rows == 1)


def _knows(found: Found | None, rows: int) -> bool:
    """Whether all ways there are were measured, or it is decided that none is."""
    wanted = {*_ways(rows), *(MAKING + way for way in COPIES if way in _ways(rows))}
    return found is not None and found.seconds.keys() in (wanted, set())


def _whole(seconds: Seconds, tokens: int) -> Seconds:
    """way -> seconds of a product with a token's share of the copy, where there is one."""
    return {way: took + seconds.get(MAKING + way, 0.0) / tokens for way, took in _products(seconds).items()}


def _find_out(table: Table, unknown: Mapping[str, Sequence[Group]], rows: int, others: Iterable[Tensor]) -> None:
    """Measure, take what another process has kept meanwhile, and keep; told in a line."""
    began = time.perf_counter()
    chosen = _samples(unknown)
    found = measure(chosen, rows, _between(others, chosen))
    kept = read_kept(table.path, table.machine, tell=False)
    for title in found:
        if _knows(kept.get(title), rows):
            found[title] = kept[title]
    table.found.update({title: Found(ORIGINAL, {}) for title in unknown} | found)
    if found:
        keep(table.path, table.machine, {**kept, **found})
        logger.warning(
            "autotune: how generation reads %d kinds of matrices was measured (%.1f s); %s",
            len(found), time.perf_counter() - began, table.path or "not kept",
        )  # fmt: skip


def _samples(problems: Mapping[str, Sequence[Group]]) -> dict[str, list[Group]]:
    """Some groups of each problem, as many as MOST_BYTES holds; none of one that it doesn't hold."""
    left = MOST_BYTES
    chosen: dict[str, list[Group]] = {title: [] for title in problems}
    for number in range(SAMPLES):
        for title, groups in problems.items():
            size = 4 * sum(one.numel() for one in groups[0])
            if number < len(groups) and size <= left:
                left -= size
                chosen[title].append(groups[number])
    return {title: groups for title, groups in chosen.items() if groups}


def _between(others: Iterable[Tensor], chosen: Mapping[str, Sequence[Group]]) -> list[Tensor]:
    """BETWEEN bytes of the weights, or what there are, that aren't measured themselves."""
    measured = {one.data_ptr() for groups in chosen.values() for some in groups for one in some}
    left = BETWEEN
    found: list[Tensor] = []
    for one in others:
        if left > 0 and one.is_floating_point() and one.is_contiguous() and one.data_ptr() not in measured:
            found.append(one.detach().view(-1)[: -(-left // one.element_size())])
            left -= found[-1].numel() * one.element_size()
    return found


def measure(
    problems: Mapping[str, Sequence[Group]], rows: int, between: Sequence[Tensor], clock: Clock = time.perf_counter
) -> dict[str, Found]:
    """Lower quartiles of the turns of each way, by all groups of a problem.

    Not medians: what else runs on the machine can only add.
    """
    tried = [(title, *_calls(some, rows, clock)) for title, groups in problems.items() for some in groups]
    turns = take_turns([calls for _, calls, _ in tried], ROUNDS, lambda: [one.sum() for one in between], clock)
    taken: dict[str, dict[str, list[float]]] = {title: {} for title in problems}
    for (title, _, making), times in zip(tried, turns, strict=True):
        for way, each in (times | making).items():
            taken[title].setdefault(way, []).extend(each)
    found = {}
    for title, times in taken.items():
        seconds = {way: sorted(each)[len(each) // 4] for way, each in times.items()}
        usual = usual_way(problems[title][0], rows)
        found[title] = Found(fastest(_products(seconds), usual), seconds)
    return found


def _products(seconds: Seconds) -> Seconds:
    return {way: took for way, took in seconds.items() if not way.startswith(MAKING)}


def _calls(some: Group, rows: int, clock: Clock) -> tuple[Calls, dict[str, list[float]]]:
    """way -> a product of each of `some` with rows; MAKING + way -> the seconds that its copy took to be made."""
    x = torch.ones(rows, some[0].shape[1])
    calls: dict[str, Callable[[], object]] = {
        ORIGINAL: lambda: [few_product(x, one) for one in some],
        ONEDNN: partial(_each, [Copy.of((one,), ONEDNN) for one in some], x),
    }
    making: dict[str, list[float]] = {}
    for way in (TURNED, PACKED):
        started = clock()
        made = Copy.of(some, way)
        took = clock() - started
        for same in (TURNED, BAGGED) if way == TURNED and rows == 1 else (way,):
            making[MAKING + same] = [took]
            calls[same] = partial(Copy(same, made.read).product, x)
    return calls, making


def _each(copies: Sequence[Copy], x: Tensor) -> list[Tensor]:
    return [one.product(x) for one in copies]
