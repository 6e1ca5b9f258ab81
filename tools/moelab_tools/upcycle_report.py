"""What `moelab upcycle` prints before and after: the plan, its budget, the ledger, and warnings by reader."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moelab.config.upcycle import UpcycleConfig
from moelab.hf.gguf_file import describe_types, gguf_of
from moelab.registry import Registry
from moelab_upcycling.convert import Outcome, registry_of
from moelab_upcycling.dtypes import STORAGE, TORCH_NAMES
from moelab_upcycling.maker import build_parts
from moelab_upcycling.plan import Plan, ledger
from moelab_upcycling.promised_start import promised_start
from moelab_upcycling.source import DenseSource
from moelab_upcycling.writer import BUFFER, BUFFERS

_SECONDS_PER_GB = 2.3  # of a processor core, measured: docs/upcycling.md


def print_plan(console: Console, plan: Plan, config: UpcycleConfig, *, ledger: bool) -> None:
    """`ledger`: also what becomes of every source tensor."""
    layout = next(iter(plan.target.layouts.values()))
    console.print(
        f"{len(plan.tensors):,} tensors, {plan.parameters:,} parameters, total_size {plan.total_size:,} bytes in "
        f"{len(plan.shards)} shards, {TORCH_NAMES[plan.dtype]}",
        soft_wrap=True,
    )
    console.print(
        f"{len(plan.target.layouts)} of {plan.target.num_hidden_layers} layers sparse: {layout.num_experts} experts of "
        f"{layout.moe_intermediate_size}, top {layout.num_experts_per_tok}, shared "
        f"{plan.target.shared_intermediate_size}; dense FFN {plan.target.intermediate_size}",
        soft_wrap=True,
    )
    for line in (*plan.arithmetic, *source_lines(plan)):
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
    for axis in ("experts", "shared", "router", "scaling"):
        part = dict(getattr(plan.recipe, axis))
        name = part.pop("name")
        console.print(
            f"  {axis}: {name}", ", ".join(f"{k}={v}" for k, v in part.items()),
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
    console.print(f"  seed {plan.seed}, plan {plan.hash}", highlight=False, soft_wrap=True)
    seconds = plan.total_size / 1e9 * _SECONDS_PER_GB / config.workers
    console.print(
        f"budget: {plan.total_size / 1e9:.2f} GB of disk, {config.workers} workers of about "
        f"{memory_per_worker(plan) / 1e9:.2f} GB, about {seconds:.0f} s "
        "where the disk keeps up",
        soft_wrap=True,
    )
    start = promised_start(
        plan, build_parts(plan, registry_of(config, [Path(p) for p in plan.search_path]), min(plan.target.layouts))
    )
    style = {"dense": "green", "far": "yellow"}.get(start.kind, "bold")
    console.print(f"start: [{style}]{start.kind}[/]: {escape(start.sentence)}", highlight=False, soft_wrap=True)
    for warning in warnings(plan, config):
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    if ledger:
        print_ledger(console, plan, registry_of(config, [Path(p) for p in plan.search_path]))


def source_lines(plan: Plan) -> list[str]:
    """What was decoded, and what the target has that the source lacks."""
    files = [gguf for source in plan.sources if (gguf := gguf_of(Path(source))) is not None]
    zeros = [tensor.name for tensor in plan.tensors if tensor.role == "zeros"]
    added = [f"added, exactly: {len(zeros)} biases of zero on q, k and v ({zeros[0]}, ...)"] if zeros else []
    return [f"source: {describe_types(file)}" for file in files] + added


def print_ledger(console: Console, plan: Plan, registry: Registry) -> None:
    """Every source tensor and what it becomes; layers that fare alike stand together."""
    sources = [DenseSource(Path(folder), registry) for folder in plan.sources]
    fates = ledger(plan, sources)
    grouped: Counter[tuple[str, str]] = Counter()
    for name, fate in fates.items():
        parts = name.split(".")
        pattern = ".".join("*" if part.isdigit() else part for part in parts)
        grouped[pattern, fate] += 1
    table = Table("source tensor", "number", "becomes", title=f"{len(fates)} source tensors")
    for (pattern, fate), count in grouped.items():
        table.add_row(escape(pattern), str(count), escape(fate))
    console.print(table)
    table = Table("shard", "layer", "tensors", "bytes", title="output")
    for shard in plan.shards:
        layer = "" if shard.layer_id < 0 else str(shard.layer_id)
        table.add_row(shard.file, layer, str(len(shard.tensors)), f"{shard.nbytes:,}")
    console.print(table)


def memory_per_worker(plan: Plan) -> int:
    """Bytes: one FFN matrix of each source, the largest tensor that is made, buffers, Python."""
    matrix = plan.target.hidden_size * plan.target.intermediate_size * STORAGE[plan.dtype].itemsize
    held = len(plan.sources) + (1 if len(plan.sources) > 1 else 0)
    largest = max(tensor.nbytes for tensor in plan.tensors if tensor.role != "copy")
    return held * matrix + largest + BUFFERS * BUFFER + (88 << 20)


def warnings(plan: Plan, config: UpcycleConfig) -> list[str]:
    """What the recipe's parts say, and what other readers can't take (reference: qwen2_hf.md, section 8)."""
    found: dict[str, None] = {}
    registry = registry_of(config, [Path(p) for p in plan.search_path])
    parts = build_parts(plan, registry, min(plan.target.layouts))
    for part in (parts.experts, parts.shared, parts.router, parts.scaling):
        found |= dict.fromkeys(getattr(part, "warnings", ()))
    target = plan.target
    if target.tie_word_embeddings:
        found["llama.cpp and SGLang can't load a tied Qwen2-MoE: untie=true writes lm_head as well"] = None
    if target.norm_topk_prob:
        found["llama.cpp ignores norm_topk_prob and computes other logits; false is what Qwen2-57B-A14B has"] = None
    if len(target.layouts) < target.num_hidden_layers:
        found["llama.cpp can't convert, and SGLang misreads, a Qwen2-MoE with dense layers"] = None
    if plan.dtype == "F16" and float(dict(plan.recipe.shared).get("gate_value", 0) or 0) < 6e-8:
        found["llama.cpp: float16 rounds the shared gate to zeros, which are NaN there; use dtype=bfloat16"] = None
    return list(found)


def print_outcome(console: Console, plan: Plan, outcome: Outcome, output: Path | None) -> None:
    """What was done, how fast, and the hash to compare with."""
    done = outcome.made + outcome.kept
    console.print(
        f"{outcome.made / 1e9:.3f} GB made, {outcome.kept / 1e9:.3f} GB verified and kept, {outcome.seconds:.1f} s, "
        f"{done / 1e9 / max(outcome.seconds, 1e-9):.2f} GB/s"
    )
    console.print(
        f"content sha256 {outcome.content_hash} of {len(outcome.hashes)} of {len(plan.tensors)} tensors", soft_wrap=True
    )
    if output is not None:
        rest = "" if outcome.complete else " (not complete: the index waits for the other layers)"
        console.print(f"written: {output}{rest}", highlight=False, soft_wrap=True, markup=False)
