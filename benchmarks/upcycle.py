"""Upcycling speed at real size, against a raw direct write and a naive torch program, all in one run.

    python benchmarks/make_source.py /tmp/source --layers 4 --vocab-size 4096
    python benchmarks/upcycle.py /tmp/source /tmp/upcycle_benchmark model.vocab_size=4096 --out benchmarks/results

Writes 4 GB a layer below the second folder and removes them. A round is a raw write, the writers alone, the hash sink
and the whole conversion, one right after the other, since the ratios are what a shared machine can tell. The raw write
is what `dd bs=4M oflag=direct` does, into reserved blocks: one thread, one buffer in ordinary pages. The writers alone
are the conversion's own, from large pages, as many as it has workers, with nothing to compute. A conversion includes
the start of its workers, half a second that a real one of 28 layers does not notice, and the first touch of all their
memory.
"""

from __future__ import annotations

import argparse
import mmap
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moelab.config.load import load_config
from moelab.config.upcycle import UpcycleConfig
from moelab_upcycling.convert import convert, prepare, registry_of
from moelab_upcycling.plan import Plan
from moelab_upcycling.writer import BUFFER, ShardWriter


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="of the recipe, as `moelab upcycle` takes them"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-naive", action="store_true", help="without the naive program, which needs 9 GB of memory")
    parser.add_argument("--out", type=Path, help="a folder for upcycle.json and upcycle.md")
    arguments = parser.parse_args()
    settings = ["upcycle/qwen2_57b_a14b", f"source={arguments.source}", *arguments.settings]
    loaded = load_config(settings, UpcycleConfig)
    plan = prepare(loaded.config, registry_of(loaded.config))
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    layers = range(plan.target.num_hidden_layers)
    nbytes = sum(shard.nbytes for shard in plan.shards if shard.layer_id in layers)
    print(f"{len(layers)} layers, {nbytes / 1e9:.2f} GB, {arguments.workers} workers, {os.cpu_count()} cores")
    rounds = []
    for number in range(arguments.rounds):
        rounds.append(one_round(plan, arguments.scratch, arguments.workers, nbytes))
        told = ", ".join(f"{name} {value:.2f}" for name, value in rounds[-1].items())
        print(f"round {number}: {told}, load {os.getloadavg()[0]:.1f}", flush=True)
    results = {name: [one[name] for one in rounds] for name in rounds[0]}
    results["largest worker, GB"] = [resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6]
    if not arguments.no_naive:
        per_layer = nbytes / len(layers) / 1e9
        hashed, whole = (statistics.median(results[name]) for name in ("hash sink, GB/s", "end to end, GB/s"))
        results |= {name: [value] for name, value in naive(plan, arguments.scratch, per_layer, hashed, whole).items()}
    tell(results, arguments, len(layers), nbytes)


def one_round(plan: Plan, scratch: Path, workers: int, nbytes: int) -> dict[str, float]:
    """Rates in GB/s, ratios, and processor seconds a layer."""
    layers, output = range(plan.target.num_hidden_layers), scratch / "output"
    first: list[float] = []
    raw = nbytes / 1e9 / timed(lambda: raw_write(scratch / "raw", nbytes))
    alone = nbytes / 1e9 / timed(lambda: writers_alone(scratch, nbytes, workers))
    before = processor_seconds()
    hashed = nbytes / 1e9 / timed(lambda: convert(plan, None, workers=workers, layers=layers))
    between, started = processor_seconds(), time.perf_counter()

    def progress(_: int) -> None:
        first[:] = first or [time.perf_counter() - started]

    whole = nbytes / 1e9 / timed(lambda: convert(plan, output, workers=workers, layers=layers, progress=progress))
    after = processor_seconds()
    shutil.rmtree(output)
    return {
        "raw direct write, GB/s": raw,
        "writers alone, GB/s": alone,
        "hash sink, GB/s": hashed,
        "end to end, GB/s": whole,
        "end to end / raw direct write": whole / raw,
        "end to end / writers alone": whole / alone,
        "processor seconds a layer, hash sink": (between - before) / len(layers),
        "processor seconds a layer, end to end": (after - between) / len(layers),
        "seconds to the first tensor": first[0],
    }


