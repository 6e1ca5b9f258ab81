"""The receipt of an upcycling: how far the new model is from its dense source before any training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moelab.registry import Registry
from moelab_tools.upcycle_probe import Probe
from moelab_tools.upcycle_report import source_lines
from moelab_upcycling.maker import build_parts, logit_std
from moelab_upcycling.plan import Plan
from moelab_upcycling.source import DenseSource
from moelab_upcycling.top_k_mass import top_k_mass
from moelab_upcycling.writer import write_text

RECEIPT = "upcycle_receipt.json"
SHOWN = 4  # layers of the table


def write_receipt(
    plan: Plan, registry: Registry, output: Path, probe: Probe, progress: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Compare with the first source, all layers, one after the other, and store it beside the checkpoint."""
    receipt: dict[str, Any] = {"layers": {str(i): _expected(plan, registry, i) for i in plan.target.layouts}}
    receipt["source"] = source_lines(plan)
    receipt |= _compare(output, probe, plan, receipt["layers"], progress)
    write_text(output / RECEIPT, json.dumps(receipt, indent=2) + "\n")
    return receipt


def print_receipt(console: Console, receipt: dict[str, Any]) -> None:
    """The verdict, what it rests on, and a table by layer."""
    style = {"dense": "green", "broken": "bold red"}.get(receipt["start"], "bold")
    console.print(f"receipt: [{style}]{receipt['verdict']}[/]", highlight=False, soft_wrap=True)
    console.print(
        f"  {receipt['tokens']:,} tokens of {receipt['documents']} documents, {receipt['probe']}: loss "
        f"{receipt['loss_dense']:.4f} dense, {receipt['loss_upcycled']:.4f} upcycled "
        f"(uniform {receipt['loss_uniform']:.2f}); KL {receipt['kl']:.2e}; top-1 agreement "
        f"{receipt['top1_agreement']:.1%}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    table = Table(
        "layer", "router logit std", "top-k mass expected", "measured", "busiest expert", "difference behind it", "KL",
        title="by layer",
    )  # fmt: skip
    rows = list(receipt["layers"].items())
    for layer, row in [*rows[:SHOWN], *rows[SHOWN:][-1:]]:
        expected = [f"{row['logit_std']:.2f}", f"{row['expected_top_k_mass']:.3f}"] if "logit_std" in row else ["", ""]
        routed = [f"{row['top_k_mass']:.3f}", f"{row['busiest']:.1f} x mean"] if "busiest" in row else ["", ""]
        table.add_row(layer, *expected, *routed, f"{row['difference']:.1%}", f"{row['kl']:.1e}")
    if len(rows) > SHOWN + 1:
        table.caption = f"the other layers: {RECEIPT}"
    console.print(table)


def _expected(plan: Plan, registry: Registry, layer_id: int) -> dict[str, float]:
    """What follows from the plan and the norm alone."""
    parts = build_parts(plan, registry, layer_id)
    with DenseSource(Path(plan.sources[0]), registry) as source:
        sharpness = logit_std(source, layer_id, parts.router.std)
    layout = plan.target.layouts[layer_id]
    mass = top_k_mass(layout.num_experts, layout.num_experts_per_tok, sharpness, plan.target.norm_topk_prob)
    return {"logit_std": sharpness, "expected_top_k_mass": mass, "shared_gain": float(parts.shared.gain)}


def _compare(
    output: Path, probe: Probe, plan: Plan, by_layer: dict[str, Any], progress: Callable[[], None]
) -> dict[str, Any]:
    import numpy as np

    from moelab_tools.compare.start import judge_start
    from moelab_tools.side_by_side import side_by_side

    source = Path(plan.sources[0])
    found = side_by_side(source, output, probe.ids, probe.targets, registry=probe.registry, progress=progress)
    for layer, difference in enumerate(found.layers):
        row = by_layer.setdefault(str(layer), {})
        row |= {"difference": difference.relative, "kl": difference.kl}
        if difference.mass is not None:
            row |= {"top_k_mass": difference.mass, "busiest": difference.busiest}
    _, of = np.unique(probe.document.flatten().numpy(), return_inverse=True)
    dense, made = (
        np.bincount(of, weights=nats.numpy()).astype(np.float64) for nats in (found.nats_first, found.nats_second)
    )
    tokens, kl = np.bincount(of).astype(float), float(found.kl.mean())
    vocabulary = plan.target.vocab_size
    start = judge_start(dense, made, tokens, kl, vocabulary, text=probe.text)
    return {
        "layers": dict(sorted(by_layer.items(), key=lambda item: int(item[0]))),
        "start": start.kind,
        "verdict": start.sentence,
        "probe": probe.said,
        "tokens": len(of),
        "documents": len(tokens),
        "loss_dense": float(found.nats_first.mean()),
        "loss_upcycled": float(found.nats_second.mean()),
        "loss_uniform": float(np.log(vocabulary)),
        "loss_difference": [start.low, start.difference, start.high],
        "kl": kl,
        "top1_agreement": float(found.same_choice.float().mean()),
        "largest_log_probability_difference": found.furthest,
    }
