"""`moelab doctor`: what this machine has, and which expert backends work on it."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

    from moelab import ExpertBackend
    from moelab.registry import Registry

# Distribution -> what of it is imported. MegaBlocks' own module lacks a compiled extension that moelab does without.
PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "stanford-stk": "stk",
    "megablocks": "moelab_plugins.expert_backends._megablocks_install:load",
    "transformers": "transformers",
    "tensorboard": "tensorboard",
}
LAYER = {"hidden_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
TOKENS = 64
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # relative to the largest output
BROKEN = "BROKEN: "


@click.command("doctor")
@click.argument("override", nargs=-1, metavar="[KEY=VALUE...]")
def command(override: tuple[str, ...]) -> None:
    """Tell what this machine has, and try every expert backend on each device and dtype.

    A backend works when it agrees with the dense sum in float64, forward and backward. What is installed and broken
    gets a line and exit code 1; the rest is tried without it.

    \b
    Example:
      moelab doctor
      moelab doctor plugins=[my_lab.backends]
    """
    from moelab.config.load import load_config
    from moelab.config.run import RunConfig
    from moelab.errors import RunFailure
    from moelab.registry import Registry, sound_plugins
    from moelab_tools.terminal import wrapped

    filler = ["run_dir=doctor", "train.steps=1", "model.vocab_size=1", "model.hidden_size=256",
              "model.intermediate_size=1", "model.num_hidden_layers=1", "model.num_attention_heads=1",
              "model.num_key_value_heads=1"]  # fmt: skip
    loaded = load_config([*override, *filler], RunConfig)
    broken = []

    def tell(name: str, found: str, line: str) -> None:
        if found.startswith(BROKEN) and name not in broken:
            broken.append(name)
        click.echo(wrapped(line, sys.stdout))

    for name, value in (*_machine(), *_packages()):
        tell(name, value, f"{name:<14}{value}")
    sound, faults = sound_plugins() if loaded.config.entry_points else ([], {})
    for name, fault in faults.items():
        tell(name, BROKEN, f"plugins       {BROKEN}{fault}")
    click.echo("\nexpert backends")
    for name, place, found in _backends(Registry(loaded.config.plugins, sound, loaded.places("plugins"))):
        tell(name, found, f"  {name:<14}{place}{found}")
    if broken:
        raise RunFailure(f"broken here: {', '.join(broken)}")


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    from moelab.training.peak import peak_flops
    from moelab.training.precision import Precision

    yield "system", f"{platform.platform()}, Python {platform.python_version()}"
    yield (
        "CPU",
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
    )
    for dtype in (torch.float32, torch.bfloat16):
        rate = peak_flops(Precision(torch.device("cpu"), dtype))
        yield f"  {str(dtype).removeprefix('torch.')}", f"{rate / 1e9:.0f} GFLOP/s in a matmul of 1024, MFU's peak here"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            yield f"cuda:{index}", f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, sm_{facts.major}{facts.minor}"
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "the driver shows no device"
        yield "CUDA", f"none: {why}"
    yield "autotune", _autotuned()


def _packages() -> Iterator[tuple[str, str]]:
    """(package, its version, and why it can't be imported)"""
    from moelab.plugin_faults import ANYTHING

    for name, module in PACKAGES.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            yield name, "not installed"
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of a package about its own extras
                _import(module)
        except ANYTHING as error:  # whatever a broken installation raises is what the user came to see
            found = f"{_broken(error)} (version {found})"
        yield name, found


def _import(name: str) -> None:
    """A module, or by module:function what this imports."""
    module, _, function = name.partition(":")
    loaded = import_module(module)
    if function:
        getattr(loaded, function)()


def _broken(error: BaseException) -> str:
    from moelab.plugin_faults import quoted

    return f"{BROKEN}{type(error).__name__}: {quoted(error)}"


def _autotuned() -> str:
    """What `train.autotune` knows of this machine, with as many threads as a run takes by itself."""
    import torch

    from moelab.ways_file import machine_facts, place_of, read_kept

    machine = machine_facts(torch.get_num_threads(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    path = place_of(machine)
    found = read_kept(path, machine)
    return f"{len(found)} choices measured, in {path}" if found else "nothing measured here yet"


def _backends(registry: Registry) -> Iterator[tuple[str, str, str]]:
    """(backend, device and dtype, what it does there)"""
    import torch

    from moelab.builder import backend_of
    from moelab.hookspecs import EXPERT_BACKENDS
    from moelab.moe.layout import ExpertLayout
    from moelab.plugin_faults import ANYTHING

    layout = ExpertLayout(LAYER["num_experts"], LAYER["num_experts_per_tok"], LAYER["moe_intermediate_size"])
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name in registry.components(EXPERT_BACKENDS):
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16):
                place = f"{device:<6}{str(dtype).removeprefix('torch.'):<10}"
                try:
                    backend = backend_of(registry, {"name": name}, layout, LAYER["hidden_size"], 0, where="doctor")
                    yield name, place, _try(backend, torch.device(device), dtype)
                except ANYTHING as error:
                    yield name, place, _broken(error)


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
    error = _error(backend, device, dtype)
    allowed = TOLERANCE[str(dtype).removeprefix("torch.")]
    return f"works (error {error:.0e})" if error <= allowed else f"{BROKEN}differs from float64 by {error:.0e}"


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
    scores = draw(TOKENS, layout.num_experts).abs()  # of every expert, which some backends ask for
    weights = [0.1 * draw(*p.shape) for p in ExpertBank(layout, LAYER["hidden_size"]).parameters()]
    upstream = draw(TOKENS, LAYER["hidden_size"])

    def run(chosen: Callable[..., torch.Tensor], kind: torch.dtype, place: torch.device) -> list[torch.Tensor]:
        bank = ExpertBank(layout, LAYER["hidden_size"]).to(place, kind)
        with torch.no_grad():
            for parameter, value in zip(bank.parameters(), weights, strict=True):
                parameter.copy_(value)
        x, weight = values[0].to(place, kind).requires_grad_(), values[1].to(place).requires_grad_()
        routing = Routing.from_topk(expert.to(place), weight, layout.num_experts, scores=scores.to(place))
        y = chosen(x, routing, bank)
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