def tell(results: dict[str, list[float]], arguments: argparse.Namespace, layers: int, nbytes: int) -> None:
    """Print medians and extremes; write them where a folder was named."""
    from report import machine, markdown_table, write_results  # here: workers import this file, and it imports torch

    rows = [
        [name, f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else ""]
        for name, values in results.items()
    ]
    table = markdown_table(["", "median", "of all rounds"], rows)
    print(table)
    if arguments.out:
        facts: dict[str, Any] = {"layers": layers, "GB": round(nbytes / 1e9, 2), "workers": arguments.workers}
        facts["rounds"] = arguments.rounds
        write_results(arguments.out, "upcycle", machine() | facts, results, ["", table])


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def processor_seconds() -> float:
    """Of all workers that have ended, which on a busy machine says more than the clock."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def raw_write(path: Path, nbytes: int) -> None:
    """The same bytes past the page cache as anybody would write them."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o666)
    os.posix_fallocate(descriptor, 0, nbytes)
    whole = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE  # a direct write ends at the end of a block
    with mmap.mmap(-1, BUFFER) as buffer:
        buffer[:] = np.random.default_rng(0).bytes(BUFFER)
        for start in range(0, whole, BUFFER):
            os.pwrite(descriptor, memoryview(buffer)[: whole - start], start)
    os.fsync(descriptor)
    os.close(descriptor)
    path.unlink()


def writers_alone(scratch: Path, nbytes: int, count: int) -> None:
    """The same bytes by the conversion's writer, `count` at a time, with nothing to compute."""
    share = nbytes // count
    piece = np.random.default_rng(0).integers(0, 256, BUFFER, dtype=np.uint8)

    def write(path: Path) -> None:
        writer = ShardWriter(path, share)
        for start in range(0, share, BUFFER):
            writer.write(piece[: share - start])
        writer.commit()

    paths = [scratch / f"raw{number}" for number in range(count)]
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(write, paths))
    for path in paths:
        path.unlink()


def naive(plan: Plan, scratch: Path, per_layer: float, hashed: float, whole: float) -> dict[str, float]:
    """`per_layer` in GB, `hashed` and `whole` in GB/s: what it takes, and how many times as fast those are."""
    busy = time.process_time()
    compute, saving = naive_layer(plan, scratch / "naive.safetensors")
    return {
        "naive torch, seconds a layer": compute,
        "naive torch, seconds to save a layer": saving,
        "naive torch, processor seconds a layer": time.process_time() - busy,
        "hash sink / naive torch's computing": compute / (per_layer / hashed),
        "end to end / naive torch": (compute + saving) / (per_layer / whole),
    }


def naive_layer(plan: Plan, path: Path) -> tuple[float, float]:
    """The same algorithm as one would write it in torch: (seconds for one layer's experts, to save them)."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    torch.set_num_threads(os.cpu_count() or 1)
    layout = plan.target.layouts[0]
    count, width, dense = layout.num_experts, layout.moe_intermediate_size, plan.target.intermediate_size
    dropped = width // 2
    started = time.perf_counter()
    weights = {}
    for file in sorted(Path(plan.sources[0]).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for matrix in ("gate", "up", "down"):
                name = f"model.layers.0.mlp.{matrix}_proj.weight"
                if name in tensors.keys():  # noqa: SIM118  (not a mapping)
                    weights[matrix] = tensors.get_tensor(name)
    copies = -(-count * width // dense)
    order = torch.cat([torch.randperm(dense) for _ in range(copies)])[: count * width].reshape(count, width)
    made = {}
    for expert in range(count):
        lost = torch.randperm(width)[:dropped]
        for matrix, weight in weights.items():
            axis = 1 if matrix == "down" else 0
            part = weight.index_select(axis, order[expert])
            old = part.index_select(axis, lost).float()
            new = torch.normal(float(old.mean()), float(old.std()), old.shape).to(part.dtype)
            made[f"{expert}.{matrix}"] = part.index_copy(axis, lost, new)
    compute = time.perf_counter() - started
    started = time.perf_counter()
    save_file(made, path)
    with open(path, "rb") as saved:
        os.fsync(saved.fileno())
    saving = time.perf_counter() - started
    path.unlink()
    return compute, saving


if __name__ == "__main__":
    main()
