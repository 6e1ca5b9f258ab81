"""The receipt of a surgery: the loss on held-out text before and after, and how far the two models are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moelab.moe.surgery import LayerPlan, Scores
from moelab.registry import Registry
from moelab.surgery.carry_out import Operation
from moelab_tools.compare.start import OPERATED, Start, judge_start
from moelab_tools.side_by_side import SideBySide, side_by_side
from moelab_tools.surgery.texts import Probe


def receipt_of(
    before: Path, after: Path, probe: Probe, registry: Registry, progress: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Both models on the same windows, layer beside layer: nats a token, with a 95 % interval over documents."""
    found = side_by_side(before, after, probe.ids, probe.targets, registry=registry, progress=progress)
    asked = probe.targets.flatten() >= 0
    _, of = np.unique(probe.document.flatten()[asked].numpy(), return_inverse=True)
    nats = [np.bincount(of, weights=one.numpy()).astype(np.float64) for one in (found.nats_first, found.nats_second)]
    tokens, kl = np.bincount(of).astype(np.float64), float(found.kl.mean())
    vocabulary = found.vocab_size
    start = judge_start(nats[0], nats[1], tokens, kl, vocabulary, text=True, words=OPERATED)
    return _told(found, start, tokens, kl, vocabulary)


def _told(found: SideBySide, start: Start, tokens: np.ndarray, kl: float, vocabulary: int) -> dict[str, Any]:
    return {
        "kind": {"dense": "same", "near": "near", "broken": "broken", "unknown": "unknown"}[start.kind],
        "verdict": start.sentence,
        "tokens": int(tokens.sum()),
        "documents": len(tokens),
        "loss_before": float(found.nats_first.mean()),
        "loss_after": float(found.nats_second.mean()),
        "loss_uniform": float(np.log(vocabulary)),
        "loss_difference": [start.low, start.difference, start.high],
        "kl": kl,
        "top1_agreement": float(found.same_choice.float().mean()),
        "largest_log_probability_difference": found.furthest,
        "by_layer": [{"difference": layer.relative, "kl": layer.kl} for layer in found.layers],
    }


def layers_told(operation: Operation, scores: Mapping[int, Scores]) -> dict[str, Any]:
    """{layer: what it was and is, from which experts, why, and what was measured of them}."""
    told = {}
    for layer_id, surgery in operation.layers.items():
        plan, before = surgery.plan, operation.patient.layouts[layer_id]
        told[str(layer_id)] = {
            "before": [before.num_experts, before.num_experts_per_tok, before.moe_intermediate_size],
            "after": [len(plan.experts), plan.num_experts_per_tok, plan.moe_intermediate_size],
            "exact": plan.exact,
            "because": plan.because,
            "experts": [sources_told(plan, index) for index in range(len(plan.experts))],
            "measured": _measured(scores.get(layer_id)),
        }
    return told


def sources_told(plan: LayerPlan, index: int) -> dict[str, float]:
    """{source: its share} of one new expert."""
    expert = plan.experts[index]
    return {str(source): share for source, share in zip(expert.sources, expert.shares, strict=True)}


def _measured(scores: Scores | None) -> dict[str, Any]:
    if scores is None:
        return {}
    found = {name: getattr(scores, name) for name in ("load", "saliency", "knockout")}
    return {"tokens": scores.tokens} | {name: value.tolist() for name, value in found.items() if value is not None}
