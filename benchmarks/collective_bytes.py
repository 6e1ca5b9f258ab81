"""Does a step send what `moelab plan` says? Counted where collectives are called, in real steps on 2 and 4 processes.

python benchmarks/collective_bytes.py                    # results in benchmarks/results/collective_bytes.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("core", "plugins", "upcycling", "tools", "tests")]

import torch  # noqa: E402  (after the path)

from collectives import Case, counted_steps  # noqa: E402
from moelab.config.model import ModelConfig, MoEConfig  # noqa: E402
from processes import run_on  # noqa: E402
from report import machine, markdown_table, write_results  # noqa: E402

BF16 = torch.bfloat16
KEPT = {"reshard_after_forward": False}
TWO = [
    Case({"replicate": 2}, 8, 4, 128),
    Case({"shard": 2}, 8, 4, 128),
    Case({"shard": 2}, 8, 2, 128),
    Case({"shard": 2, "accumulate": "pieces"}, 8, 2, 128),
    Case({"shard": 2}, 8, 4, 128, checkpointing=1),
    Case({"shard": 2, "expert": 2}, 8, 4, 128),
    Case({"shard": 2, "expert": 2}, 8, 2, 128, checkpointing=1),
    Case({"shard": 2, "expert": 2}, 8, 4, 128, BF16),
    Case({"shard": 2} | KEPT, 8, 4, 128),
    Case({"shard": 2} | KEPT, 8, 2, 128, checkpointing=1),
    Case({"shard": 2, "expert": 2, "accumulate": "pieces"} | KEPT, 8, 2, 128),
]
FOUR = [
    Case({"shard": 4}, 8, 2, 128),
    Case({"shard": 4, "expert": 4}, 8, 2, 128),
    Case({"shard": 4, "expert": 2}, 8, 2, 128),
    Case({"shard": 4, "expert": 2}, 8, 1, 128, checkpointing=2),
    Case({"replicate": 2, "shard": 2}, 8, 2, 128),
    Case({"replicate": 2, "shard": 2, "expert": 2, "accumulate": "pieces"}, 8, 1, 128),
    Case({"replicate": 2, "shard": 2, "expert": 2}, 8, 1, 128, BF16, checkpointing=1),
    Case({"replicate": 4}, 8, 1, 128),
    Case({"replicate": 2, "shard": 2, "expert": 2} | KEPT, 8, 1, 128),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--cases", type=int, default=100, help="of each number of processes")
    chosen = parser.parse_args()
    results, rows = [], []
    for world, cases in ((2, TWO[: chosen.cases]), (4, FOUR[: chosen.cases])):
        for chunk in (None, 200):
            # Chunks lie inside the exchange, so they change nothing of it: one case a world shows it.
            few = cases if chunk is None else [case for case in cases if case.mesh.expert > 1][:1]
            if not few:
                continue
            with tempfile.TemporaryDirectory() as folder:
                ranks = run_on(world, counted_steps, Path(folder), config(chunk), few)
            for place, case in enumerate(few):
                found = [sum(column) / world for column in zip(*(_total(rank[place]) for rank in ranks), strict=True)]
                name = str(case) + (f", expert_chunk {chunk}" if chunk else "")
                results.append({"case": name, "formula": found[0], "declared": found[1], "counted": found[2]})
                results[-1]["kinds"] = [rank[place] for rank in ranks]
                rows.append([name, *(f"{value / 1e6:.3f}" for value in found[:3])])
                rows[-1] += [
                    f"{found[2] / found[0]:.6f}",
                    f"{found[2] / found[1]:.4f}",
                    f"{found[3]:.0f}, {found[4]:.0f}",
                ]
                print(" | ".join(rows[-1]), flush=True)
    head = ["step", "formula, MB", "as declared, MB", "counted, MB", "counted / formula", "counted / declared",
            "calls: formula, counted"]  # fmt: skip
    write_results(chosen.output, "collective_bytes", machine(), results, ["", WHAT, "", markdown_table(head, rows), ""])


WHAT = """Sent by a process in an optimizer step, the mean over processes, counted by a dispatch mode at the calls of
`torch.distributed` (backward and FSDP's own included) and weighed as rings send. The formula is `moelab plan`'s; it is
given the rows that the routing of the step sent away, and as declared they leave evenly, as the plan has it. Counted at
the API. On gloo gradients are reduced by an all-to-all and a sum (`moelab.parallel.reduce`), which is counted as a
reduce-scatter: gloo's own would put twice as much on the wire."""


def config(chunk: int | None) -> ModelConfig:
    """4 layers of 16 experts, top-4, a gated shared expert; rows that no number of processes divides."""
    layout = {"name": "uniform", "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 48}
    moe = MoEConfig(
        layout=layout,
        shared_expert={"name": "gated", "intermediate_size": 96},
        balance_losses=[{"name": "load_balance", "weight": 0.01, "scope": "global"}],
        expert_chunk=chunk,
    )
    return ModelConfig(
        vocab_size=513, hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, moe=moe,
    )  # fmt: skip


def _total(kinds: dict[str, list[float]]) -> list[float]:
    """All kinds together."""
    return [sum(column) for column in zip(*kinds.values(), strict=True)]


if __name__ == "__main__":
    main()
