"""bfloat16 over processes: autocast as it is, and FSDP2's MixedPrecisionPolicy, each against one process.

python benchmarks/mixed_precision.py                    # results in benchmarks/results/mixed_precision.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("core", "plugins", "upcycling", "tools", "tests")]

import torch  # noqa: E402  (after the path)
from torch import nn  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402

import parallel_grid as grid  # noqa: E402
from collectives import Collectives  # noqa: E402
from moelab.nn.norm import RMSNorm  # noqa: E402
from moelab.nn.transformer import Transformer  # noqa: E402
from moelab.parallel import parallelise as cutting  # noqa: E402
from moelab.planning.traffic import GATHER  # noqa: E402
from processes import run_on  # noqa: E402
from report import machine, markdown_table, write_results  # noqa: E402

MODELS, LAYOUTS = ("softmax_global", "sigmoid_bias"), ("shard2", "expert2")
WAYS = ("autocast", "policy", "policy, norms and routers apart in fp32")
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WHAT = """SGD in bfloat16 on 2 gloo processes, 4 steps of the small models of tests/parallel_grid.py. Autocast casts
weights where they are multiplied; the policy gathers them in bfloat16 and reduces in fp32 (embedding and head as they
are, under autocast too, which routers leave). Against one process in bfloat16: the largest difference of a loss and of
a weight, and how many of all assignments go to another expert; against one in fp32: the largest difference of a weight,
beside that of one process in bfloat16. Gathered: bytes that a process sends in the last step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results, rows = [], []
    for layout in LAYOUTS:
        micro = grid.LAYOUTS[layout][1]
        alone = {name: [grid.steps(name, None, micro, dtype=d) for d in ("bfloat16", "float32")] for name in MODELS}
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                found = run_on(2, steps, Path(folder), layout, way)[0]
            for name in MODELS:
                one = compared(found[name], *alone[name])
                results.append({"layout": layout, "way": way, "model": name, **one})
                shown = [f"{one[key]:.1e}" for key in ("loss", "weight", "exact", "alone")]
                rows.append([layout, way, name, *shown, f"{one['other']:.2%}", f"{found[name]['gathered'] / 1e3:.0f}"])
                print(" | ".join(rows[-1]), flush=True)
    head = ["layout", "how", "model", "loss", "weight", "weight against fp32", "of one process", "other experts",
            "gathered, kB"]  # fmt: skip
    write_results(asked.output, "mixed_precision", machine(), results, ["", WHAT, "", markdown_table(head, rows), ""])


def steps(layout: str, way: str) -> dict[str, Any]:
    """On each rank: what the grid finds, its weights as lists, and what the last of them all sent."""
    if way != "autocast":
        cutting.fully_shard = with_policy  # type: ignore[assignment]
    if way == WAYS[2]:
        grid.parallelise = apart(grid.parallelise)
    found = {}
    for name in MODELS:
        with Collectives() as seen:
            told = grid.steps(name, *grid.LAYOUTS[layout], dtype="bfloat16")
        weights = {key: value.float().flatten().tolist() for key, value in told.pop("weights").items()}
        found[name] = told | {"flat": weights, "gathered": seen.by_kind[GATHER].sent / grid.STEPS}
    return found


def with_policy(module: nn.Module, **options: Any) -> Any:
    """`fully_shard` of a layer or its experts, in bfloat16."""
    policy = MixedPrecisionPolicy() if isinstance(module, Transformer) else POLICY
    return fully_shard(module, mp_policy=policy, **options)


def apart(parallelise: Callable[..., None]) -> Callable[..., None]:
    """Norms and routers of each layer as a unit of their own, before the rest, in fp32."""

    def first(model: Transformer, meshes: Any, losses: Any = ()) -> None:
        for layer in model.layers:
            router = getattr(layer.mlp, "router", None)
            unit: Any = [module for module in layer.modules() if isinstance(module, RMSNorm)]
            unit += [router] if isinstance(router, nn.Module) and list(router.parameters()) else []
            fully_shard(unit, mesh=meshes.dense)
            unit[0].set_gradient_divide_factor(1.0)
            unit[0].set_force_sum_reduction_for_comms(True)
            unit[0].set_reduce_scatter_unused_params(True)
        parallelise(model, meshes, losses)

    return first


def compared(found: dict[str, Any], rounded: dict[str, Any], exact: dict[str, Any]) -> dict[str, float]:
    """Of several processes against one in bfloat16 and one in fp32."""
    pairs = list(zip(found["steps"], rounded["steps"], strict=True))
    moved = sum(abs(a - b) for ours, theirs in pairs for a, b in zip(ours["served"], theirs["served"], strict=True))
    ours = {key: torch.tensor(value) for key, value in found["flat"].items()}
    return {
        "loss": max(abs(a["losses"]["loss"] - b["losses"]["loss"]) for a, b in pairs),
        "weight": apart_by(ours, rounded["weights"]),
        "exact": apart_by(ours, exact["weights"]),
        "alone": apart_by({key: value.flatten() for key, value in rounded["weights"].items()}, exact["weights"]),
        "other": moved / 2 / sum(sum(step["served"]) for step in rounded["steps"]),
    }


def apart_by(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    return max(float((ours[key] - value.float().flatten()).abs().max()) for key, value in theirs.items())


if __name__ == "__main__":
    main()
