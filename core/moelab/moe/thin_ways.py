"""Which way weights are read for a few rows on the machine at hand: measured once, for generation.

A problem is the sizes of matrices that read the same rows, or of a layer's experts, and how many rows. What is unknown
of a model is measured in one go, in some tenths of a second, and kept beside the ways of training (ways_file.py), so
that the same command computes the same again. Ways take turns on the model's own weights, and others of it are read
before each turn, as a token's are: what still lies in the processor's caches is read another way best.
D columns, N outputs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from moelab.moe.experts import ExpertBank
from moelab.moe.few_rows import MOST, ExpertTables, few_rows
from moelab.moe.routing import Routing
from moelab.moe.thin_product import (
    BAGGED,
    ONEDNN,
    ORIGINAL,
    PACKED,
    TURNED,
    Copy,
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
MOST_BYTES = 1 << 28  # of all weights that are measured; as much and half as much again are their copies
BETWEEN = 1 << 26  # bytes of other weights that are read before each turn
ROUNDS = 5, 15  # at least and at most; each way once a round, on every problem
TABLES = "tables"  # of experts: by a copy of gate_up (few_rows.py); ORIGINAL is without
COPIES = (TURNED, BAGGED, PACKED, TABLES)
MAKING = "making "  # what a copy takes to be made, beside what a product takes
Turns = dict[str, list[float]]  # way, or MAKING + way -> seconds of each turn


class Problem(Protocol):
    """Weights that `rows` rows read in one of several ways."""

    @property
    def weights(self) -> tuple[Tensor, ...]: ...

    def title(self, rows: int) -> str: ...

    def ways(self, rows: int) -> tuple[str, ...]:
        """None where they are left to constants."""

    def usual(self, rows: int) -> str:
        """What constants say, where many are to come."""

    def trials(self, rows: int, clock: Clock) -> tuple[Calls, Turns]:
        """What reads them each way, and what each copy for it took to be made."""


@dataclass(frozen=True)
class Matrices:
    """Those that read the same rows."""

    weights: tuple[Tensor, ...]

    def title(self, rows: int) -> str:
        sizes = " + ".join(str(len(one)) for one in self.weights)
        return f"few rows {rows} x {self.weights[0].shape[1]} to {sizes} float32"

    def ways(self, rows: int) -> tuple[str, ...]:
        if not readable(self.weights):
            return ()
        return tuple(way for way in (ORIGINAL, ONEDNN, TURNED, BAGGED, PACKED) if way != BAGGED or rows == 1)

    def usual(self, rows: int) -> str:
        return usual_way(self.weights, rows)

    def trials(self, rows: int, clock: Clock) -> tuple[Calls, Turns]:
        x = torch.ones(rows, self.weights[0].shape[1])
        calls: dict[str, Callable[[], object]] = {
            ORIGINAL: lambda: [few_product(x, one) for one in self.weights],
            ONEDNN: partial(_each, [Copy.of((one,), ONEDNN) for one in self.weights], x),
        }
        making: Turns = {}
        for way in (TURNED, PACKED):
            started = clock()
            made = Copy.of(self.weights, way)
            took = clock() - started
            for same in (TURNED, BAGGED) if way == TURNED and rows == 1 else (way,):
                making[MAKING + same] = [took]
                calls[same] = partial(Copy(same, made.read).product, x)
        return calls, making


@dataclass(frozen=True)
class Experts:
    """Those of a layer, of which each row reads `top_k`."""

    bank: ExpertBank
    top_k: int

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.bank.gate_up, self.bank.down

    def title(self, rows: int) -> str:
        (experts, width, size), each = self.bank.gate_up.shape, self.bank.down.shape[1]
        return f"few rows {rows} x {size} to {self.top_k} of {experts} experts {width} to {each} float32"

    def ways(self, rows: int) -> tuple[str, ...]:
        few = rows * self.top_k <= MOST  # more go another way without tables, which backends choose
        return (ORIGINAL, TABLES) if few and readable(self.weights) else ()

    def usual(self, rows: int) -> str:
        return TABLES

    def trials(self, rows: int, clock: Clock) -> tuple[Calls, Turns]:
        """Experts are drawn, so that rows share some, as tokens do."""
        experts, size = self.bank.num_experts, self.bank.hidden_size
        scores = torch.rand(rows, experts, generator=torch.Generator().manual_seed(0))
        weight, expert = scores.topk(self.top_k)
        x, routing = torch.ones(rows, size), Routing.from_topk(expert, weight, experts)
        started = clock()
        tables = ExpertTables.of(self.bank)
        took = clock() - started
        assert tables is not None
        calls = {ORIGINAL: partial(few_rows, x, routing, self.bank), TABLES: partial(tables.served, x, routing)}
        return calls, {MAKING + TABLES: [took]}


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
    problems: Iterable[Problem], rows: int, tokens: int, others: Callable[[], Iterable[Tensor]], autotune: bool | None
) -> Callable[[Problem], str] | None:
    """The way of each of `problems` for `rows` rows, `tokens` of which are to come; None: constants say it.

    others: all weights. `autotune`: whether to go by measurements; None: where there are no constants.
    """
    if autotune is False or (autotune is None and reads_matrices_faster()):
        return None
    rows = min(MOST_ROWS, 1 << (rows - 1).bit_length())
    alike: dict[str, list[Problem]] = {}
    for one in problems:
        if one.ways(rows):
            alike.setdefault(one.title(rows), []).append(one)
    if not alike:
        return None
    table = table_of(torch.get_num_threads())
    with table.lock:
        unknown = {title: some for title, some in alike.items() if not _knows(table.found.get(title), some[0], rows)}
        if unknown:
            _find_out(table, unknown, rows, others())

    def way_of(one: Problem) -> str:
        found, usual = table.found.get(one.title(rows)), one.usual(rows)
        return usual if found is None or not found.seconds else fastest(_whole(found.seconds, tokens), usual)

    return way_of


def _knows(found: Found | None, problem: Problem, rows: int) -> bool:
    """Whether all ways there are were measured, or it is decided that none is."""
    ways = problem.ways(rows)
    wanted: Set[str] = {*ways, *(MAKING + way for way in COPIES if way in ways)}
    return found is not None and found.seconds.keys() in (wanted, set())


def _whole(seconds: Seconds, tokens: int) -> Seconds:
    """way -> seconds of a product with a token's share of the copy, where there is one."""
    return {way: took + seconds.get(MAKING + way, 0.0) / tokens for way, took in _products(seconds).items()}


