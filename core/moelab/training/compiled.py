"""`train.compile`: torch.compile on parts of the layers, each in one graph, from the first training step on.

A part is compiled whole (`fullgraph`) or not at all: what breaks the graph, a plugin or a missing compiler, is named in
one line, and that part goes on eagerly. Outside stay the experts, whose backends choose kernels by the routing's
numbers (grouped_mm, MegaBlocks, batched), the head's loss, which works piece by piece, and, on a CPU, everything that
has kernels of our own there: attention and large products, which a compiler would take apart (docs/compute.md).

Shapes are static and random numbers eager's, so that a resumed run compiles the same kernels and ends in the same bits.
Evaluation and generation, whose shapes vary, are eager.
"""

from __future__ import annotations

import logging
import os
import time
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
NO_COMPILER = ("InvalidCxxCompiler", "TritonMissing", "CppCompileError")
SWITCHES = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")  # torch's, read at its import and at each call
MOST_SHAPES = 8  # of one part: further ones, of stages that differ in length, are computed eagerly


@dataclass
class Compiled:
    """All parts of a run."""

    compiler: Callable[[torch.fx.GraphModule, Sequence[Any]], Any]
    parts: list[Part] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    without: str | None = None  # why nothing can be compiled here
    device: str = "cpu"
    _works: bool | None = None

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
        """How many were compiled: of each part one for each shape, dtype and kind of layer."""
        return sum(part.graphs for part in self.parts)

    @property
    def refused(self) -> list[str]:
        """The parts that are computed eagerly."""
        return [part.name for part in self.parts if part.broken]

    def line(self) -> str:
        """For the log."""
        if self.without is not None:
            return f"train.compile: nothing is compiled ({self.without})"
        left = f"; eager: {', '.join(self.refused)}" if self.refused else ""
        return f"train.compile: {len(self.parts) - len(self.refused)} parts in {self.graphs} graphs{left}"


class Part:
    """A function of a layer: compiled where it is called for training and can be, otherwise what it was."""

    def __init__(self, name: str, eager: Callable[..., Any], run: Compiled) -> None:
        self.name, self.graphs, self.broken = name, 0, False
        self._eager, self._run = eager, run
        self._compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=self._backend)

    def __call__(self, *arguments: Any) -> Any:
        if self.broken or self._run.without is not None or not torch.is_grad_enabled():
            return self._eager(*arguments)
        try:
            return self._compiled(*arguments)
        except Exception as error:
            if not type(error).__module__.startswith(COMPILERS):
                raise  # the part's own
            self._give_up(error)  # while it was traced or compiled: nothing has run
        return self._eager(*arguments)

    def _backend(self, graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        compiled: Any = self._run.compiler(graph, examples)
        self.graphs += 1
        return compiled

    def _give_up(self, error: BaseException) -> None:
        self.broken = True
        limit = isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit)
        reason = _first_line(error.__cause__ if limit and error.__cause__ else error)
        if _lacks_compiler(error) or (_of_backend(error) and not self._run.works()):
            self._run.without = reason
            logger.warning("train.compile: there is no working compiler here (%s): the run goes on without", reason)
            return
        told = f"{self.name.partition(', layer ')[0]} breaks the graph and is computed eagerly: {reason}"
        if told not in self._run.told:  # once for all layers
            self._run.told.add(told)
            logger.warning("train.compile: %s%s", told, _place(error))


def compile_parts(
    model: Transformer, losses: Sequence[NamedLoss], device: str, compiler: Any = None
) -> tuple[Compiled, list[NamedLoss]]:
    """Compile parts of `model`, in place, for training on "cpu" or "cuda"; -> what was, and the losses, compiled too.

    `compiler`: (graph, examples) -> a function; None: torch's inductor.
    """
    shared = MOST_SHAPES * (len(model.layers) + 1)  # layers of one kind share their code, and its limit
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, shared)
    torch._inductor.config.fallback_random = True  # eager's numbers
    torch._functorch.config.donated_buffer = False  # each loss's share of a gradient is a backward pass of its own
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


def _lacks_compiler(error: BaseException) -> bool:
    """Whether it is not the part's fault: no C++ compiler, no triton, or no room for its files."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) or type(seen).__name__ in NO_COMPILER:
            return True
        seen = seen.__cause__ or seen.__context__
    return any(word in str(error) for word in NO_COMPILER)


def _place(error: BaseException) -> str:
    """Where in the part's own code: " (switch.py:31)"."""
    frames = [frame for frame in getattr(error, "real_stack", None) or [] if "site-packages" not in frame.filename]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
