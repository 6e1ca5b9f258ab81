"""Does a process hold what `moelab plan` says? Resident sets of real training steps on 1, 2 and 4 processes.

python benchmarks/memory_per_rank.py                    # results in benchmarks/results/memory_per_rank.md
python benchmarks/memory_per_rank.py --width 512        # of a larger model, in memory_per_rank_512.md
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("core", "plugins", "upcycling", "tools", "tests")]

import torch  # noqa: E402  (after the path)

import moelab  # noqa: E402
from collectives import Case, batch_of  # noqa: E402
from moelab.builder import build_balance_losses  # noqa: E402
from moelab.config.model import ModelConfig, MoEConfig  # noqa: E402
from moelab.nn.allocator import keep_freed_memory  # noqa: E402
from moelab.nn.checkpointing import apply_activation_checkpointing  # noqa: E402
from moelab.parallel.group import Group  # noqa: E402
from moelab.parallel.mesh import make_meshes  # noqa: E402
from moelab.parallel.parallelise import parallelise  # noqa: E402
from moelab.parallel.ranks import ALONE, Ranks  # noqa: E402
from moelab.planning.memory import predict  # noqa: E402
from moelab.training.precision import Precision  # noqa: E402
from moelab.training.step import StepSettings, train_step  # noqa: E402
from processes import run_on  # noqa: E402
from report import machine, markdown_table, write_results  # noqa: E402

BF16 = torch.bfloat16
CASES = [
    Case({}, 4, 4, 256),
    Case({"shard": 2}, 4, 2, 256),
    Case({"shard": 2, "expert": 2}, 4, 2, 256),
    Case({"shard": 2, "expert": 2}, 4, 2, 256, BF16),
    Case({"shard": 2, "expert": 2}, 8, 4, 256, checkpointing=1),
    Case({"replicate": 2}, 4, 2, 256),
    Case({"shard": 2}, 8, 2, 256),
    Case({"shard": 2, "accumulate": "pieces"}, 8, 2, 256),
    Case({"shard": 4, "expert": 2}, 4, 1, 256),
    Case({"replicate": 2, "shard": 2, "expert": 2}, 4, 1, 256),
    Case({"shard": 2, "reshard_after_forward": False}, 4, 2, 256),
    Case({"shard": 2, "reshard_after_forward": False}, 8, 2, 256),
]
STEPS = 4
WIDTH = 384

WHAT = """The largest resident set (VmHWM, set back before the first step) of a process in four steps of AdamW, of the
rank that holds most, against `moelab plan`'s peak, which counts Python and its libraries as 0.44 GB, and with bf16 as
0.62. Without them: grown since the process had joined the others and taken a step of a tiny model, against the plan
without that constant. The model is built whole, and what is cut away handed back to the system, so that its building
does not count."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--cases", default="", help="numbers of those to run, with commas; all of them otherwise")
    parser.add_argument("--width", type=int, default=WIDTH, help="hidden size")
    chosen = parser.parse_args()
    numbers = [int(part) for part in chosen.cases.split(",") if part] or range(len(CASES))
    results, rows = [], []
    for case in (CASES[number] for number in numbers):
        with tempfile.TemporaryDirectory() as folder:
            ranks = run_on(case.mesh.world, measured, Path(folder), config(chosen.width), case)
        peak, grown = (max(rank[key] for rank in ranks) for key in ("peak", "grown"))
        plan = predict(config(chosen.width), case.problem())
        memory = plan.memory
        results.append({"case": str(case), "ranks": ranks, "plan": memory.peak, "parts": vars(memory)})
        rows.append([str(case), f"{plan.total_parameters / 1e6:.0f}"])
        for seen, said in ((peak, memory.peak), (grown, memory.peak - memory.process)):
            rows[-1] += [f"{said / 1e9:.2f}", f"{seen / 1e9:.2f}", f"{seen / said:.2f}"]
        print(" | ".join(rows[-1]), flush=True)
    head = ["step", "M parameters", "plan, GB", "resident, GB", "ratio", "without Python: plan", "grown", "ratio"]
    name = "memory_per_rank" + (f"_{chosen.width}" if chosen.width != WIDTH else "")
    facts = machine() | {"hidden": chosen.width}
    write_results(chosen.output, name, facts, results, ["", WHAT, "", markdown_table(head, rows), ""])


def config(width: int) -> ModelConfig:
    """6 layers of 16 experts, top-4."""
    layout = {"name": "uniform", "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": width // 2}
    moe = MoEConfig(layout=layout, shared_expert={"name": "gated", "intermediate_size": 2 * width})
    return ModelConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=6,
        num_attention_heads=width // 64, num_key_value_heads=2, moe=moe,
    )  # fmt: skip


def measured(model_config: ModelConfig, case: Case) -> dict[str, int]:
    """Of this rank: {"peak": largest resident set, "grown": since it had nothing but what it imports}."""
    _steps(config(128), case, 1)  # what libraries load when they are first used
    before = _reset()
    _steps(model_config, case, STEPS)
    peak = _resident("VmHWM")
    return {"peak": peak, "grown": peak - before}


def _steps(model_config: ModelConfig, case: Case, steps: int) -> None:
    registry = moelab.Registry(entry_points=False)
    model, losses = moelab.build_model(model_config, registry, seed=1), build_balance_losses(model_config, registry)
    ranks: Ranks = ALONE
    if case.checkpointing:
        apply_activation_checkpointing(model, case.checkpointing)
    if case.mesh.world > 1:
        ranks = Group(config=case.mesh)
        meshes, resharding = make_meshes(case.mesh, ranks.size, "cpu"), case.mesh.reshard_after_forward
        parallelise(model, meshes, losses, reshard_after_forward=resharding)
    _reset()
    keep_freed_memory()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    settings = StepSettings(case.micro, 1.0, 0, Precision(torch.device("cpu"), case.dtype))
    for step in range(steps):
        train_step(model, optimizer, losses, batch_of(model_config, case, step), step, settings, ranks=ranks)


def _reset() -> int:
    """Hand back what is free, and let the high-water mark begin here -> the resident set."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(key: str) -> int:
    found: Any = re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
