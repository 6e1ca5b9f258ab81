"""What the flight recorder costs a step: blocks of steps with and without it, in pairs, in one process.

    python benchmarks/recorder.py [--pairs 8] [--threads 1] [--shape tiny]

A block is as many steps as lie between two looks (`train.probe_every`), logged as a run is, so it holds one look: the
forward pass of the probe, what is measured on it, and the file. The order of a pair changes from pair to pair. Printed:
the ratio with / without of each pair and their median, by the wall clock and by the processor time of this process,
which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EVERY = 50  # train.probe_every, the default
SHAPES: dict[str, list[str]] = {
    "tiny": [str(ROOT / "configs/train/tiny_moe.yaml")],
    "fine": [
        str(ROOT / "configs/train/tiny_moe.yaml"), "model.hidden_size=128", "model.num_hidden_layers=4",
        "model.moe.layout.num_experts=64", "model.moe.layout.num_experts_per_tok=8",
        "model.moe.layout.moe_intermediate_size=80", "train.sequence_length=256",
    ],
}  # fmt: skip


def blocks(arguments: list[str], pairs: int, folder: Path) -> list[dict[str, tuple[float, float]]]:
    """[{with, without: (wall seconds, processor seconds) of EVERY steps}] after one pair of warm-up."""
    from moelab.config.load import load_config
    from moelab.config.run import RunConfig
    from moelab.registry import Registry
    from moelab.training import trainer
    from moelab.training.best import Best
    from moelab.training.observers import gather_observers
    from moelab.training.plan import Plan
    from moelab.training.progress import Progress
    from moelab.training.run_folder import METRICS, MetricsLog
    from moelab.training.run_lock import hold
    from moelab.training.setup import prepare

    config = load_config([*arguments, f"run_dir={folder}", "train.log_every=10"], RunConfig).config
    config.train.steps = 2 * EVERY * (pairs + 1) + 1  # the last is not reached: it would look once more
    registry = Registry(entry_points=False)
    setup = prepare(config, registry)
    found: list[dict[str, tuple[float, float]]] = []
    with hold(folder) as lock, closing(MetricsLog(folder / METRICS, 0)) as metrics:
        manager = gather_observers(setup.config.observers, registry, folder, [])
        manager.hook.on_train_begin(run_dir=folder, config={}, facts={}, step=0, checkpoint=None)
        plan = Plan(config.schedule, config.train.steps)
        progress = Progress.of({}, setup.costs, setup.flops_per_token)
        loop = trainer.Loop(
            setup, folder, lock, manager, metrics, progress, trainer.alarm_watch(setup, {}), plan, Best()
        )
        for pair in range(pairs + 1):
            times: dict[str, tuple[float, float]] = {}
            for side in ("with", "without") if pair % 2 else ("without", "with"):
                setup.config.train.probe_every = EVERY if side == "with" else 0
                times[side] = _time(lambda: [trainer.one_step(loop) for _ in range(EVERY)])
            found.append(times)
    return found[1:]


def _time(work: Any) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    options = parser.parse_args()
    model = next((line for line in _cpu_lines() if line.startswith("model name")), platform.machine())
    name = model.partition(":")[2].strip() or model
    print(f"{name}, {options.threads} threads, {options.pairs} pairs of {EVERY} steps")
    for shape in options.shape or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            found = blocks([*SHAPES[shape], f"train.threads={options.threads}"], options.pairs, Path(folder))
        for index, clock in enumerate(("wall", "processor")):
            ratios = sorted(times["with"][index] / times["without"][index] for times in found)
            step = statistics.median(times["without"][index] for times in found) / EVERY
            listed = " ".join(f"{ratio:.3f}" for ratio in ratios)
            middle = f"{statistics.median(ratios):.3f} (of {listed})"
            print(f"{shape}, {clock}: {middle}; {1000 * step:.1f} ms a step without")


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
