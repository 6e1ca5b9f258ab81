"""Which fields of Hugging Face's config.json change what a model computes, and which do not, whatever its kind.

After transformers 5.23: models/qwen2/configuration_qwen2.py, models/qwen2_moe/configuration_qwen2_moe.py,
configuration_utils.py. A field in none of these tables is told when a folder is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from moelab.errors import CheckpointError

T = TypeVar("T", int, float, bool)

# {field: (the values under which this decoder computes the same, what else to do)}. Fields of all kinds,
# and those by which related models say what none of ours has; a kind says what else holds for it.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), 'it must be "silu"'),
    "mlp_bias": ((False,), "moelab's FFN has no biases; set it to false if that is right"),
    "attention_dropout": ((0.0, 0), "moelab has no dropout; set it to 0.0"),
    "quantization_config": (
        ({},),
        "moelab reads fp8 (e4m3) with weight_block_size alone, of models with experts; use the checkpoint in bfloat16 "
        "or float32 that it was made from",
    ),
    "partial_rotary_factor": ((1.0, 1), "only plain rotary embedding is"),
    "use_qk_norm": ((False,), "moelab's decoder doesn't normalise queries and keys"),
    "qk_layernorm": ((False,), "moelab's decoder doesn't normalise queries and keys"),
    "logits_scaling": ((1.0, 1), "moelab's decoder doesn't scale its logits"),
    "logit_scale": ((1.0, 1), "moelab's decoder doesn't scale its logits"),
    "final_logit_softcapping": ((0.0, 0), "moelab's decoder doesn't cap its logits"),
    "attn_logit_softcapping": ((0.0, 0), "moelab's decoder doesn't cap its attention"),
    "embedding_multiplier": ((1.0, 1), "moelab's decoder doesn't scale its embeddings"),
    "residual_multiplier": ((1.0, 1), "moelab's decoder doesn't scale its residuals"),
    "is_encoder_decoder": ((False,), "moelab has decoders only"),
    "add_cross_attention": ((False,), "moelab has decoders only"),
}
# What a ModelConfig and every kind's config.json call alike.
ALIKE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
    "initializer_range",
)  # fmt: skip
READ = frozenset((
    "architectures", "decoder_sparse_step", "dtype",
    "dual_chunk_attention_config", "head_dim", "hidden_size", "initializer_range",
    "intermediate_size", "layer_types", "max_position_embeddings", "max_window_layers", "mlp_only_layers",
    "model_type", "moe_intermediate_size", "norm_topk_prob", "num_attention_heads", "num_experts",
    "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "original_max_position_embeddings",
    "rms_norm_eps", "rope_parameters", "rope_scaling",
    "rope_theta", "shared_expert_intermediate_size", "sliding_window", "tie_word_embeddings",
    "torch_dtype", "use_sliding_window", "vocab_size",
))  # fmt: skip
# What says nothing of the function: bookkeeping, token ids, generation, training losses.
HARMLESS = frozenset((
    "attn_implementation", "attn_implementation_internal", "auto_map", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "decoder_start_token_id", "eos_token_id", "experts_implementation",
    "finetuning_task", "gradient_checkpointing", "id2label", "is_decoder", "label2id", "name_or_path", "num_labels",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "prefix", "problem_type",
    "pruned_heads", "return_dict", "router_aux_loss_coef", "sep_token_id", "task_specific_params", "tf_legacy_loss",
    "tokenizer_class", "torchscript", "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16",
    "use_cache", "use_return_dict", "_attn_implementation", "_attn_implementation_autoset",
    "_attn_implementation_internal", "_commit_hash", "_experts_implementation", "_name_or_path",
))  # fmt: skip


@dataclass(frozen=True)
class Fields:
    """config.json with the path that its messages need."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def is_null(self, key: str) -> bool:
        return key in self.values and self.values[key] is None

    def number(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A field of this type; the default stands for an absent or null one, and without it that is an error."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.path}: {key}: is missing; it must be a {kind.__name__}")
            return default
        fits = isinstance(value, (int, float) if kind is float else kind) and (
            kind is bool or not isinstance(value, bool)
        )
        if not fits:
            raise CheckpointError(f"{self.path}: {key}: must be a {kind.__name__}, not {value!r}")
        return kind(value)

    def refuse(self, key: str, cure: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {key}: {json.dumps(self.get(key))} is not supported; {cure}")
