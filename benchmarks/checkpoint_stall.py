"""How long a run of several processes halts for a checkpoint, written at once and in the background.

    python benchmarks/checkpoint_stall.py                 # 2 processes, shard 2
    python benchmarks/checkpoint_stall.py --processes 1

Halt: of the step that saves, what saving takes of it, staging and the agreement of the processes; and what putting the
folder in place takes at the step at which all have written. Beside it the steps while the file is written, which share
cores and disk with it. Every figure is the slowest process's; a step's is the median of those without a save.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("core", "plugins", "upcycling", "tools", "tests")]

import torch  # noqa: E402  (after the path)

import moelab  # noqa: E402
from moelab.builder import build_balance_losses, build_hollow, resolve_model  # noqa: E402
from moelab.config.model import ModelConfig, MoEConfig  # noqa: E402
from moelab.config.run import OptimizerConfig, ParallelConfig  # noqa: E402
from moelab.data.batches import Batch  # noqa: E402
from moelab.parallel.filling import fill_hollow, make_room  # noqa: E402
from moelab.parallel.group import Group  # noqa: E402
from moelab.parallel.mesh import make_meshes  # noqa: E402
from moelab.parallel.parallelise import parallelise  # noqa: E402
from moelab.training.checkpoint import TrainingState, own_tensors  # noqa: E402
from moelab.training.optimizer import build_adamw  # noqa: E402
from moelab.training.precision import Precision  # noqa: E402
from moelab.training.step import StepSettings, train_step  # noqa: E402
from moelab.training.writing import Staging, Writing  # noqa: E402
from processes import run_on  # noqa: E402
from report import machine, markdown_table, write_results  # noqa: E402

CPU = torch.device("cpu")
EVERY = 50  # steps between saves, of which the share of the time is told


def config_of() -> ModelConfig:
    config = ModelConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
        moe=MoEConfig(layout={"name": "uniform", "num_experts": 16, "num_experts_per_tok": 2,
                              "moe_intermediate_size": 256},
                      router={"name": "softmax_topk"}, shared_expert={"name": "none"}),
    )  # fmt: skip
    resolve_model(config, moelab.Registry(entry_points=False))
    return config


def _batch(step: int, sequences: int, length: int) -> Batch:
    ids = torch.randint(0, 2048, (sequences, length + 1), generator=torch.Generator().manual_seed(step))
    same = torch.arange(sequences)[:, None].expand(sequences, length).contiguous()
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), same, torch.zeros_like(same), None)


def measure(folder: str, sequences: int, length: int, saves: int, gap: int) -> dict[str, Any]:
    """On each process; seconds."""
    ranks, registry, config = Group(), moelab.Registry(entry_points=False), config_of()
    meshes = make_meshes(ParallelConfig(shard=ranks.size), ranks.size, "cpu")
    model = build_hollow(config, registry, device=CPU, seed=0)
    parallelise(model, meshes)
    fill_hollow(model, make_room(model, CPU), None, config.initializer_range, 0)
    training = TrainingState(build_adamw(model, OptimizerConfig()), build_balance_losses(config, registry))
    settings = StepSettings(sequences // ranks.size, 1.0, 0, Precision(CPU, torch.float32))
    steps = iter(range(10**6))
    found: dict[str, Any] = {"step": [], "beside": [], "at once": [], "stage": [], "settle": [], "written after": []}

    def step() -> float:
        began, number = time.perf_counter(), next(steps)
        batch = _batch(number, sequences, length)
        train_step(model, training.optimizer, training.balance_losses, batch, number, settings, ranks=ranks)
        return time.perf_counter() - began

    step(), step()
    staging = Staging()
    for number in range(saves):
        found["step"] += [step() for _ in range(gap)]
        for background in (False, True):
            began = time.perf_counter()
            own = own_tensors(model, training, ranks)
            name = Path(folder) / f"{number}{background}"
            writing = Writing(name, staging.copies(own) if background else own, {}, {"config.yaml": b"{}\n"}, ranks)
            if not background:
                writing.write()
                writing.finish()
                found["at once"].append(time.perf_counter() - began)
                continue
            writing.start()
            found["stage"].append(time.perf_counter() - began)
            beside = 0
            while ranks.any(not writing.done):
                found["beside"].append(step())
                beside += 1
            began = time.perf_counter()
            writing.finish()
            found["settle"].append(time.perf_counter() - began)
            found["written after"].append(beside)
    held = sum(h.tensor.nbytes for file in own_tensors(model, training, ranks).values() for h in file.values())
    return found | {"bytes": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--gap", type=int, default=4, help="steps without a save between two")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        ranks = run_on(
            options.processes, measure, Path(name) / "processes", name,
            options.sequences, options.length, options.saves, options.gap,
        )  # fmt: skip
    slowest = {
        key: [max(rank[key][i] for rank in ranks) for i in range(len(ranks[0][key]))]
        for key in ("step", "beside", "at once", "stage", "settle")
    }
    step = statistics.median(slowest["step"])
    later = statistics.median(slowest["stage"][1:])
    settle = statistics.median(slowest["settle"])
    beside = statistics.median(slowest["beside"]) if slowest["beside"] else step
    during = statistics.mean(ranks[0]["written after"])
    lost = later + settle + during * max(beside - step, 0.0)
    rows = [
        ["a step without a save", f"{step * 1e3:,.0f} ms", "1"],
        ["written at once", *_of(statistics.median(slowest["at once"]), step)],
        ["in the background, the first time (new buffers)", *_of(slowest["stage"][0], step)],
        ["in the background, later", *_of(later, step)],
        ["putting the folder in place, some steps later", *_of(settle, step)],
        [f"a step while it is written ({during:.1f} of them)", *_of(beside, step)],
        [f"all of that, of the time, at a save every {EVERY} steps", "", f"{lost / (EVERY * step + lost):.2%}"],
        ["of it the halts alone", "", f"{(later + settle) / (EVERY * step + lost):.2%}"],
    ]
    size = sum(rank["bytes"] for rank in ranks)
    said = f"{size / 1e6:,.0f} MB of weights and moments on {options.processes} processes of one thread."
    print(markdown_table(["what", "takes", "of a step"], rows))
    write_results(
        Path(__file__).parent / "results", "checkpoint_stall", machine(), {"bytes": size, "ranks": ranks},
        ["", said, "", markdown_table(["what", "takes", "of a step"], rows), ""],
    )  # fmt: skip


def _of(seconds: float, step: float) -> tuple[str, str]:
    return f"{seconds * 1e3:,.1f} ms", f"{seconds / step:.1%}"


if __name__ == "__main__":
    main()
