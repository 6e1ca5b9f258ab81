"""The model's part of a config. Every dimension has Hugging Face's name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from moelab.errors import ConfigError

# So few that what is counted layer by layer ends, and that the bytes of one matrix are a number of 64 bits. The deepest
# published transformer has 1,000 layers (DeepNet, 2203.00555, abstract).
MOST_LAYERS, LARGEST_SIZE, LARGEST_MATRIX = 1024, 2**31 - 1, 2**48
Part = dict[str, Any]  # {name: ..., options}: what selects a plugin


@dataclass
class MoEConfig:
    """Which plugins make a layer sparse."""

    layout: Part = field(default_factory=lambda: {"name": "uniform"})
    router: Part = field(default_factory=lambda: {"name": "softmax_topk"})
    shared_expert: Part = field(default_factory=lambda: {"name": "none"})
    backend: Part = field(default_factory=lambda: {"name": "auto"})
    balance_losses: list[Part] = field(default_factory=list)
    expert_chunk: int | None = (
        None  # assignments a layer computes at once; more take longer, not more memory. None: all
    )
    allow_noncausal: bool = False  # let routers that look at later tokens into this decoder
    layers: dict[str, dict[str, Part]] = field(default_factory=dict)  # {"0": {router: ...}, "20-27": {...}}


@dataclass
class ModelConfig:
    """A Qwen2 decoder; dense when `moe` is null."""

    vocab_size: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING  # width of the dense FFN
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    moe: MoEConfig | None = None

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

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
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"{where}.num_attention_heads: {self.num_attention_heads} does not divide hidden_size "
                f"{self.hidden_size}; change one of them, or set {where}.head_dim"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{where}.num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.attention_head_dim % 2:
            raise ConfigError(f"{where}.head_dim: rotary embedding needs an even one, not {self.attention_head_dim}")
        widest = max(self.vocab_size, self.intermediate_size, self.num_attention_heads * self.attention_head_dim)
        if widest * self.hidden_size > LARGEST_MATRIX:
            raise ConfigError(
                f"{where}.hidden_size: {self.hidden_size} x {widest} numbers in one matrix are too many for any machine"
            )
        if self.rms_norm_eps <= 0 or self.rope_theta <= 1:
            raise ConfigError(f"{where}: rms_norm_eps must be positive and rope_theta greater than 1")
