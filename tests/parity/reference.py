"""Small transformers models that a parity test can trust: every bias, norm and weight random and large.

A default-initialised model hides bugs: its biases are 0 and its norms 1, so ignoring them changes nothing
(reference/qwen2_hf.md, section 9). Works with transformers 4.57 and 5.x.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from moelab.hf.names import pieces
from moelab.nn.transformer import Transformer

MAJOR = int(transformers.__version__.split(".")[0])
STD = 0.15  # logits then have a scale near 5, and a wrong detail moves them by 0.5 to 5

DENSE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = DENSE | {
    # more than ten experts: a reader that sorts names puts expert 10 before expert 2
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 40,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def reference_model(fields: dict[str, Any], seed: int = 0) -> Any:
    """Qwen2MoeForCausalLM if `fields` has experts, else Qwen2ForCausalLM; fp32, strongly initialised, eager experts."""
    fields = dict(fields)
    if MAJOR >= 5:  # its constructor has no rope_theta
        stretched = fields.pop("rope_scaling", None) or {"rope_type": "default"}
        fields["rope_parameters"] = {**stretched, "rope_theta": fields.pop("rope_theta")}
    moe = "num_experts" in fields
    kind = transformers.Qwen2MoeConfig if moe else transformers.Qwen2Config
    config = kind(**fields)
    if moe and MAJOR >= 5:
        config._experts_implementation = "eager"  # grouped_mm, the default, refuses float64
    model = (transformers.Qwen2MoeForCausalLM if moe else transformers.Qwen2ForCausalLM)(config).eval()
    strengthen(model, seed)
    return model


@torch.no_grad()
def strengthen(model: torch.nn.Module, seed: int = 0) -> None:
    """Matrices ~ N(0, .15^2), biases ~ N(0, .5^2), norms ~ 1 + N(0, .3^2), each from a stream of its own."""
    for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * seed + index))
        if name.endswith("bias"):
            parameter.copy_(0.5 * drawn)
        elif "norm" in name:
            parameter.copy_(1 + 0.3 * drawn)
        else:
            parameter.copy_(STD * drawn)


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a folder, after asserting that it took every tensor and invented none."""
    names = {"dtype" if MAJOR >= 5 else "torch_dtype": dtype}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **names)
    problems = {key: value for key, value in info.items() if value}
    assert not problems, problems
    return model.eval()


def gradients_by_our_name(reference: Any, ours: Transformer) -> dict[str, Tensor]:
    """transformers' gradients in the shapes of our parameters; its experts may be fused or apart in memory."""
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    found = {}
    for name, parameter in ours.named_parameters():
        shape = tuple(parameter.shape)
        fused = pieces(name, shape, fused=True)
        gradient = torch.zeros(shape, dtype=parameter.dtype)
        for piece in fused if fused[0].name in theirs else pieces(name, shape):
            part = theirs.pop(piece.name)
            if part is not None:  # 4.57's expert that no token chose
                piece.view(gradient).copy_(part)
        found[name] = gradient
    assert not theirs, list(theirs)
    return found


def token_ids(batch: int, seq: int, vocab: int = 97, seed: int = 0) -> Tensor:
    return torch.randint(3, vocab, (batch, seq), generator=torch.Generator().manual_seed(seed))
