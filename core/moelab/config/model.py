"""The model's part of a config. Every dimension has Hugging Face's name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

from moelab.config.latent_attention import LatentAttentionConfig
from moelab.config.rope_scaling import as_part
from moelab.errors import ConfigError

# So few that what is counted layer by layer ends, and that the bytes of one matrix are a number of 64 bits. The deepest
# published transformer has 1,000 layers (DeepNet, 2203.00555, abstract).
MOST_LAYERS, LARGEST_SIZE, LARGEST_MATRIX = 1024, 2**31 - 1, 2**48
PART = "part"  # marks the keys that select a plugin, for who describes them
Part = Annotated[dict[str, Any], PART]  # {name: ..., options}


@dataclass
class MoEConfig:
    """Which plugins make a layer sparse."""

    layout: Part = field(default_factory=lambda: {"name": "uniform"})  # how many experts, how wide, in which layers
    router: Part = field(default_factory=lambda: {"name": "softmax_topk"})  # which experts a token goes to
    shared_expert: Part = field(default_factory=lambda: {"name": "none"})  # that every token passes through
    backend: Part = field(default_factory=lambda: {"name": "auto"})  # what computes the experts
    # Terms of the training loss; each takes `layers`, a pattern like "0-3,7", and `schedule` of its weight too.
    balance_losses: list[Part] = field(default_factory=list)
    # Width of the space that routed experts read and write, one projection there and one back a layer; router and
    # shared expert stay at hidden_size. null: no such space
    moe_latent_size: int | None = None
    moe_latent_norm: bool = False  # RMSNorm over the sum of a token's experts, before the projection back
    expert_chunk: int | None = (
        None  # assignments a layer computes at once; more take longer, not more memory. None: all
    )
    allow_noncausal: bool = False  # let routers that look at later tokens into this decoder
    # Parts of single layers in place of those above: {"0": {router: ...}, "20-27": {...}}.
    layers: dict[str, dict[str, Part]] = field(default_factory=dict)

    def check_latent(self, hidden_size: int, where: str) -> None:
        """Raise ConfigError for a latent space that is none: as wide as the model or wider, or a norm without one."""
        size = self.moe_latent_size
        if size is None:
            if self.moe_latent_norm:
                raise ConfigError(f"{where}.moe_latent_norm: there is no latent space; set {where}.moe_latent_size too")
        elif not 1 <= size < hidden_size:
            raise ConfigError(
                f"{where}.moe_latent_size: must be in 1 .. {hidden_size - 1}, narrower than hidden_size {hidden_size}, "
                f"not {size}; null: experts at the full width"
            )


@dataclass
class ModelConfig:
    """A decoder of Qwen2's kind, or of its kin Llama, Mistral and Qwen3; dense when `moe` is null."""

    vocab_size: int = MISSING  # rows of the embedding: at least the tokenizer's ids
    hidden_size: int = MISSING  # width of a token's state
    intermediate_size: int = MISSING  # width of the dense FFN
    num_hidden_layers: int = MISSING  # decoder layers
    num_attention_heads: int = MISSING  # of the queries
    num_key_value_heads: int = MISSING  # of keys and values, each shared by a group of query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 32768  # tokens of the longest sequence
    rms_norm_eps: float = 1e-6  # added to the mean square under the root
    rope_theta: float = 1_000_000.0  # base of the rotary embedding's wavelengths
    rope_scaling: Part | None = None  # how the rotary embedding reaches beyond the trained length; null: plain
    attention: Part | None = None  # which earlier positions a query sees, and how far away; null: all, as they are
    qkv_bias: bool = True  # biases on q, k and v: Qwen2 has them; Llama, Mistral and Qwen3 don't
    o_bias: bool = False  # a bias on the attention's output projection, as gpt-oss has it
    # A learned logit a head that takes part in each of its softmaxes and has no value, as gpt-oss has it
    attention_sinks: bool = False
    use_qk_norm: bool = False  # RMSNorm over each head of q and k, as Qwen3 has it
    # Multi-head latent attention in place of grouped-query attention, as DeepSeek-V2 and V3 have it; null: none
    latent_attention: LatentAttentionConfig | None = None
    tie_word_embeddings: bool = False  # the output projection is the embedding
    # Between the matrices of dense layers, routed experts and shared experts alike.
    activation: Part = field(default_factory=lambda: {"name": "swiglu"})
    mlp_bias: bool = False  # biases on the matrices of those; a latent space's projections have none
    initializer_range: float = 0.02  # standard deviation of new weights
    moe: MoEConfig | None = None  # experts in place of the dense FFN; null: none

    @property
    def attention_head_dim(self) -> int:
        """Of a head of queries and keys."""
        if self.latent_attention is not None:
            return self.latent_attention.qk_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_head_dim(self) -> int:
        """Of that, what rotary embedding turns."""
        latent = self.latent_attention
        return self.attention_head_dim if latent is None else latent.qk_rope_head_dim

    def check(self, where: str = "model") -> None:
        """Raise ConfigError for dimensions that can't be built, naming the keys."""
        sizes = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
        )  # fmt: skip
        for key in sizes:
            value = getattr(self, key)
            most = MOST_LAYERS if key == "num_hidden_layers" else LARGEST_SIZE
            if not 1 <= value <= most:
                limit = "at least 1" if value < 1 else f"{most} at most"
                raise ConfigError(f"{where}.{key}: must be {limit}, not {value}")
        if self.head_dim is not None and not 1 <= self.head_dim <= LARGEST_SIZE:
            raise ConfigError(f"{where}.head_dim: must be in 1 .. {LARGEST_SIZE}, not {self.head_dim}")
        if self.initializer_range < 0:
            raise ConfigError(f"{where}.initializer_range: must not be negative, not {self.initializer_range}")
        if self.moe is not None and self.moe.expert_chunk is not None and self.moe.expert_chunk < 1:
            raise ConfigError(f"{where}.moe.expert_chunk: must be at least 1, not {self.moe.expert_chunk}")
        if self.latent_attention is not None:
            self._check_latent_attention(self.latent_attention, where)
        elif self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"{where}.num_attention_heads: {self.num_attention_heads} does not divide hidden_size "
                f"{self.hidden_size}; change one of them, or set {where}.head_dim"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{where}.num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.rotary_head_dim % 2:
            raise ConfigError(f"{where}.head_dim: rotary embedding needs an even one, not {self.rotary_head_dim}")
        widest = max(self.vocab_size, self.intermediate_size, self.num_attention_heads * self.attention_head_dim)
        if widest * self.hidden_size > LARGEST_MATRIX:
            raise ConfigError(
                f"{where}.hidden_size: {self.hidden_size} x {widest} numbers in one matrix are too many for any machine"
            )
        if self.rms_norm_eps <= 0 or self.rope_theta <= 1:
            raise ConfigError(f"{where}: rms_norm_eps must be positive and rope_theta greater than 1")
        if self.rope_scaling is not None:
            self.rope_scaling = as_part(self.rope_scaling)

    def _check_latent_attention(self, latent: LatentAttentionConfig, where: str) -> None:
        latent.check(f"{where}.latent_attention")
        odd = {
            "num_key_value_heads": (
                self.num_key_value_heads,
                self.num_attention_heads,
                "every head has keys of its own",
            ),
            "head_dim": (self.head_dim, None, "qk_nope_head_dim, qk_rope_head_dim and v_head_dim say it"),
            "qkv_bias": (self.qkv_bias, False, "latent_attention.attention_bias says it"),
            "o_bias": (self.o_bias, False, "latent_attention.attention_bias says it"),
            "use_qk_norm": (self.use_qk_norm, False, "it norms the latent vectors"),
            "attention_sinks": (self.attention_sinks, False, "no model has both, and its layers have none"),
        }
        for key, (found, right, why) in odd.items():
            if found != right:
                raise ConfigError(
                    f"{where}.{key}: must be {json.dumps(right)} with latent_attention, not {json.dumps(found)}: {why}"
                )
