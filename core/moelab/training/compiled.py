"""`train.compile`: torch.compile on parts of the layers, each in one graph, from the first training step on.

A part is compiled whole (`fullgraph`) or not at all: what breaks the graph, a plugin or a missing compiler, is named in
one line, and that part goes on eagerly. What differs between layers in its weights alone is compiled once; backward
passes are compiled with the forward ones, so that what fails fails in the part's call, before anything has run.
Outside stay the experts, whose backends choose kernels by the routing's numbers (grouped_mm, MegaBlocks, batched), the
head's loss, which works piece by piece, and, on a CPU, everything that has kernels of our own there: attention and
large products, which a compiler would take apart (docs/compute.md).

Shapes are static and random numbers eager's, so that a resumed run compiles the same kernels and ends in the same bits.
Evaluation and generation, whose shapes vary, are eager.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moelab.moe.balance import NamedLoss
from moelab.moe.block import MoEBlock
from moelab.nn.norm import RMSNorm
from moelab.nn.transformer import DecoderLayer, Transformer

logger = logging.getLogger("moelab")
COMPILERS = ("torch._dynamo", "torch._inductor")
NO_COMPILER = ("InvalidCxxCompiler", "TritonMissing")
SWITCHES = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")  # torch's, read at its import and at each call
MOST_GRAPHS = (
    8  # of one part: what needs more, by the lengths of its stages or what its code reads, is eager from then on
)
TORCHS_LIMIT = 1 << 20  # graphs of one code in a process, of all layers and runs: the bound is ours


class _TooOften(Exception):
    """A part asks for more graphs than it may have."""


@dataclass
class Compiled:
    """All parts of a run."""

    compiler: Callable[[torch.fx.GraphModule, Sequence[Any]], Any]
    parts: list[Part] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    without: str | None = None  # why nothing can be compiled here
    device: str = "cpu"
    calling: Part | None = None  # the one that is called: what is compiled is for it
    _works: bool | None = None

    def backend(self, graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        """What torch.compile calls, of all parts the same: only so may they share a graph."""
        assert self.calling is not None
        if self.calling.graphs == MOST_GRAPHS:
            raise _TooOften
        compiled: Callable[..., Any] = self.compiler(graph, examples)
        self.calling.graphs += 1
        return compiled

    def works(self) -> bool:
        """Whether a sum can be compiled here, one that no cache can hold: else it is no part's fault."""
        if self._works is None:
            number = float(time.monotonic_ns() % (1 << 50))
            try:
                compiled = torch.compile(lambda x: x + number, fullgraph=True, backend=self.compiler)
                compiled(torch.zeros(2, device=self.device))
                self._works = True
            except Exception:
                self._works = False
        return self._works

    def part(self, name: str, eager: Callable[..., Any]) -> Part:
        """`eager`, compiled when it is first called."""
        self.parts.append(Part(name, eager, self))
        return self.parts[-1]

    @property
    def graphs(self) -> int:
        """How many were compiled: of each kind of part one for each shape and dtype."""
        return sum(part.graphs for part in self.parts)

    @property
    def refused(self) -> list[str]:
        """The parts that are computed eagerly."""
        return [part.name for part in self.parts if part.broken]

    def line(self) -> str:
        """For the log."""
        if self.without is not None:
            return f"train.compile: nothing is compiled ({self.without})"
        titles = dict.fromkeys(part.title for part in self.parts if part.broken)
        left = f"; eager: {', '.join(titles)}" if titles else ""
        return f"train.compile: {len(self.parts) - len(self.refused)} parts in {self.graphs} graphs{left}"


class Part:
    """A function of a layer: compiled where it is called for training and can be, otherwise what it was."""

    def __init__(self, name: str, eager: Callable[..., Any], run: Compiled) -> None:
        self.name, self.graphs, self.broken = name, 0, False
        self._eager, self._run = eager, run
        self.kind = type(getattr(eager, "__self__", eager))
        self._compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=run.backend)

    def __call__(self, *arguments: Any) -> Any:
        if self.broken or self._run.without is not None or not torch.is_grad_enabled():
            return self._eager(*arguments)
        self._run.calling = self
        try:
            return self._compiled(*arguments)
        except Exception as error:
            if not type(error).__module__.startswith(COMPILERS):
                raise  # the part's own
            self._give_up(error)  # while it was traced or compiled: nothing has run
        return self._eager(*arguments)

    @property
    def title(self) -> str:
        """As messages call it: of all layers one."""
        return self.name.partition(", layer ")[0]

    def _give_up(self, error: BaseException) -> None:
        self.broken = True
        if any(isinstance(each, _TooOften) for each in _causes(error)):
            for part in self._run.parts:  # the others' turn would come, after as many graphs
                part.broken |= part.kind is self.kind
            self._tell(
                f"is eager from here on: it would be compiled more than {MOST_GRAPHS} times, for other lengths or "
                "since its code reads what changes from step to step"
            )
        elif _lacks_compiler(error) or (_of_backend(error) and not self._run.works()):
            self._run.without = _first_line(error)
            told = "there is no working compiler here (%s): the run goes on without"
            logger.warning(f"train.compile: {told}", self._run.without)
        elif _of_backend(error):
            self._tell(f"can't be compiled and is computed eagerly: {_first_line(error)}")
        else:
            self._tell(f"breaks the graph and is computed eagerly: {_first_line(error)}", _place(error))

    def _tell(self, what: str, place: str = "") -> None:
        told = f"{self.title} {what}"
        if told not in self._run.told:  # once for all layers
            self._run.told.add(told)
            logger.warning("train.compile: %s%s", told, place)


