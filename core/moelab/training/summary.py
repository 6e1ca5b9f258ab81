"""What a run ran on and what it ended with: the numbers of a logged step, and summary.json."""

from __future__ import annotations

import platform
import resource
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import moelab
from moelab.config.stored import stored
from moelab.data.lineage import stages_aside
from moelab.data.packing import PackedBatches
from moelab.data.tokenizer import tokenizer_commit
from moelab.nn.count import expected_assignments
from moelab.training.format import FORMAT_VERSION, NAMED_WEIGHTS
from moelab.training.mixture import mixture_facts
from moelab.training.parts import components, own_options
from moelab.training.peak import peak_flops
from moelab.training.progress import Progress
from moelab.training.router_gradient import frozen_by_config, learns
from moelab.training.router_numbers import gradient_metrics, idle_metrics
from moelab.training.router_statistics import RouterReport, rank_metrics
from moelab.training.start import COMMIT, OVERRIDES
from moelab.training.step import StepResult

if TYPE_CHECKING:
    from moelab.training.setup import Setup

MEMORY = "perf/memory_gb"
LOADS, BACKENDS = "expert_load", "backends"  # of summary.json, and of state.json, so that a resumed run has them


def log_metrics(result: StepResult, rate: float, progress: Progress, setup: Setup) -> RouterReport:
    """All scalars of one logged step, and the loads. This is where the host waits for the device."""
    router = result.statistics.reduce(setup.ranks.sum)
    since = progress.interval()
    metrics = {f"train/{name}": float(value) for name, value in result.losses.items()}
    metrics |= {"train/grad_norm": float(result.grad_norm), "train/lr": rate}
    peak = peak_flops(setup.step_settings.precision)
    metrics |= {
        "perf/tokens_per_second": since.tokens / since.seconds,
        "perf/mfu": since.flops / since.seconds / peak / setup.ranks.size,
    }
    metrics |= {
        "compute/served_flops_per_token": since.flops / since.tokens,
        "compute/declared_flops_per_token": setup.flops_per_token,
        "compute/served_active_parameters": since.active_parameters,
    }
    metrics |= gradient_metrics(setup.model, setup.blocks, result, setup.adapters)
    metrics |= idle_metrics(setup.blocks, since.counts)
    metrics[MEMORY] = memory_gb(setup.step_settings.precision.device)
    metrics |= rank_metrics(router.loads, setup.config.parallel.expert)
    return replace(router, metrics=metrics | router.metrics)


