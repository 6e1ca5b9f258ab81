"""Records which experts a trained run chooses, for experts.py and gpu.py to replay.

    moelab train configs/train/tiny_moe.yaml run_dir=runs/recorded train.steps=150 'model.moe.balance_losses=[]' \\
        model.moe.layout.num_experts=64 model.moe.layout.num_experts_per_tok=8 model.moe.layout.moe_intermediate_size=16
    python benchmarks/record_routing.py runs/recorded

Held-out text of the run's own data goes through its newest checkpoint. Of its MoE layers the least balanced one is kept
(or --layer): its experts [T, K], one byte each, in benchmarks/results/recorded_routing.safetensors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import moelab
from layer import RECORDED
from moelab.data.batches import ValidationBatches
from moelab.errors import UserError
from moelab.moe.routing import LayerRecord
from moelab.training.setup import build_corpus_of
from moelab_tools.checkpoints import evaluation_config, tokenizer_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder of `moelab train`")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layer", type=int, help="which decoder layer; the least balanced by default")
    parser.add_argument("--out", type=Path, default=RECORDED)
    options = parser.parse_args()
    try:
        layers = record(options.run, options.tokens)
    except UserError as error:
        parser.error(str(error))
    if options.layer is not None and options.layer not in layers:
        parser.error(f"--layer {options.layer}: {options.run} has MoE layers {', '.join(map(str, layers))}")
    chosen = options.layer if options.layer is not None else max(layers, key=lambda layer: imbalance(*layers[layer]))
    expert, num_experts = layers[chosen]
    facts = {"run": options.run.name, "layer": str(chosen), "num_experts": str(num_experts)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"expert": expert.to(torch.uint8)}, options.out, metadata=facts)
    print(f"layer {chosen}: {len(expert)} tokens, fullest expert {imbalance(expert, num_experts):.1f} x its fair share")
    print(f"wrote {options.out}")


@torch.no_grad()
def record(run_dir: Path, tokens: int) -> dict[int, tuple[Tensor, int]]:
    """{layer: (experts [tokens, K], E)} of held-out text."""
    run, registry = evaluation_config(run_dir, ())
    corpus = build_corpus_of(run, registry, tokenizer_of(run_dir, run.data.tokenizer))
    length = run.train.sequence_length
    batches = ValidationBatches(corpus.validation, -(-tokens // length), length, run.train.batch_size)
    model = moelab.load(run_dir, registry=registry)
    found: dict[int, list[LayerRecord]] = {}
    for batch in batches:
        for layer in model.hidden_states(batch.input_ids)[1]:
            found.setdefault(layer.layer_id, []).append(layer)
    if not found:
        raise UserError(f"{run_dir}: the model has no MoE layer")
    return {layer_id: _experts(records, tokens) for layer_id, records in found.items()}


def _experts(records: list[LayerRecord], tokens: int) -> tuple[Tensor, int]:
    """(experts [tokens, K], E)."""
    routings = [record.routing for record in records]
    top_k, experts = routings[0].top_k, routings[0].num_experts
    if top_k is None or experts > 256:
        raise UserError("only K experts a token of at most 256 can be recorded, one byte each")
    chosen = torch.cat([routing.expert.view(-1, top_k) for routing in routings])
    if len(chosen) < tokens:
        raise UserError(f"the held-out text has {len(chosen)} tokens only; lower --tokens")
    return chosen[:tokens], experts


def imbalance(expert: Tensor, num_experts: int) -> float:
    """The fullest expert's load in units of the fair share, experts [T, K]."""
    return float(torch.bincount(expert.flatten().long(), minlength=num_experts).max()) * num_experts / expert.numel()


if __name__ == "__main__":
    main()
