"""Ways: where several kernels compute the same, which one a problem goes to; as constants say, or as was measured.

Each place that has a choice asks `choose`, with the way that its constants would take. Within `using` a table answers
instead: the way that was measured fastest for that very problem, or, while the table is being made, it is measured
there and then, on the tensors at hand. Sums differ between ways in their last bits, so a table belongs to a run and is
kept in its checkpoints (training/autotune.py). What is asked must not depend on values: the same problem, the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

MARGIN = 0.05  # of the usual way's time, by which another one must be faster: what chance doesn't turn
ROUNDS = 3, 15  # at least and at most; each way once a round
ENOUGH = 0.15  # seconds; no further round begins after so many

Seconds = dict[str, float]  # way -> of one forward and backward pass
Clock = Callable[[], float]
Calls = Mapping[str, Callable[[], object]]  # way -> what computes a problem so
Candidates = Callable[[], Calls]


class Ways:
    """A table: problem -> way. One that measures fills itself with what it is asked, another one stays as it is."""

    def __init__(self, chosen: Mapping[str, str]) -> None:
        self.chosen = dict(chosen)

    def way(self, problem: str, usual: str, candidates: Candidates) -> str:
        """See `choose`."""
        return self.chosen.get(problem, usual)


@dataclass
class Found:
    """What is known of a problem."""

    way: str
    seconds: Seconds
    step: float | None = None  # what a training step took by a way that isn't the usual one, of its time by that


class Measuring(Ways):
    """A table in the making; `known`: problem -> what was found before."""

    def __init__(self, known: Mapping[str, Found]) -> None:
        super().__init__({})
        self.found: dict[str, Found] = {}  # of each problem that was asked for
        self.usual: dict[str, str] = {}  # what constants say of it
        self.fresh: list[str] = []  # those that were not known, or by other ways than there are now
        self._known = known

    def way(self, problem: str, usual: str, candidates: Candidates) -> str:
        if problem not in self.chosen:
            calls = candidates()
            known = self._known.get(problem)
            if known is None or known.seconds.keys() != calls.keys() or known.way not in calls:
                seconds = measure(calls)
                known = Found(fastest(seconds, usual), seconds)
                self.fresh.append(problem)
            self.usual[problem] = usual
            self.take(problem, known)
        return self.chosen[problem]

    def take(self, problem: str, found: Found) -> None:
        """Of a problem that was asked for."""
        self.found[problem], self.chosen[problem] = found, found.way


_active: list[Ways] = []  # the last one answers; of the process, since autograd computes layers again in own threads


def choose(problem: str | Callable[[], str], usual: str, candidates: Candidates) -> str:
    """The way to take. `problem`: what is computed, in words: operation, sizes, dtype, device.

    `usual`: what constants say. `candidates`: each way as a call of its forward and backward pass on the tensors at
    hand, called only where they are measured.
    """
    if not _active:
        return usual
    return _active[-1].way(problem if isinstance(problem, str) else problem(), usual, candidates)


def active() -> Ways | None:
    """The table that answers, for whoever keeps answers."""
    return _active[-1] if _active else None


def measuring() -> bool:
    """Whether a training step's ways are being measured, by a forward pass that has no gradients of its own."""
    return isinstance(active(), Measuring)


@contextmanager
def using(ways: Ways | None) -> Iterator[None]:
    """Within, `ways` answers; None: whoever did before."""
    if ways is None:
        yield
        return
    _active.append(ways)
    try:
        yield
    finally:
        _active.pop()


def fastest(seconds: Seconds, usual: str) -> str:
    """The usual way, unless another one is faster by more than chance."""
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < (1 - MARGIN) * seconds.get(usual, float("inf")) else usual


def measure(calls: Calls, clock: Clock = time.perf_counter) -> Seconds:
    """way -> the median of its turns."""
    (taken,) = take_turns([calls], clock=clock)
    return {way: median(times) for way, times in taken.items()}


def take_turns(
    problems: Sequence[Calls],
    rounds: tuple[int, int] = ROUNDS,
    before: Callable[[], object] | None = None,
    clock: Clock = time.perf_counter,
) -> list[dict[str, list[float]]]:
    """Each problem's way -> its seconds in every one of at least and at most so many `rounds`, behind one to warm up.

    A round goes through the ways, forwards or backwards in turn, and each computes all problems that have it, after
    `before`, which is not timed.
    """
    taken: list[dict[str, list[float]]] = [{way: [] for way in calls} for calls in problems]
    order = list(dict.fromkeys(way for calls in problems for way in calls))
    until = float("inf")
    for done in range(1 + rounds[1]):
        for way in order:
            if before is not None:
                before()
            for calls, times in zip(problems, taken, strict=True):
                if way in calls:
                    times[way].append(_timed(calls[way], clock))
        if done == 0:
            until = clock() + ENOUGH
        elif done >= rounds[0] and clock() > until:
            break
        order.reverse()
    return [{way: each[1:] for way, each in times.items()} for times in taken]


def _timed(call: Callable[[], object], clock: Clock) -> float:
    wait()
    started = clock()
    call()
    wait()
    return clock() - started


def trial(compute: Callable[..., Tensor], *inputs: Tensor | None) -> Callable[[], object]:
    """A forward and a backward pass of `compute(*inputs)`, to all of them but frozen parameters; it leaves no trace."""

    def call() -> object:
        own = [None if one is None else one.detach().requires_grad_(_learns(one)) for one in inputs]
        with torch.enable_grad():
            out = compute(*own)
        return gradients(out, [one for one in own if one is not None and one.requires_grad])

    return call


def gradients(out: Tensor, inputs: Sequence[Tensor]) -> object:
    """The backward pass of a trial, outside of autocast, as a training step has it."""
    with torch.autocast(out.device.type, enabled=False):
        return torch.autograd.grad(out, inputs, out.detach(), allow_unused=True)


def _learns(one: Tensor) -> bool:
    return one.requires_grad or not isinstance(one, torch.nn.Parameter)


def wait() -> None:
    """Until an accelerator has done what it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
