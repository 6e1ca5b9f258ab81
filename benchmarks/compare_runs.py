"""How long `moelab compare` takes over many runs: run folders like those of `moelab train`, then the command itself.

    python benchmarks/compare_runs.py [--variants 20] [--seeds 5] [--steps 5000] [--layers 8] [--documents 400]
                                      [--folder SCRATCH] [--output benchmarks/results] [--profile]

Nothing is trained: curves, expert loads and documents are drawn, as many and as long as a run of that many steps logs
every 10 (at 8 layers 67 numbers a line). Times are of a fresh process, wall and processor; `--profile` says what takes
them.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import math
import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.config.stored import to_yaml
from report import machine, markdown_table, write_results

DOMAINS = ("code_py", "docs_en", "code_cpp", "legal", "maths")
METRICS = ("max_violation", "dead_fraction", "load_entropy", "router_entropy", "top_k_mass", "dropped_fraction")
LOG_EVERY, EVALUATIONS, TOKENS, EXPERTS = 10, 25, 4096, 64


def write_runs(folder: Path, options: argparse.Namespace) -> list[Path]:
    """`variants` x `seeds` run folders; the first variant has no experts, the others differ in learning rate."""
    rng = np.random.default_rng(0)
    base = Path(__file__).resolve().parents[1] / "configs/train/tiny_moe.yaml"
    tree = yaml.safe_load(to_yaml(load_config([str(base), f"train.steps={options.steps}"], RunConfig).config))
    difficulty, sizes = rng.normal(2.0, 0.4, options.documents), rng.integers(50, 2000, options.documents)
    paths = []
    for variant in range(options.variants):
        taste = rng.normal(0, 0.02, options.documents)
        for seed in range(options.seeds):
            path = folder / f"variant{variant:02d}_seed{seed}"
            path.mkdir(parents=True)
            level = 0.01 * variant + rng.normal(0, 0.005)
            config = tree | {"run_dir": str(path), "name": path.name, "seed": seed}
            config["optimizer"] = tree["optimizer"] | {"lr": 1e-3 * (1 + variant / 100)}
            (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            nats = sizes * (difficulty + taste + level + rng.normal(0, 0.02, options.documents))
            rows = [
                {"document": f"{DOMAINS[n % 5]}/{n:05d}", "domain": DOMAINS[n % 5], "nats": float(nats[n]),
                 "tokens": int(sizes[n]), "bytes": int(sizes[n])}
                for n in range(options.documents)
            ]  # fmt: skip
            _write_lines(path / "evaluation_documents.jsonl", rows)
            final = _write_metrics(path, options, rng, level, float(nats.sum() / sizes.sum()))
            _write_summary(path, options, seed, final)
            about = {"step": options.steps, "seed": seed, "temperature": 0.8}
            _write_lines(path / "evaluation_samples.jsonl",
                         [{"prompt": one, "text": one + "x" * 120, **about} for one in ("def ", "The ")])  # fmt: skip
            paths.append(path)
    return paths


def _write_metrics(path: Path, options: argparse.Namespace, rng: Any, level: float, end: float) -> dict[str, float]:
    """-> the last value of each tag."""
    logged = range(LOG_EVERY, options.steps + 1, LOG_EVERY)
    places = [*(f"layer_{layer:02d}" for layer in range(options.layers)), "mean"]
    tags = [f"moe/{place}/{metric}" for place in places for metric in METRICS]
    tags += ["train/grad_norm", "train/lr", "perf/mfu", "perf/memory_gb", "compute/served_flops_per_token"]
    values = rng.random((len(logged), len(tags)))
    every = max(LOG_EVERY, options.steps // EVALUATIONS // LOG_EVERY * LOG_EVERY)
    rows, final = [_axes(0) | _held_out(5.5)], {}
    for index, step in enumerate(logged):
        loss = end + 3 * math.exp(-step / (options.steps / 6)) + level
        row = _axes(step) | {"train/loss": loss + 0.01, "train/lm_loss": loss, "perf/tokens_per_second": 15000.0}
        rows.append(row | dict(zip(tags, values[index].tolist(), strict=True)))
        final |= rows[-1]
        if step % every == 0 or step == options.steps:
            rows.append(_axes(step) | _held_out(end if step == options.steps else loss))
            final |= rows[-1]
    _write_lines(path / "metrics.jsonl", rows)
    return {tag: value for tag, value in final.items() if "/" in tag}


def _axes(step: int) -> dict[str, float]:
    tokens = step * TOKENS
    return {"step": step, "tokens": tokens, "flops": tokens * 2_000_000, "flops_declared": tokens * 2e6,
            "seconds": step * 0.25}  # fmt: skip


def _held_out(loss: float) -> dict[str, float]:
    """With the details by domain and place that a run of 256 tokens a sequence logs."""
    found = {"eval/loss": loss, "eval/perplexity": math.exp(loss), "eval/bits_per_byte": loss / math.log(2)}
    parts = [f"eval_domain/bits_per_byte/{domain}" for domain in DOMAINS]
    parts += [f"eval_{kind}/bits_per_byte/{place:03d}" for kind in ("position", "context") for place in range(9)]
    return found | dict.fromkeys(parts, loss / math.log(2))


def _write_summary(path: Path, options: argparse.Namespace, seed: int, final: dict[str, float]) -> None:
    data = {"fingerprint": "sha256:aaaa", "tokenizer": "bytes", "source": "embedded", "train_tokens": 6_000_000,
            "validation_tokens": 600_000, "sequence_length": 256, "batch_size": 16, "seed": 0}  # fmt: skip
    load = {str(layer): [1 / EXPERTS] * EXPERTS for layer in range(options.layers)}
    summary = {
        "format_version": 2, "name": path.name, "status": "finished", "steps": options.steps,
        **{key: value for key, value in _axes(options.steps).items() if key != "step"},
        "parameters": {"total": 9_000_000, "active": 2_000_000, "active_served": 2_000_000}, "final": final,
        "data": data,
        "components": {"layout": "uniform", "router": "softmax_topk", "balance_losses": "load_balance"},
        "device": "cpu", "threads": 2, "dtype": "float32", "init_from": None, "seed": seed, "expert_load": load,
        "plugins": {f"moelab_plugins.routers.r{n}": "0.1.0" for n in range(70)},
        "versions": {"moelab": "0.1.0", "torch": "2.13.0", "python": "3.11"},
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary, indent=2))


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def timed(command: list[str]) -> tuple[float, float]:
    """(wall, processor) seconds of a fresh process, which must succeed."""
    begun, before = time.perf_counter(), os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = os.times()
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begun, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("variants", 20), ("seeds", 5), ("steps", 5000), ("layers", 8), ("documents", 400)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the runs go, and stay; default: a temporary one")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        runs = sorted((folder / "runs").glob("variant*")) or write_runs(folder / "runs", options)
        arguments = ["compare", *map(str, runs), "--baseline", "variant00", "--output", str(folder / "report")]
        if options.profile:
            _profile(arguments)
            return
        size = sum(path.stat().st_size for path in (folder / "runs").rglob("*") if path.is_file())
        times = [timed([sys.executable, "-m", "moelab", *arguments]) for _ in range(options.rounds)]
    wall, used = (float(np.median(values)) for values in zip(*times, strict=True))
    row = {"runs": len(runs), "megabytes": size / 1e6, "wall": wall, "processor": used, "seconds": times}
    body = [[str(row["runs"]), f"{row['megabytes']:.0f}", f"{wall:.1f}", f"{used:.1f}"]]
    tables = [markdown_table(["runs", "MB of run folders", "seconds", "processor seconds"], body)]
    print("\n".join(tables))
    if options.output:
        kept = ("variants", "seeds", "steps", "layers", "documents")
        facts = machine() | {name: getattr(options, name) for name in kept}
        write_results(options.output, "compare_runs", facts, [row], tables)


def _profile(arguments: list[str]) -> None:
    from moelab_tools.cli import run

    profile = cProfile.Profile()
    profile.runcall(run, arguments)
    pstats.Stats(profile).sort_stats("cumulative").print_stats(45)


if __name__ == "__main__":
    main()
