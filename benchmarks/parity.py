"""Is a step on several processes that of one? Every model of tests/parallel_grid.py on every layout.

python benchmarks/parity.py > benchmarks/results/parity.md
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("core", "plugins", "upcycling", "tools", "tests")]

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import parallel_grid as grid  # noqa: E402  (after the path)
from processes import run_on  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    print("# A step on several processes against one\n")
    print(f"`python benchmarks/parity.py`: gloo, torch {torch.__version__}, {grid.STEPS} steps of SGD in fp32;")
    print("the largest difference of a loss and of a weight.\n")
    print("| layout | processes | router and losses | loss | weight | assignments served |\n|---|---|---|---|---|---|")
    alone = {}
    for layout, (parallel, micro) in grid.LAYOUTS.items():
        world = parallel.get("replicate", 1) * parallel.get("shard", 1)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found = run_on(world, grid.run_layouts, folder, {layout: list(grid.MODELS)}, name, False)[0]
            for model in grid.MODELS:
                if (model, micro) not in alone:
                    alone[model, micro] = grid.steps(model, None, micro)
                print(_row(layout, world, model, found[f"{layout}-{model}"], alone[model, micro], folder), flush=True)


def _row(layout: str, world: int, model: str, ours: dict, theirs: dict, folder: Path) -> str:
    pairs = list(zip(ours["steps"], theirs["steps"], strict=True))
    loss = max(abs(a["losses"][key] - b["losses"][key]) for a, b in pairs for key in b["losses"])
    weights = load_file(folder / f"{layout}-{model}.safetensors")
    weight = max(float((weights[key] - value).abs().max()) for key, value in theirs["weights"].items())
    served = "the same" if all(a["served"] == b["served"] for a, b in pairs) else "others"
    return f"| {layout} | {world} | {model} | {loss:.1e} | {weight:.1e} | {served} |"


if __name__ == "__main__":
    main()
