"""The receipt of an upcycling: how far the new model is from its dense source before any training."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from moelab.registry import Registry
from moelab_tools.upcycle_report import source_lines
from moelab_upcycling.maker import build_parts, logit_std
from moelab_upcycling.plan import Plan
from moelab_upcycling.source import DenseSource
from moelab_upcycling.streams import stream
from moelab_upcycling.top_k_mass import top_k_mass
from moelab_upcycling.writer import write_text

if TYPE_CHECKING:
    from torch import Tensor

    from moelab.nn.transformer import Transformer

RECEIPT = "upcycle_receipt.json"
SEQUENCE = 64  # tokens of the probe
_USABLE = 0.5  # of the available memory
_PROBE = """The committee met at nine on the first Monday of the month. Of the 27 proposals before it, four were
withdrawn, eleven were accepted without changes, and the others were sent back with questions about their cost.

def total(prices: list[float], tax: float = 0.2) -> float:
    return round(sum(prices) * (1 + tax), 2)

Let f be continuous on [a, b]. Then f attains its maximum, and if f(a) < y < f(b), some c has f(c) = y.
"""


@dataclass(frozen=True)
class _Reading:
    """A model's answer to the probe."""

    log_probabilities: Tensor  # [S, V]
    masses: list[float]  # of each sparse layer: weight of the chosen experts, mean over tokens
    most_loaded: list[float]  # of each sparse layer: the busiest expert's load over the mean load


def write_receipt(plan: Plan, registry: Registry, output: Path) -> dict[str, Any]:
    """Compare, and store beside the checkpoint: as many first layers as fit into half of the free memory."""
    receipt: dict[str, Any] = {"layers": {str(i): _expected(plan, registry, i) for i in plan.target.layouts}}
    layers = _layers_that_fit(plan)
    receipt["source"] = source_lines(plan)
    receipt["layers_compared"], receipt["of_layers"] = layers, plan.target.num_hidden_layers
    if layers:
        receipt |= _compare(plan, output, layers, receipt["layers"], registry)
    write_text(output / RECEIPT, json.dumps(receipt, indent=2) + "\n")
    return receipt


def print_receipt(console: Console, receipt: dict[str, Any]) -> None:
    """A few lines and a table by layer."""
    if "kl" in receipt:
        part = "" if receipt["layers_compared"] == receipt["of_layers"] else " (first layers only, with the final norm)"
        console.print(
            f"receipt, {receipt['layers_compared']} of {receipt['of_layers']} layers{part}, {receipt['tokens']} tokens "
            f"of {receipt['probe']}: loss {receipt['loss_dense']:.4f} dense, {receipt['loss_upcycled']:.4f} upcycled; "
            f"KL {receipt['kl']:.2e}; top-1 agreement {receipt['top1_agreement']:.1%}",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print("receipt: not even one layer fits into half of the free memory, so nothing was compared")
    table = Table("layer", "router logit std", "top-k mass expected", "measured", "busiest expert", title="routing")
    for layer, row in list(receipt["layers"].items())[:4]:
        measured = f"{row['top_k_mass']:.3f}" if "top_k_mass" in row else ""
        busiest = f"{row['busiest']:.1f} x mean" if "busiest" in row else ""
        table.add_row(layer, f"{row['logit_std']:.2f}", f"{row['expected_top_k_mass']:.3f}", measured, busiest)
    if len(receipt["layers"]) > 4:
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


def _layers_that_fit(plan: Plan) -> int:
    """Both models are held one after the other, in float32."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return plan.target.num_hidden_layers
    budget = available * _USABLE
    sizes = [0] * plan.target.num_hidden_layers
    rest = 0
    for shard in plan.shards:
        numbers = sum(math.prod(tensor.shape) for tensor in shard.tensors)
        if shard.layer_id < 0:
            rest += 4 * numbers
        else:
            sizes[shard.layer_id] += 4 * numbers
    count, used = 0, rest
    while count < len(sizes) and used + sizes[count] <= budget:
        used += sizes[count]
        count += 1
    return count


def _compare(plan: Plan, output: Path, layers: int, by_layer: dict[str, Any], registry: Registry) -> dict[str, Any]:
    import torch

    source = Path(plan.sources[0])
    tokens, probe = _probe(output, plan.target.vocab_size, plan.seed)
    dense = _read(source, layers, tokens, plan.target.vocab_size, registry)
    made = _read(output, layers, tokens, plan.target.vocab_size, registry)
    for layer, mass, busiest in zip(sorted(map(int, by_layer)), made.masses, made.most_loaded, strict=False):
        by_layer[str(layer)] |= {"top_k_mass": mass, "busiest": busiest}
    targets = torch.tensor(tokens[1:])
    p, q = dense.log_probabilities[:-1], made.log_probabilities[:-1]
    rows = torch.arange(len(targets))
    return {
        "probe": probe,
        "tokens": len(targets),
        "loss_dense": float(-p[rows, targets].mean()),
        "loss_upcycled": float(-q[rows, targets].mean()),
        "kl": max(0.0, float((p.exp() * (p - q)).sum(-1).mean())),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).float().mean()),
    }


def _probe(folder: Path, vocab_size: int, seed: int) -> tuple[list[int], str]:
    """Token ids of a text where a tokenizer went along with the source, else random ones."""
    if (folder / "tokenizer.json").exists():
        from moelab.data.tokenizer_file import guarded, load_fast

        path = folder / "tokenizer.json"
        tokens = guarded(lambda: load_fast(path).encode(_PROBE).ids, path)[:SEQUENCE]
        if len(tokens) > 1 and max(tokens) < vocab_size:
            return tokens, "text"
    raw = stream(seed, "receipt/1", 0, "probe").random_raw(SEQUENCE)
    return [int(word) % vocab_size for word in raw], "random token ids (the source has no tokenizer.json)"


def _read(folder: Path, layers: int, tokens: list[int], vocab_size: int, registry: Registry) -> _Reading:
    import torch

    model = _load_first_layers(folder, layers, registry)
    with torch.inference_mode():
        answer = model(torch.tensor([tokens]))
    masses, busiest = [], []
    for record in answer.records:
        routing = record.routing
        masses.append(float(routing.weight.sum()) / len(tokens))
        counts = torch.bincount(routing.expert, minlength=routing.num_experts).double()
        busiest.append(float(counts.max() / counts.mean()))
    return _Reading(answer.logits[0, :, :vocab_size].double().log_softmax(-1), masses, busiest)


def _load_first_layers(folder: Path, layers: int, registry: Registry) -> Transformer:
    """The checkpoint's model cut off after some layers, in float32."""
    import torch

    from moelab.builder import build_model
    from moelab.hf.checkpoint_folder import open_folder
    from moelab.hf.names import LM_HEAD, pieces

    opened = open_folder(folder, registry)
    config, stored = replace(opened.config, num_hidden_layers=layers), opened.stored
    model = build_model(config, device="meta", seed=None).to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if name == LM_HEAD and config.tie_word_embeddings:
                continue
            for piece in pieces(name, tuple(parameter.shape)):
                piece.view(parameter).copy_(stored.read(piece.name))
    return model.eval()