def compile_parts(
    model: Transformer, losses: Sequence[NamedLoss], device: str, compiler: Any = None
) -> tuple[Compiled, list[NamedLoss]]:
    """Compile parts of `model`, in place, for training on "cpu" or "cuda"; -> what was, and the losses, compiled too.

    `compiler`: (graph, examples) -> a function; None: torch's inductor.
    """
    # For the whole process: torch asks not only while a backend compiles, but before it for the limits, and for donated
    # buffers whenever a backward pass runs.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = TORCHS_LIMIT
    torch._inductor.config.fallback_random = True  # eager's numbers
    torch._functorch.config.force_non_lazy_backward_lowering = True  # what fails, fails in the part's call
    torch._functorch.config.donated_buffer = False  # each loss's share of a gradient is a backward pass of its own
    _quiet()
    run = Compiled(compiler or import_module("torch._inductor.compile_fx").compile_fx, device=device)
    switch = next((name for name in SWITCHES if os.environ.get(name) == "1"), None)
    if switch is not None:
        run.without = f"{switch}=1 in the environment"
        logger.warning("train.compile: %s switches torch.compile off: the run goes on without", run.without)
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        for name, holder, attribute in _functions(layer, device):
            setattr(holder, attribute, run.part(name, getattr(holder, attribute)))
    setattr(model.norm, "forward", run.part("the last norm", model.norm.forward))  # noqa: B010  (a method, for mypy)
    return run, [replace(named, compute=run.part(named.part.title, named.loss)) for named in losses]


def _quiet() -> None:
    """What torch's compiler says on its way stays unsaid, unless TORCH_LOGS asks: what came of it, a part tells."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._(dynamo|inductor)\b")
    if "TORCH_LOGS" not in os.environ:
        for name in COMPILERS:
            logging.getLogger(name).setLevel(logging.ERROR)


def _functions(layer: DecoderLayer, device: str) -> Iterator[tuple[str, nn.Module, str]]:
    """(its name in messages, whose, which) function of a layer."""
    place = f"layer {layer.self_attn.layer_id}"
    if device == "cpu":
        for norm in (module for module in layer.modules() if isinstance(module, RMSNorm)):
            yield f"a norm, {place}", norm, "forward"
    else:
        yield f"attention, {place}", layer, "attend"
    if not isinstance(layer.mlp, MoEBlock):
        if device != "cpu":
            yield f"the feed-forward network, {place}", layer.mlp, "forward"
        return
    if isinstance(layer.mlp.router, nn.Module):
        yield layer.mlp.parts["router"].title, layer.mlp.router, "forward"
    if isinstance(layer.mlp.shared_expert, nn.Module) and device != "cpu":
        yield layer.mlp.parts["shared_expert"].title, layer.mlp.shared_expert, "forward"


def _of_backend(error: BaseException) -> bool:
    """Whether the graph was there, and what went wrong is what a compiler made of it."""
    return isinstance(error, torch._dynamo.exc.BackendCompilerFailed | torch._inductor.exc.InductorError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came of."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _lacks_compiler(error: BaseException) -> bool:
    """Whether it is not the part's fault: no C++ compiler, no triton, or no room for its files."""
    named = any(isinstance(each, OSError) or type(each).__name__ in NO_COMPILER for each in _causes(error))
    return named or any(word in str(error) for word in NO_COMPILER)


def _place(error: BaseException) -> str:
    """Where in the part's own code: " (switch.py:31)"; Python's and torch's is what that called."""
    frames = getattr(error, "real_stack", None) or []
    own = [frame for frame in frames if not _is_torchs_or_pythons(Path(frame.filename))]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def _is_torchs_or_pythons(file: Path) -> bool:
    python, torchs = Path(os.__file__).parent, Path(torch.__file__).parent
    return file.is_relative_to(torchs) or (file.is_relative_to(python) and "-packages" not in str(file))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
