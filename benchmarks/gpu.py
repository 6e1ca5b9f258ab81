"""Everything that needs a GPU, in one run of three minutes on one H200; without one it says so and stops.

    python benchmarks/gpu.py --out benchmarks/results
    python benchmarks/gpu.py --rehearse          # every line on the CPU, at toy sizes: no figures, nothing written

Correctness in bf16 against `loop` in fp32; every backend forward and forward + backward at three models' layers,
balanced and with a recorded run's load, beside the card's own matmul rate, transformers' grouped_mm experts and a
dense FFN of equal active FLOPs; the MegaBlocks products stand-alone; whole training steps with MFU; a profile of one
layer; attentions at length. A part that fails is told and the others go on.
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
from gpu_common import REHEARSAL, Bench, Sizes, choose
from report import machine, write_results

NO_GPU = 2  # exit code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder for gpu.json and gpu.md")
    parser.add_argument("--budget", type=float, default=300, help="seconds, after which no further part is begun")
    parser.add_argument("--parts", help="only these, by commas")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy sizes, to see that no line fails")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.rehearse:
        print("benchmarks/gpu.py: torch sees no CUDA device; nothing was measured and nothing written")
        return NO_GPU
    bench = Bench(torch.device("cpu" if options.rehearse else "cuda"), REHEARSAL if options.rehearse else Sizes())
    began = time.perf_counter()
    results: dict[str, Any] = {"matmul_tflops": bench.rate / 1e12, "skipped": [], "failed": {}}
    tables = [f"\nbf16 matmul of {bench.sizes.probe}: {bench.rate / 1e12:.3g} TFLOP/s\n"]
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
        if time.perf_counter() - began > options.budget:
            results["skipped"].append(name)
            continue
        started = time.perf_counter()
        choose(True)
        try:
            results[name], table = part()
        except Exception as error:  # one part's fault must not cost the others their time on the card
            traceback.print_exc()
            results["failed"][name] = table = f"\n{name} failed: {type(error).__name__}: {error}\n"
        tables.append(table)
        print(f"{table}({name}: {time.perf_counter() - started:.0f} s)", flush=True)
        bench.release()
        if options.out and not options.rehearse:
            results["seconds"] = time.perf_counter() - began
            write_results(Path(options.out), "gpu", machine(), results, tables)
    wrong = [row for row in results.get("correctness", []) if not row["correct"]]
    return 1 if wrong or results["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
