"""`train.memory_budget`: the cheapest way to compute a step within so many bytes.

Three things take less memory for more time and leave the sum the same: smaller micro-batches, layers that are computed
again in the backward pass, and logits that are. Which of them costs least is a matter of the model, the batch and the
machine; so every combination is priced, and the first one whose planned peak fits is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from moelab.builder import build_balance_losses
from moelab.config.run import RunConfig
from moelab.config.scalars import bytes_of
from moelab.config.stages import in_stage
from moelab.errors import ConfigError
from moelab.nn.count import flops_per_token
from moelab.planning.memory import Counted, MemoryPlan, count
from moelab.planning.of_run import problem_of
from moelab.planning.times import computed_again
from moelab.planning.traffic import Problem, counts_before
from moelab.registry import Registry
from moelab.shortage import size

MARGIN = 0.05  # of the budget stays free: resident sets were up to 2 % beyond the plan, 9 % on one machine of three
EVERY = (0, 4, 3, 2, 1)  # activation_checkpointing
# A micro-batch reads all weights in both passes, and reads and writes their gradients: so many bytes a parameter,
PASSED = 16
# and so many FLOPs does a device compute while it moves a byte: 989 TFLOP/s of dense bf16 over 3.35 TB/s on an H100
# (NVIDIA's data sheet); a CPU's by benchmarks/memory.py.
FLOPS_PER_BYTE = {"cpu": 10, "cuda": 295}


@dataclass(frozen=True)
class Choice:
    """How a step is computed."""

    micro_batch_sizes: tuple[int, ...]  # sequences, of each stage; of a run without stages one
    checkpointing: int
    recompute_logits: bool
    memory: MemoryPlan  # of the stage that takes most
    price: float  # time, of what a step takes that computes nothing twice and in one piece

    def sentence(self, run: RunConfig) -> str:
        """What was chosen, for people."""
        batches = [stage.batch_size or run.train.batch_size for stage in run.stages] or [run.train.batch_size]
        pairs = zip(self.micro_batch_sizes, batches, strict=True)
        parts = ", ".join(f"{micro} of {batch // run.parallel.world}" for micro, batch in pairs)
        every = "no layer" if not self.checkpointing else f"every {_ordinal(self.checkpointing)}layer"
        logits = "logits" if self.recompute_logits else "no logits"
        return (
            f"train.memory_budget {run.train.memory_budget}: {parts} sequences at a time, {every} and {logits} "
            f"computed twice; {size(self.memory.peak)} as planned"
        )

    def write(self, run: RunConfig) -> None:
        """Into a config, in place, where it says nothing itself."""
        write(run, self.micro_batch_sizes, self.checkpointing, self.recompute_logits)


def write(run: RunConfig, micro: Sequence[int | None], checkpointing: int, recompute_logits: bool | None) -> None:
    """How to compute a step, into a config, in place, where it says nothing itself; `micro`: of each stage, or one."""
    train = run.train
    train.activation_checkpointing = train.activation_checkpointing or checkpointing
    train.recompute_logits = recompute_logits if train.recompute_logits is None else train.recompute_logits
    for stage, sequences in zip(run.stages, micro, strict=False):
        stage.micro_batch_size = stage.micro_batch_size or sequences
    train.micro_batch_size = train.micro_batch_size or micro[0]


def _ordinal(every: int) -> str:
    return {1: "", 2: "2nd ", 3: "3rd "}.get(every, f"{every}th ")


def choose(run: RunConfig, registry: Registry, device: str) -> Choice:
    """The cheapest way to compute a step of `run` on "cpu" or "cuda" within its `train.memory_budget`.

    What the config says (`micro_batch_size`, `activation_checkpointing`, `recompute_logits`) stays as it says.
    Raises ConfigError naming the smallest budget that would do.
    """
    stages = [in_stage(run, number) for number in range(len(run.stages))] or [run]
    options = [_Options(stage, registry, device) for stage in stages]
    room = (bytes_of(run.train.memory_budget) or 0) * (1 - MARGIN)
    waiting, refused = [_Way(options, *recomputing) for recomputing in _recomputing(run)], []
    while waiting:
        way = min(waiting, key=_Way.price)
        memory = _most(way.plans())
        if memory.peak <= room:
            return Choice(way.micro_batch_sizes, way.checkpointing, way.recompute_logits, memory, way.price())
        if not way.go_on(room):
            waiting.remove(way)
            refused.append(way.least(room))
    least = min(refused, key=_peak)
    needed, held = least.peak / (1 - MARGIN), least.parameters + least.gradients + least.optimizer
    raise ConfigError(
        f"train.memory_budget: {run.train.memory_budget} is too little for any way to compute a step of this run; the "
        f"least is {math.ceil(needed / 1e6) / 1e3:.3f} GB ({size(held)} of it for parameters, gradients and moments); "
        "give that, or a smaller model"
    )


def price_of(run: RunConfig, registry: Registry, device: str) -> float:
    """Of a step as the config says it is computed: `Choice.price`. Of a run in stages, of what stands in it."""
    return _Options(run, registry, device).price(problem_of(run, device))


def _recomputing(run: RunConfig) -> Iterator[tuple[int, bool]]:
    """(activation_checkpointing, recompute_logits) of all that the config leaves open."""
    train = run.train
    every = (train.activation_checkpointing,) if train.activation_checkpointing else EVERY
    logits = (False, True) if train.recompute_logits is None else (train.recompute_logits,)
    for checkpointing, recompute in itertools.product(every, logits):
        if checkpointing <= run.model.num_hidden_layers or checkpointing == train.activation_checkpointing:
            yield checkpointing, recompute


def _peak(plan: MemoryPlan) -> int:
    return plan.peak


def _most(plans: Iterable[MemoryPlan]) -> MemoryPlan:
    return max(plans, key=_peak)


class _Way:
    """What is computed twice, and of each stage the cheapest micro-batches that have not been found too large.

    A stage's micro-batch is nothing to the others: so it goes on to a dearer one where its own does not fit, and what
    is looked at grows with the number of stages, not with all that they could be together.
    """

    def __init__(self, options: Sequence[_Options], checkpointing: int, recompute_logits: bool) -> None:
        self.checkpointing, self.recompute_logits = checkpointing, recompute_logits
        self._options = options
        self._all = [each.cheapest_first(checkpointing, recompute_logits) for each in options]
        self._at = [0] * len(options)

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        return tuple(problem.sequences for _, problem in self._now())

    def _now(self) -> list[tuple[float, Problem]]:
        return [each[at] for each, at in zip(self._all, self._at, strict=True)]

    def price(self) -> float:
        """Of a step in the stages together, each as its tokens; of what goes on it is never less."""
        tokens = [each.tokens for each in self._options]
        return sum(count * price for count, (price, _) in zip(tokens, self._now(), strict=True)) / sum(tokens)

    def plans(self) -> list[MemoryPlan]:
        """Of each stage."""
        return [each.memory(problem) for each, (_, problem) in zip(self._options, self._now(), strict=True)]

    def go_on(self, room: float) -> bool:
        """To the next micro-batch of each stage that does not fit; False: there is none."""
        before = list(self._at)
        for place, plan in enumerate(self.plans()):
            if plan.peak > room:
                self._at[place] = min(self._at[place] + 1, len(self._all[place]) - 1)
        return self._at != before

    def least(self, room: float) -> MemoryPlan:
        """What the stages that do not fit would take together: of each its least."""
        stages = zip(self._options, self._all, self.plans(), strict=True)
        return _most(
            min((each.memory(problem) for _, problem in priced), key=_peak)
            for each, priced, plan in stages
            if plan.peak > room
        )


class _Options:
    """What a stage takes in each way; a micro-batch size is counted once."""

    def __init__(self, stage: RunConfig, registry: Registry, device: str) -> None:
        self._model, self._registry = stage.model, registry
        self._losses = build_balance_losses(stage.model, registry)
        self._whole = problem_of(stage, device)
        self.tokens = stage.train.batch_size * stage.train.sequence_length
        self._sizes = (self._whole.sequences,) if stage.train.micro_batch_size else _divisors(self._whole.sequences)
        self._counted = cache(self._count)

    def cheapest_first(self, checkpointing: int, recompute_logits: bool) -> list[tuple[float, Problem]]:
        """(price, problem) of each micro-batch size that the config leaves open; of equals the largest first."""
        problems = self._problems(checkpointing, recompute_logits)
        return sorted(((self.price(problem), problem) for problem in problems), key=lambda priced: priced[0])

    def _problems(self, checkpointing: int, recompute_logits: bool) -> Iterator[Problem]:
        for sequences in self._sizes:
            micro_batches = self._whole.sequences * self._whole.micro_batches // sequences
            yield replace(
                self._whole, sequences=sequences, micro_batches=micro_batches, checkpointing=checkpointing,
                recompute_logits=recompute_logits,
            )  # fmt: skip

    def memory(self, problem: Problem) -> MemoryPlan:
        """The plan of one of the problems."""
        return self._counted(problem.sequences).memory(problem)

    def price(self, problem: Problem) -> float:
        """Time of a token, of what it takes at least: by FLOPs, and by what a micro-batch moves."""
        model = self._counted(self._whole.sequences).model
        flops = flops_per_token(model, problem.sequence_length)
        again = computed_again(model, problem, counts_before(problem, self._losses))
        moved = PASSED * sum(parameter.numel() for parameter in model.parameters()) / problem.tokens
        return 1 + (again + moved * FLOPS_PER_BYTE.get(problem.device, FLOPS_PER_BYTE["cuda"])) / flops

    def _count(self, sequences: int) -> Counted:
        """Of which checkpointing and recompute_logits take off what they keep less."""
        problem = next(each for each in self._problems(0, False) if each.sequences == sequences)
        return count(self._model, problem, self._registry)


def _divisors(number: int) -> list[int]:
    return [each for each in range(number, 0, -1) if number % each == 0]
