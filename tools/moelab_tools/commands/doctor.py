"""`moelab doctor`: what this machine has, and which expert backends work on it."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

    from moelab import ExpertBackend

PACKAGES = ("torch", "triton", "stanford-stk", "megablocks", "transformers")
LAYER = {"hidden_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
TOKENS = 64
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # relative to the largest output


@click.command("doctor")
@click.argument("override", nargs=-1, metavar="[KEY=VALUE...]")
def command(override: tuple[str, ...]) -> None:
    """Tell what this machine has, and try every expert backend on each device and dtype.

    A backend works when it agrees with the dense sum in float64, forward and backward.

    \b
    Example:
      moelab doctor
      moelab doctor plugins=[my_lab.backends]
    """
    from moelab.config.load import load_config
    from moelab.config.run import RunConfig
    from moelab.registry import Registry
    from moelab_tools.terminal import wrapped

    filler = ["run_dir=doctor", "train.steps=1", "model.vocab_size=1", "model.hidden_size=256",
              "model.intermediate_size=1", "model.num_hidden_layers=1", "model.num_attention_heads=1",
              "model.num_key_value_heads=1"]  # fmt: skip
    loaded = load_config([*override, *filler], RunConfig)
    for name, value in _machine():
        click.echo(f"{name:<14}{value}")
    click.echo("\nexpert backends")
    for line in _backends(Registry(loaded.config.plugins, loaded.config.entry_points, loaded.places("plugins"))):
        click.echo(wrapped(f"  {line}", sys.stdout))


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    yield "system", f"{platform.platform()}, Python {platform.python_version()}"
    yield (
        "CPU",
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
    )
    for dtype in (torch.float32, torch.bfloat16):
        yield f"  {str(dtype).removeprefix('torch.')}", f"{_matmul_rate(dtype) / 1e9:.0f} GFLOP/s in a matmul of 1024"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            yield f"cuda:{index}", f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, sm_{facts.major}{facts.minor}"
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "the driver shows no device"
        yield "CUDA", f"none: {why}"
    yield "autotune", _autotuned()
    for name in PACKAGES:
        yield name, _version(name)


def _autotuned() -> str:
    """What `train.autotune` knows of this machine, with as many threads as a run takes by itself."""
    import torch

    from moelab.training.ways_file import machine_facts, place_of, read_kept

    machine = machine_facts(torch.get_num_threads(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    path = place_of(machine)
    found = read_kept(path, machine)
    return f"{len(found)} choices measured, in {path}" if found else "nothing measured here yet"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s, the best of five."""
    import torch

    size = 1024
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _backends(registry: object) -> Iterator[str]:
    """One line for each backend, device and dtype."""
    import torch

    from moelab import BackendContext, Registry
    from moelab.hookspecs import EXPERT_BACKENDS
    from moelab.moe.layout import ExpertLayout

    assert isinstance(registry, Registry)
    layout = ExpertLayout(LAYER["num_experts"], LAYER["num_experts_per_tok"], LAYER["moe_intermediate_size"])
    inner = BackendContext(layout, LAYER["hidden_size"], 0, dict)
    names = list(registry.components(EXPERT_BACKENDS))
    built = {name: registry.build(EXPERT_BACKENDS, {"name": name}, inner, "doctor") for name in names if name != "auto"}
    context = BackendContext(layout, LAYER["hidden_size"], 0, lambda: built)
    built["auto"] = registry.build(EXPERT_BACKENDS, {"name": "auto"}, context, "doctor")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name, backend in sorted(built.items()):
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16):
                short = str(dtype).removeprefix("torch.")
                yield f"{name:<14}{device:<6}{short:<10}{_try(backend, torch.device(device), dtype)}"


def _try(backend: ExpertBackend, device: torch.device, dtype: torch.dtype) -> str:
    """ "works", or why not."""
    from moelab.moe.contracts import ExpertProblem

    assignments = TOKENS * LAYER["num_experts_per_tok"]
    problem = ExpertProblem(
        LAYER["num_experts"], LAYER["hidden_size"], LAYER["moe_intermediate_size"], TOKENS, assignments, device, dtype
    )
    reason = backend.supports(problem)
    if reason is not None:
        return f"no: {reason}"
    try:
        error = _error(backend, device, dtype)
    except Exception as problem_found:  # whatever a broken installation raises is what the user came to see
        return f"BROKEN: {type(problem_found).__name__}: {str(problem_found).splitlines()[0]}"
    allowed = TOLERANCE[str(dtype).removeprefix("torch.")]
    return f"works (error {error:.0e})" if error <= allowed else f"BROKEN: differs from float64 by {error:.0e}"


def _error(backend: ExpertBackend, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative difference from float64, of the output and of every gradient."""
    import torch

    from moelab import Routing
    from moelab.moe.experts import ExpertBank
    from moelab.moe.layout import ExpertLayout
    from moelab.testing.backends import reference

    layout = ExpertLayout(LAYER["num_experts"], LAYER["num_experts_per_tok"], LAYER["moe_intermediate_size"])
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    expert = draw(TOKENS, layout.num_experts).topk(layout.num_experts_per_tok).indices
    values = [draw(TOKENS, LAYER["hidden_size"]), draw(TOKENS, layout.num_experts_per_tok).abs()]
    weights = [0.1 * draw(*p.shape) for p in ExpertBank(layout, LAYER["hidden_size"]).parameters()]
    upstream = draw(TOKENS, LAYER["hidden_size"])

    def run(chosen: Callable[..., torch.Tensor], kind: torch.dtype, place: torch.device) -> list[torch.Tensor]:
        bank = ExpertBank(layout, LAYER["hidden_size"]).to(place, kind)
        with torch.no_grad():
            for parameter, value in zip(bank.parameters(), weights, strict=True):
                parameter.copy_(value)
        x, weight = values[0].to(place, kind).requires_grad_(), values[1].to(place).requires_grad_()
        y = chosen(x, Routing.from_topk(expert.to(place), weight, layout.num_experts), bank)
        y.backward(upstream.to(place, kind))
        grads = [tensor.grad for tensor in (x, weight, *bank.parameters())]
        return [y.detach(), *(grad for grad in grads if grad is not None)]

    wanted = run(reference, torch.float64, torch.device("cpu"))
    found = run(backend, dtype, device)
    assert len(found) == len(wanted), (len(found), len(wanted))
    return max(
        float((ours.cpu().double() - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(found, wanted, strict=True)
    )