def memory_gb(device: torch.device) -> float:
    """Peak memory so far, 1e9 bytes: the allocator's on CUDA, the process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def environment_facts(setup: Setup) -> dict[str, Any]:
    """What is known before the first step; the constant part of summary.json."""
    config, written = setup.config, stored(setup.config)
    return {
        "name": run_name(setup),
        "parameters": asdict(setup.parameters),
        "flops_per_token": setup.flops_per_token,  # declared
        "expected_assignments": {str(b.layer_id): asdict(expected_assignments(b)) for b in setup.blocks},
        "noncausal": setup.causality.noncausal,  # layers that look at later tokens, in training and in evaluation
        "peak_flops": peak_flops(setup.step_settings.precision),  # what MFU is a share of
        "data": {
            "fingerprint": setup.corpus.fingerprint,
            "tokenizer": setup.tokenizer.fingerprint,
            "tokenizer_commit": tokenizer_commit(config.data.tokenizer),
            "source": config.data.source["name"],
            "train_tokens": len(setup.corpus.train.tokens),
            "validation_tokens": len(setup.corpus.validation.tokens),
            "sequence_length": written["train"]["sequence_length"],
            "batch_size": written["train"]["batch_size"],
            "seed": written["data"]["seed"],
            "split_seed": written["data"]["split_seed"],
            "order_seed": written["seed"] if written["data"]["order_seed"] is None else written["data"]["order_seed"],
            "manifest": setup.corpus.manifest,
            "left_out": setup.corpus.left_out,
            **({"commits": setup.corpus.commits} if setup.corpus.commits else {}),  # of datasets on the hub
            **({"packing": asdict(setup.batches.fill)} if isinstance(setup.batches, PackedBatches) else {}),
            "seen": asdict(setup.seen),
            "mixture": mixture_facts(setup.batches, config.train.steps),  # as planned; {} without a mixer
        },
        "components": components(written["model"]["moe"]),
        "options": own_options(written["model"]["moe"], config.model.moe, setup.registry),  # not at their defaults
        # Layers whose router follows a fixed rule, by design: a fact and no alarm.
        "fixed_routers": {str(b.layer_id): type(b.router).__name__ for b in setup.blocks if not learns(b.router)},
        "frozen_routers": {
            str(layer): key for layer, key in frozen_by_config(setup.model, setup.blocks, config.train).items()
        },
        "plugins": setup.registry.versions(),
        "versions": {
            "moelab": moelab.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "device": _device_name(setup.step_settings.precision.device),
        "threads": setup.threads,
        "dtype": written["train"]["dtype"],
        "git": _git_revision(),
        "init_from": written["train"]["init_from"],
        **({"adapters": {"trained": setup.adapters.numbers}} if setup.adapters else {}),
        **setup.step_settings.objective.facts(),
        COMMIT: setup.start.commit,  # of the hub that init_from named
        OVERRIDES: setup.start.overrides,  # {key: {config, checkpoint}}: where the model is not the checkpoint's
        "lineage": setup.lineage.to_json() if setup.lineage else None,  # of the weights it starts from
        **_named_weights(setup),
        "seed": written["seed"],
        BACKENDS: backends(setup),
    }


def _named_weights(setup: Setup) -> dict[str, Any]:
    """The lineage of weights that other keys name, and the stages among theirs that are not the run's own past."""
    if not setup.named_weights:
        return {}
    aside = stages_aside(setup.lineage, setup.named_weights.values())
    recipes = {".".join(path): one.recipe for path, one in setup.named_weights.items()}
    return {NAMED_WEIGHTS: {"recipes": recipes, "stages": [list(stage) for stage in aside]}}


def run_name(setup: Setup) -> str:
    """The config's name or the folder's; routing that is balanced by force is never compared unawares."""
    written = stored(setup.config)  # not what a variable of the environment held: names are stored
    name = written["name"] or Path(written["run_dir"]).name
    return f"{name} (FORCED BALANCE)" if any(getattr(b.router, "forced", False) for b in setup.blocks) else name


def versions() -> dict[str, str]:
    torch_version = str(torch.__version__)  # a str subclass, which YAML writers refuse
    return {"moelab": moelab.__version__, "torch": torch_version, "python": platform.python_version()}


def backends(setup: Setup) -> list[str]:
    """Which backend computes the experts; `auto` says what it chose once it has run."""
    chosen: set[str] = set()
    for block in setup.blocks:
        choices = getattr(block.backend, "choices", None)
        chosen |= {f"{key}: {value}" for key, value in choices.items()} if choices else {block.backend.name}
    return sorted(chosen)


def summary(
    facts: Mapping[str, Any],
    progress: Progress,
    status: str,
    final: Mapping[str, float],
    loads: Mapping[str, list[float]],
    alarms: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """summary.json. `loads`: layer -> each expert's share of the assignments."""
    served = {"active_served": round(progress.active_parameters())} if progress.tokens else {}
    return {
        "format_version": FORMAT_VERSION,
        **facts,
        "parameters": {**facts["parameters"], **served},
        "status": status,
        "steps": progress.step,
        "tokens": progress.tokens,
        "flops": progress.flops(),  # served
        "flops_declared": progress.flops_declared(),
        "flops_per_token_served": progress.flops() / progress.tokens if progress.tokens else None,
        "seconds": round(progress.seconds, 3),
        "final": dict(final),
        LOADS: dict(loads),
        "alarms": [dict(alarm) for alarm in alarms],
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"{device} {platform.processor() or platform.machine()}"


def _git_revision() -> str | None:
    """The revision of the folder the run was started in, if it is under git."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