def _find_out(table: Table, unknown: Mapping[str, Sequence[Problem]], rows: int, others: Iterable[Tensor]) -> None:
    """Measure, take what another process has kept meanwhile, and keep; told in a line."""
    began = time.perf_counter()
    chosen = _samples(unknown)
    found = measure(chosen, rows, _between(others, chosen))
    kept = read_kept(table.path, table.machine, tell=False)
    for title in found:
        if _knows(kept.get(title), unknown[title][0], rows):
            found[title] = kept[title]
    table.found.update({title: Found(ORIGINAL, {}) for title in unknown} | found)
    if found:
        keep(table.path, table.machine, {**kept, **found})
        logger.warning(
            "autotune: how generation reads %d kinds of weights was measured (%.1f s); %s",
            len(found), time.perf_counter() - began, table.path or "not kept",
        )  # fmt: skip


def _samples(unknown: Mapping[str, Sequence[Problem]]) -> dict[str, list[Problem]]:
    """Some of those that are alike, as many as MOST_BYTES holds; none of which it holds none."""
    left = MOST_BYTES
    chosen: dict[str, list[Problem]] = {title: [] for title in unknown}
    for number in range(SAMPLES):
        for title, alike in unknown.items():
            size = 4 * sum(one.numel() for one in alike[0].weights)
            if number < len(alike) and size <= left:
                left -= size
                chosen[title].append(alike[number])
    return {title: some for title, some in chosen.items() if some}


def _between(others: Iterable[Tensor], chosen: Mapping[str, Sequence[Problem]]) -> list[Tensor]:
    """BETWEEN bytes of the weights, or what there are, that aren't measured themselves."""
    measured = {weight.data_ptr() for some in chosen.values() for one in some for weight in one.weights}
    left = BETWEEN
    found: list[Tensor] = []
    for one in others:
        if left > 0 and one.is_floating_point() and one.is_contiguous() and one.data_ptr() not in measured:
            found.append(one.detach().view(-1)[: -(-left // one.element_size())])
            left -= found[-1].numel() * one.element_size()
    return found


@torch.no_grad()
def measure(
    problems: Mapping[str, Sequence[Problem]], rows: int, between: Sequence[Tensor], clock: Clock = time.perf_counter
) -> dict[str, Found]:
    """Lower quartiles of the turns of each way, by all that are alike.

    Not medians: what else runs on the machine can only add.
    """
    tried = [(title, *one.trials(rows, clock)) for title, alike in problems.items() for one in alike]
    turns = take_turns([calls for _, calls, _ in tried], ROUNDS, lambda: [one.sum() for one in between], clock)
    taken: dict[str, Turns] = {title: {} for title in problems}
    for (title, _, making), times in zip(tried, turns, strict=True):
        for way, each in (times | making).items():
            taken[title].setdefault(way, []).extend(each)
    found = {}
    for title, times in taken.items():
        seconds = {way: sorted(each)[len(each) // 4] for way, each in times.items()}
        found[title] = Found(fastest(_products(seconds), problems[title][0].usual(rows)), seconds)
    return found


def _products(seconds: Seconds) -> Seconds:
    return {way: took for way, took in seconds.items() if not way.startswith(MAKING)}


def _each(copies: Sequence[Copy], x: Tensor) -> list[Tensor]:
    return [one.product(x) for one in copies]
