"""Everything that needs a GPU, in one run of three minutes on one H200; without one it says so and stops.

    python benchmarks/gpu.py --out benchmarks/results
    python benchmarks/gpu.py --rehearse          # every line on the CPU, at toy sizes: no figures, nothing written

Correctness in bf16 against `loop` in fp32; every backend forward and forward + backward at three models' layers,
balanced and with a recorded run's load, beside the card's own matmul rate, transformers' grouped_mm experts and a
dense FFN of equal active FLOPs; the MegaBlocks products stand-alone; whole training steps with MFU; a profile of one
layer; attentions at length. A part that fails is told and the others go on; one that runs when the budget is spent is
cut off and told, with those that were not begun, and GRACE seconds later nothing runs whatever it waits for. What was
measured before is kept.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gpu_layer
import gpu_model
import gpu_run
from gpu_common import REHEARSAL, Bench, OutOfTime, Sizes, at_most, choose
from report import machine, write_results

NO_GPU = 2  # exit code
GRACE = 30  # seconds: for a part to end in which the budget is over


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder for gpu.json and gpu.md")
    parser.add_argument("--budget", type=float, default=300, help="seconds, after which parts are cut off")
    parser.add_argument("--parts", help="only these, by commas")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy sizes, to see that no line fails")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.rehearse:
        print("benchmarks/gpu.py: torch sees no CUDA device; nothing was measured and nothing written")
        return NO_GPU
    began = time.perf_counter()
    bench = Bench(torch.device("cpu" if options.rehearse else "cuda"), REHEARSAL if options.rehearse else Sizes())
    results: dict[str, Any] = {"matmul_tflops": bench.rate / 1e12, "bandwidth_tb": bench.bandwidth / 1e12}
    results |= {"skipped": [], "failed": {}, "part_seconds": {}}
    copied = f"a copy of {bench.sizes.copied:,} bytes: {bench.bandwidth / 1e12:.3g} TB/s"
    tables = [f"\nbf16 matmul of {bench.sizes.probe}: {bench.rate / 1e12:.3g} TFLOP/s; {copied}\n"]
    print(tables[0], flush=True)
    (first, tokens), *more = bench.sizes.shapes
    parts: dict[str, Callable[[], tuple[Any, str]]] = {
        "correctness": lambda: gpu_layer.correctness(bench),
        "step": lambda: gpu_model.training_steps(bench),
        f"layer {first.name}": lambda: gpu_layer.layer(first, tokens, bench),
        "profile": lambda: gpu_layer.profile(bench),
        "profile of a step": lambda: gpu_model.step_profile(bench),
        "whole run": lambda: gpu_run.whole_run(bench),
        "attention": lambda: gpu_model.attention(bench),
        "kernels": lambda: gpu_layer.kernels(bench),
        **{f"layer {s.name}": lambda s=s, t=t: gpu_layer.layer(s, t, bench) for s, t in more},
        "compiled step": lambda: gpu_model.compiled_step(bench),
    }
    for name, part in parts.items():
        if options.parts and not any(name.startswith(asked) for asked in options.parts.split(",")):
            continue
        if options.rehearse and name == "compiled step":
            continue  # the compiler's time is no rehearsal
        started = time.perf_counter()
        left = options.budget - (started - began)
        if left <= 0:
            results["skipped"].append(name)
            continue
        choose(True)
        try:
            with at_most(left, GRACE):
                results[name], table = part()
        except OutOfTime:
            results["skipped"].append(name)
            table = f"\n{name}: cut off, the budget of {options.budget:g} s was over\n"
        except Exception as error:  # one part's fault must not cost the others their time on the card
            traceback.print_exc()
            results["failed"][name] = table = f"\n{name} failed: {type(error).__name__}: {error}\n"
        tables.append(table)
        results["part_seconds"][name] = time.perf_counter() - started
        print(f"{table}({name}: {results['part_seconds'][name]:.0f} s)", flush=True)
        bench.release()
        if options.out and not options.rehearse:
            results["seconds"] = time.perf_counter() - began
            write_results(Path(options.out), "gpu", machine(), results, tables)
    if results["skipped"]:
        print(f"not measured, {options.budget:g} s were over: {', '.join(results['skipped'])}")
    wrong = [row for row in results.get("correctness", []) if not row["correct"]]
    return 1 if wrong or results["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
