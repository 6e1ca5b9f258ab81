"""`moelab plan`: memory and communication of a training step on N devices, before there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from moelab.config.run import RunConfig
    from moelab.planning.memory import Plan

ANY = ("run_dir=plan", "train.steps=1000000000")  # what a run must have and a plan does not look at
GB, MB = 1e9, 1e6


@click.command("plan")
@click.argument("config", nargs=-1, required=True, metavar="[FOLDER] [CONFIG...] [KEY=VALUE...]")
@click.option("--devices", default=1, show_default=True, help="Data parallel; all state is sharded over them.")
@click.option("--expert-parallel", default=1, show_default=True, help="Devices that share one set of experts.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: train.device; auto is cuda beyond one.")
@click.option("--checkpointing", is_flag=True, help="Keep each layer's input only, and compute it again.")
@click.option("--device-memory", type=float, metavar="GB", help="Say whether it fits, e.g. 141 for an H200.")
@click.option(
    "--trust-plugins", "trust", is_flag=True, help="Import the plugin modules that a folder names; they run as you."
)
def command(
    config: tuple[str, ...],
    devices: int,
    expert_parallel: int,
    device: str | None,
    checkpointing: bool,
    device_memory: float | None,
    trust: bool,
) -> None:
    """Predict memory and communication of a config per device, for one micro-batch. Nothing is allocated.

    Parameters, gradients and AdamW's moments are fp32, and sharded over the devices. Activations are counted
    by running the model on tensors without data; tokens go to as many experts as the routers declare. On a CPU the
    peak is the resident set of the process; measured ones were within 12 % (docs/compute.md). On a GPU: not measured.

    \b
    Example:
      moelab plan configs/train/tiny_moe.yaml
      moelab plan model/qwen2-57b-a14b --devices 64 --checkpointing \\
          train.sequence_length=4096 train.micro_batch_size=1 \\
          train.batch_size=1 train.dtype=bfloat16 --device-memory 141
    """
    import torch

    from moelab.errors import ConfigError
    from moelab.planning.memory import Problem, predict
    from moelab.registry import Registry
    from moelab_tools.checkpoints import load_run, plugin_places, tell_origin

    if min(devices, expert_parallel) < 1:
        raise ConfigError(f"--devices and --expert-parallel: at least 1, not {min(devices, expert_parallel)}")
    loaded = load_run(config, ANY, trust=trust)
    tell_origin(loaded)
    run = loaded.config
    problem = Problem(
        sequences=run.train.micro_batch_size or run.train.batch_size,
        sequence_length=run.train.sequence_length,
        dtype=getattr(torch, run.train.dtype),
        device=device or _device(run, devices),
        devices=devices,
        expert_parallel=expert_parallel,
        checkpointing=checkpointing,
    )
    registry = Registry(run.plugins, run.entry_points, plugin_places(loaded, trust=trust))
    _print(predict(run.model, problem, registry), device_memory)


def _device(run: RunConfig, devices: int) -> str:
    import torch

    if run.train.device != "auto":
        return run.train.device.split(":")[0]
    return "cuda" if devices > 1 or torch.cuda.is_available() else "cpu"


def _print(plan: Plan, device_memory: float | None) -> None:
    problem, memory, sent = plan.problem, plan.memory, plan.communication
    click.echo(
        f"{plan.total_parameters:,} parameters; {problem.devices} x {problem.device}, {problem.sequences} x "
        f"{problem.sequence_length} tokens each, {str(problem.dtype).removeprefix('torch.')} matmuls"
        + (", activation checkpointing" if problem.checkpointing else "")
    )
    rows: dict[str, int] = {
        "parameters (fp32)": memory.parameters,
        "gradients (fp32)": memory.gradients,
        "AdamW's moments (fp32)": memory.optimizer,
        "weights in use": memory.weights_in_use,
        "activations": memory.activations,
        "layer being computed": memory.working,
    }
    if problem.device == "cpu":
        rows["Python and its libraries"] = memory.process
    rows["peak"] = memory.peak
    _section("memory per device", rows)
    if problem.devices > 1:
        rows = {
            "all-gather of parameters": sent.gather_parameters,
            "reduce-scatter of gradients": sent.reduce_gradients,
            "all-to-all, as declared": sent.exchange_tokens,
            "total": sent.total,
        }
        _section("sent by each device in a step", rows)
    if device_memory is not None:
        verdict = "fits" if memory.peak <= device_memory * GB else "does not fit"
        click.echo(f"\n{verdict} in {device_memory:g} GB")


def _section(title: str, rows: dict[str, int]) -> None:
    click.echo(f"\n{title}")
    for name, size in rows.items():
        number = f"{size / GB:>12,.2f} GB" if size >= GB else f"{size / MB:>12,.2f} MB"
        click.echo(f"  {name:<28}{number}")
