"""`moelab plan`: memory, traffic and time of a training step on the mesh of a config, before there is one."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from moelab.config.run import RunConfig
    from moelab.planning.machine import Machine
    from moelab.planning.memory import Plan
    from moelab.planning.times import Times
    from moelab.planning.traffic import CommunicationPlan

ANY = ("run_dir=plan", "train.steps=1000000000")  # what a run must have and a plan does not look at
GB, MB, TERA, MICRO = 1e9, 1e6, 1e12, 1e-6
MS = 1e-3


@click.command("plan")
@click.argument("config", nargs=-1, required=True, metavar="[FOLDER] [CONFIG...] [KEY=VALUE...]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: train.device; auto is cuda beyond one.")
@click.option("--device-memory", type=float, metavar="GB", help="Say whether it fits, e.g. 141 for an H200.")
@click.option("--machine", metavar="NAME", help="Give times, and say whether it fits: h100 (nodes of 8 by InfiniBand).")
@click.option("--node", type=click.IntRange(min=1), metavar="N", help="Devices of a node.")
@click.option("--bandwidth", type=(float, float), metavar="GB/S GB/S", help="Of a device, inside a node and out of it.")
@click.option("--latency", type=(float, float), metavar="US US", help="Of a message, inside a node and out of it.")
@click.option("--tflops", type=float, metavar="T", help="What matrix products reach. Default: the machine's peak.")
@click.option(
    "--trust-plugins", "trust", is_flag=True, help="Import the plugin modules that a folder names; they run as you."
)
def command(
    config: tuple[str, ...],
    device: str | None,
    device_memory: float | None,
    machine: str | None,
    node: int | None,
    bandwidth: tuple[float, float] | None,
    latency: tuple[float, float] | None,
    tflops: float | None,
    trust: bool,
) -> None:
    """Predict memory, traffic and time of a step on each device. Nothing is allocated.

    The mesh is the config's: parallel.replicate, shard and expert; so are micro-batches and recomputation.
    Parameters, gradients and the optimizer's state are of the config's types. Activations are counted by running
    the model on tensors without data; tokens go to as many experts as the routers declare, evenly. On a CPU the
    peak is the resident set of a process (docs/compute.md). Bytes are those of a ring, and were counted in steps
    (docs/planning.md). Peaks on a GPU were compared on an H200; times were not.

    \b
    Example:
      moelab plan configs/train/tiny_moe.yaml
      moelab plan model/qwen2-57b-a14b parallel.shard=64 parallel.expert=8 \\
          train.sequence_length=4096 train.batch_size=64 train.dtype=bfloat16 \\
          train.activation_checkpointing=1 --machine h100
    """
    from moelab.config.stages import stand_in
    from moelab.planning.budget import choose
    from moelab.planning.memory import predict
    from moelab.planning.of_run import problem_of
    from moelab.registry import Registry
    from moelab_tools.checkpoints import load_run, plugin_places, tell_origin, tell_stage

    _check(device_memory, bandwidth, latency, tflops)
    chosen = _machine(machine, node, bandwidth, latency, tflops)
    loaded = load_run(config, ANY, trust=trust)
    tell_origin(loaded)
    run = loaded.config
    tell_stage(run)
    registry = Registry(run.plugins, run.entry_points, plugin_places(loaded, trust=trust))
    device = device or _device(run)
    if run.train.memory_budget is not None:
        way = choose(run, registry, device)
        click.echo(way.sentence(run) + "\n")
        way.write(run)
        if run.stages:
            stand_in(run, -1)
    problem = problem_of(run, device)
    if device_memory is None and chosen is not None and chosen.memory:
        device_memory = chosen.memory / GB
    _print(predict(run.model, problem, registry, chosen), device_memory)


def _check(
    memory: float | None,
    bandwidth: tuple[float, float] | None,
    latency: tuple[float, float] | None,
    tflops: float | None,
) -> None:
    """Numbers of a machine; NaN and infinity are none."""
    from moelab.errors import ConfigError

    given = {"--device-memory": (memory,), "--bandwidth": bandwidth or (), "--tflops": (tflops,)}
    for option, values in given.items():
        for value in values:
            if value is not None and not 0 < value < inf:
                raise ConfigError(f"{option}: must be a number above 0, not {value:g}")
    for value in latency or ():
        if not 0 <= value < inf:
            raise ConfigError(f"--latency: must be a number of 0 or more, not {value:g}")


def _machine(
    name: str | None,
    node: int | None,
    bandwidth: tuple[float, float] | None,
    latency: tuple[float, float] | None,
    tflops: float | None,
) -> Machine | None:
    """What was named, with what was given beside; None: no times are asked for."""
    from moelab.errors import ConfigError, near
    from moelab.planning.machine import MACHINES, Machine

    if name is not None and name not in MACHINES:
        raise ConfigError(f"--machine: no '{name}'{near(name, list(MACHINES))} Known: {', '.join(MACHINES)}")
    if name is None and bandwidth is None and tflops is None:
        if node is not None or latency is not None:
            raise ConfigError("--node and --latency: say nothing without --machine, or --bandwidth and --tflops")
        return None
    found = MACHINES[name] if name is not None else Machine()
    found = replace(found, node=node or found.node)
    if bandwidth is not None:
        found = replace(found, inside=bandwidth[0] * GB, between=bandwidth[1] * GB)
    if latency is not None:
        found = replace(found, latency_inside=latency[0] * MICRO, latency_between=latency[1] * MICRO)
    if tflops is not None:
        found = replace(found, reached=tflops * TERA, peak=found.peak or tflops * TERA)
    if not found.peak or not found.inside:
        raise ConfigError("--bandwidth and --tflops: without --machine times need both")
    return found


def _device(run: RunConfig) -> str:
    import torch

    if run.train.device != "auto":
        return run.train.device.split(":")[0]
    return "cuda" if run.parallel.world > 1 or torch.cuda.is_available() else "cpu"


def _print(plan: Plan, device_memory: float | None) -> None:
    problem, memory, mesh = plan.problem, plan.memory, plan.problem.parallel
    times = "" if problem.micro_batches == 1 else f"{problem.micro_batches} x "
    click.echo(
        f"{plan.total_parameters:,} parameters{_trained(plan)}; {mesh.world} x {problem.device}, "
        f"{times}{problem.sequences} x {problem.sequence_length} tokens each, "
        f"{str(problem.dtype).removeprefix('torch.')} matmuls"
        + (", activation checkpointing" if problem.checkpointing else "")
    )
    if mesh.world > 1:
        kept = "" if mesh.reshard_after_forward else "; layers stay whole from their first pass to the step's end"
        click.echo(f"replicate {mesh.replicate} x shard {mesh.shard}, of which expert {mesh.expert}{kept}")
    kept, moments = ("fp32" if dtype.itemsize == 4 else "bf16" for dtype in (problem.kept, problem.moments))
    rows: dict[str, int] = {
        f"parameters ({kept})": memory.parameters,
        f"gradients ({kept})": memory.gradients,
        f"{problem.algorithm['name']}'s state ({moments})": memory.optimizer,
        "weights in use": memory.weights_in_use,
        "activations": memory.activations,
        "being computed or reduced": memory.working,
    }
    if problem.device == "cpu":
        rows["freed and not reused"] = memory.unused
        rows["Python and its libraries"] = memory.process
    if memory.saving:
        rows["copied while it is saved"] = memory.saving
    rows["peak"] = memory.peak
    _section("memory per device", rows)
    if mesh.world > 1:
        _print_traffic(plan.communication)
    if plan.times is not None:
        _print_times(plan.times)
    size = 2 * plan.cached  # as `moelab explain` counts it
    click.echo(
        f"\ngeneration keeps {size:,} bytes of each token in bfloat16, {_bytes(size * plan.longest).strip()} of "
        f"{plan.longest:,} tokens"
    )
    if device_memory is not None:
        verdict = "fits" if memory.peak <= device_memory * GB else "does not fit"
        click.echo(f"\n{verdict} in {device_memory:g} GB")


def _trained(plan: Plan) -> str:
    return f", {plan.trained:,} numbers in adapters trained" if plan.problem.adapters else ""


def _titles() -> dict[str, str]:
    from moelab.planning import traffic

    return {
        traffic.PARAMETERS: "all-gather of parameters",
        traffic.GRADIENTS: "reduce-scatter of gradients",
        traffic.REPLICAS: "all-reduce over replicas",
        traffic.TOKENS: "all-to-all, as declared",
        traffic.SUMS: "sums of counts and losses",
    }


def _print_traffic(sent: CommunicationPlan) -> None:
    rows = {title: round(sent.of(what)) for what, title in _titles().items() if sent.of(what)}
    _section("sent by each device in a step", rows | {"total": round(sent.total)})


def _print_times(times: Times) -> None:
    click.echo("\ntime of a step, at best")
    rows = {"matrix products": times.compute}
    rows |= {title: times.communication.get(what, 0.0) for what, title in _titles().items()}
    for name, seconds in rows.items():
        if seconds:
            click.echo(f"  {name:<28}{seconds / MS:>12,.2f} ms")
    for name, seconds in {"nothing overlaps": times.apart, "everything overlaps": times.together}.items():
        rate, used = times.tokens / seconds, times.utilisation(seconds)
        click.echo(f"  {name:<28}{seconds / MS:>12,.2f} ms  {rate:,.0f} tokens/s, {used:.1%} of the peak")


def _section(title: str, rows: dict[str, int]) -> None:
    click.echo(f"\n{title}")
    for name, size in rows.items():
        click.echo(f"  {name:<28}{_bytes(size)}")


def _bytes(size: int) -> str:
    return f"{size / GB:>12,.2f} GB" if size >= GB else f"{size / MB:>12,.2f} MB"
