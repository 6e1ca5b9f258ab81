"""How far a run is, what it ran on, and what it ended with: the rows of metrics.jsonl and summary.json."""

from __future__ import annotations

import platform
import resource
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import moelab
from moelab.config.stored import stored
from moelab.train.evaluate import Evaluation
from moelab.train.peak import peak_flops
from moelab.train.router_statistics import RouterReport
from moelab.train.step import StepResult

if TYPE_CHECKING:
    from moelab.train.setup import Setup


@dataclass
class Progress:
    """Counters that a resumed run continues."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0  # of training steps alone
    seconds_logged: float = 0.0
    tokens_logged: int = 0
    evaluation: Evaluation | None = None

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        known = {key: state[key] for key in ("step", "tokens", "flops", "seconds") if key in state}
        progress = cls(**known)
        progress.seconds_logged, progress.tokens_logged = progress.seconds, progress.tokens
        return progress

    def advance(self, tokens: int, flops_per_token: float, seconds: float) -> None:
        self.step += 1
        self.tokens += tokens
        self.flops += tokens * flops_per_token
        self.seconds += seconds

    def rate(self) -> float:
        """Tokens a second since the last call."""
        seconds, tokens = self.seconds - self.seconds_logged, self.tokens - self.tokens_logged
        self.seconds_logged, self.tokens_logged = self.seconds, self.tokens
        return tokens / seconds

    def row(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "flops": self.flops, "seconds": round(self.seconds, 4)}

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "flops": self.flops, "seconds": self.seconds}


def log_metrics(result: StepResult, rate: float, progress: Progress, setup: Setup) -> RouterReport:
    """All scalars of one logged step, loads and alarms. This is where the host waits for the device."""
    router = result.statistics.reduce()
    speed = progress.rate()
    metrics = {f"train/{name}": float(value) for name, value in result.losses.items()}
    metrics |= {"train/grad_norm": float(result.grad_norm), "train/lr": rate}
    peak = peak_flops(setup.step_settings.precision)
    metrics |= {"perf/tokens_per_second": speed, "perf/mfu": speed * setup.flops_per_token / peak}
    metrics |= {f"train/router_gradient_share/{name}": float(v) for name, v in result.gradient_shares.items()}
    metrics["perf/memory_gb"] = memory_gb(setup.step_settings.precision.device)
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
        "flops_per_token": setup.flops_per_token,
        "peak_flops": peak_flops(setup.step_settings.precision),  # what MFU is a share of
        "data": {
            "fingerprint": setup.corpus.fingerprint,
            "tokenizer": setup.tokenizer.fingerprint,
            "source": config.data.source["name"],
            "train_tokens": len(setup.corpus.train.tokens),
            "validation_tokens": len(setup.corpus.validation.tokens),
            "sequence_length": written["train"]["sequence_length"],
            "batch_size": written["train"]["batch_size"],
            "seed": written["data"]["seed"],
            "manifest": setup.corpus.manifest,
        },
        "components": components(config.model.moe),
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
        "seed": written["seed"],
        "backends": backends(setup),
    }


def run_name(setup: Setup) -> str:
    """The config's name or the folder's; routing that is balanced by force is never compared unawares."""
    written = stored(setup.config)  # not what a variable of the environment held: names are stored
    name = written["name"] or Path(written["run_dir"]).name
    return f"{name} (FORCED BALANCE)" if any(getattr(b.router, "forced", False) for b in setup.blocks) else name


def versions() -> dict[str, str]:
    torch_version = str(torch.__version__)  # a str subclass, which YAML writers refuse
    return {"moelab": moelab.__version__, "torch": torch_version, "python": platform.python_version()}


def components(moe: Any) -> dict[str, str]:
    """{"router": "softmax_topk", ...}: the names that a config chose; empty for a dense model."""
    if moe is None:
        return {}
    names = {key: str(getattr(moe, key)["name"]) for key in ("layout", "router", "shared_expert", "backend")}
    names["balance_losses"] = " + ".join(str(node["name"]) for node in moe.balance_losses) or "none"
    return names


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
    loads: Mapping[int, list[float]],
) -> dict[str, Any]:
    """summary.json."""
    return {
        **facts,
        "status": status,
        "steps": progress.step,
        "tokens": progress.tokens,
        "flops": progress.flops,
        "seconds": round(progress.seconds, 3),
        "final": dict(final),
        "expert_load": {str(layer): shares for layer, shares in loads.items()},
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
