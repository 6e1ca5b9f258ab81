"""How far a run is: steps, tokens, seconds, and the FLOPs that were spent, as served and as declared.

Served means counted: the sum over layers of the assignments that each expert served times what that expert costs,
plus what every token costs. Sums stay on the device between logs; on the host they are integers, so exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moelab.nn.count import ServedCosts
from moelab.training.evaluation import Evaluation

CARRIED = ("step", "tokens", "seconds", "served_weights", "logged")  # what state.json carries to a resumed run


@dataclass(frozen=True)
class Interval:
    """What happened since the last log."""

    seconds: float  # of training steps
    tokens: int
    flops: int  # served
    active_parameters: float  # that a token passed through, on average
    counts: tuple[int, ...] = ()  # assignments served, expert after expert, layer after layer; empty: dense


@dataclass
class Progress:
    """Counters that a resumed run continues. Padding is no token and costs nothing here."""

    costs: ServedCosts
    declared_flops_per_token: float
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training steps alone
    served_weights: int = 0  # weights of the experts that served, summed over assignments; as far as read
    evaluation: Evaluation | None = None
    logged: Sequence[float] = (0.0, 0, 0)  # seconds, tokens, served_weights at the last log
    counts: Sequence[int] = ()  # assignments of each expert since the last log, as far as read
    # Of the tokens before they came to cost this: how many, their FLOPs without those of experts, and as declared.
    before_stage: Sequence[float] = (0, 0, 0.0)
    _served: Tensor | None = None  # [sum of E] int64: assignments that were not read from the device yet

    @classmethod
    def of(cls, state: Mapping[str, Any], costs: ServedCosts, declared_flops_per_token: float) -> Progress:
        """Where state.json left off; a fresh one for an empty state."""
        counters = {key: state[key] for key in (*CARRIED, "counts", "before_stage") if key in state}
        return cls(costs, declared_flops_per_token, **counters)

    def advance(self, tokens: int, served: Tensor | None, seconds: float) -> None:
        """One step: its tokens without padding, and `StepResult.served`; waits for no device."""
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        if served is not None:
            self._served = served if self._served is None else self._served + served

    def go_on(self, costs: ServedCosts, declared_flops_per_token: float) -> None:
        """From the next step on a token costs this. Waits for the device."""
        spent = self.costs.flops(self.tokens - int(self.before_stage[0]), 0) + int(self.before_stage[1])
        self.before_stage = (self.tokens, spent, self.flops_declared())
        self.costs, self.declared_flops_per_token = costs, declared_flops_per_token

    def flops(self) -> int:
        """Forward and backward of the training steps so far, as served. Waits for the device."""
        return int(self.before_stage[1]) + self.costs.flops(self.tokens - int(self.before_stage[0]), self._read())

    def flops_declared(self) -> float:
        """The same as the routers declared it."""
        return self.before_stage[2] + (self.tokens - int(self.before_stage[0])) * self.declared_flops_per_token

    def active_parameters(self) -> float:
        """That a token passed through, on average over the run. Waits for the device."""
        return self.costs.active_parameters(self.tokens, self._read())

    def interval(self) -> Interval:
        """Since the last call, or the start of the run. Waits for the device."""
        now = (self.seconds, self.tokens, self._read())
        seconds = now[0] - self.logged[0]
        tokens, weights = now[1] - int(self.logged[1]), now[2] - int(self.logged[2])
        self.logged = now
        flops, active = self.costs.flops(tokens, weights), self.costs.active_parameters(tokens, weights)
        counts, self.counts = tuple(self.counts), ()
        return Interval(seconds, tokens, flops, active, counts)

    def row(self) -> dict[str, Any]:
        """What every line of metrics.jsonl begins with."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "flops": self.flops(),
            "flops_declared": self.flops_declared(),
            "seconds": round(self.seconds, 4),
        }

    def state(self) -> dict[str, Any]:
        """What state.json keeps, enough for `of`."""
        return self.row() | {
            "seconds": self.seconds, "served_weights": self._read(), "logged": list(self.logged),
            "counts": list(self.counts), **({"before_stage": list(self.before_stage)} if self.before_stage[0] else {}),
        }  # fmt: skip

    def _read(self) -> int:
        """Move what was counted on the device into `served_weights`."""
        if self._served is not None:
            served = self._served.tolist()
            self.served_weights += self.costs.weights(served)
            self.counts = [a + b for a, b in zip(self.counts, served, strict=True)] if self.counts else served
            self._served = None
        return self.served_weights


def can_continue(state: Mapping[str, Any]) -> bool:
    """Whether a state.json has every counter: earlier versions did not count what was served."""
    return all(key in state for key in CARRIED)
