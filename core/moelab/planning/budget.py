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
    ways = sorted(_ways(run, stages), key=lambda way: _price(options, way))
    least: MemoryPlan | None = None
    for way in ways:
        memory = max((each.memory(way, place) for place, each in enumerate(options)), key=lambda plan: plan.peak)
        if memory.peak <= room:
            return Choice(way.micro_batch_sizes, way.checkpointing, way.recompute_logits, memory, _price(options, way))
        least = memory if least is None or memory.peak < least.peak else least
    assert least is not None
    needed, held = least.peak / (1 - MARGIN), least.parameters + least.gradients + least.optimizer
    raise ConfigError(
        f"train.memory_budget: {run.train.memory_budget} is too little for any way to compute a step of this run; the "
        f"least is {math.ceil(needed / 1e6) / 1e3:.3f} GB ({size(held)} of it for parameters, gradients and moments); "
        "give that, or a smaller model"
    )


def price_of(run: RunConfig, registry: Registry, device: str) -> float:
    """Of a step as the config says it is computed: `Choice.price`. Of a run in stages, of what stands in it."""
    train, sequences = run.train, run.train.micro_batch_size or run.train.batch_size // run.parallel.world
    way = _Way((sequences,), train.activation_checkpointing, bool(train.recompute_logits))
    return _Options(run, registry, device).price(way, 0)


@dataclass(frozen=True)
class _Way:
    micro_batch_sizes: tuple[int, ...]
    checkpointing: int
    recompute_logits: bool


def _ways(run: RunConfig, stages: Sequence[RunConfig]) -> Iterator[_Way]:
    """All that the config leaves open."""
    train = run.train
    every = (train.activation_checkpointing,) if train.activation_checkpointing else EVERY
    layers = run.model.num_hidden_layers
    logits = (False, True) if train.recompute_logits is None else (train.recompute_logits,)
    sizes = [_micro_batch_sizes(stage) for stage in stages]
    for micro, checkpointing, recompute in itertools.product(itertools.product(*sizes), every, logits):
        if checkpointing <= layers or checkpointing == train.activation_checkpointing:
            yield _Way(micro, checkpointing, recompute)


def _micro_batch_sizes(stage: RunConfig) -> Iterable[int]:
    if stage.train.micro_batch_size is not None:
        return (stage.train.micro_batch_size,)
    whole = stage.train.batch_size // stage.parallel.world
    return [each for each in range(whole, 0, -1) if whole % each == 0]


def _price(options: Sequence[_Options], way: _Way) -> float:
    """Of a step in the stages together, each as its tokens."""
    prices = [each.tokens * each.price(way, place) for place, each in enumerate(options)]
    return sum(prices) / sum(each.tokens for each in options)


class _Options:
    """What a stage takes in each way; a micro-batch size is counted once."""

    def __init__(self, stage: RunConfig, registry: Registry, device: str) -> None:
        self._model, self._registry = stage.model, registry
        self._losses = build_balance_losses(stage.model, registry)
        self._whole = problem_of(stage, device)
        self.tokens = stage.train.batch_size * stage.train.sequence_length
        self._counted = cache(self._count)

    def memory(self, way: _Way, place: int) -> MemoryPlan:
        """The plan of stage number `place`."""
        sequences = way.micro_batch_sizes[place]
        return self._counted(sequences).memory(self._problem(way, sequences))

    def price(self, way: _Way, place: int) -> float:
        """Time of a token, of what it takes at least: by FLOPs, and by what a micro-batch moves."""
        problem = self._problem(way, way.micro_batch_sizes[place])
        model = self._counted(self._whole.sequences).model
        flops = flops_per_token(model, problem.sequence_length)
        again = computed_again(model, problem, counts_before(problem, self._losses))
        moved = PASSED * sum(parameter.numel() for parameter in model.parameters()) / problem.tokens
        return 1 + (again + moved * FLOPS_PER_BYTE.get(problem.device, FLOPS_PER_BYTE["cuda"])) / flops

    def _count(self, sequences: int) -> Counted:
        return count(self._model, self._problem(_Way((sequences,), 0, False), sequences), self._registry)

    def _problem(self, way: _Way, sequences: int) -> Problem:
        micro_batches = self._whole.sequences * self._whole.micro_batches // sequences
        return replace(
            self._whole, sequences=sequences, micro_batches=micro_batches, checkpointing=way.checkpointing,
            recompute_logits=way.recompute_logits,
        )  # fmt: skip
