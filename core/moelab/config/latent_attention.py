"""The config of multi-head latent attention: keys and values of all heads come from one narrow vector a token."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from moelab.errors import ConfigError

LARGEST = 1 << 20  # of each size; the largest published one is q_lora_rank 1536


@dataclass
class LatentAttentionConfig:
    """Sizes under Hugging Face's names (DeepSeek-V2, 2405.04434, 2.1); each must be said but for the queries' rank."""

    kv_lora_rank: int = MISSING  # width of the latent vector of keys and values, which alone a cache keeps
    q_lora_rank: int | None = None  # width of the queries' own latent vector; null: they come from the token's state
    qk_nope_head_dim: int = MISSING  # of a head of queries and keys, what has no position
    qk_rope_head_dim: int = MISSING  # and what rotary embedding turns; of the keys all heads share it
    v_head_dim: int = MISSING  # of a head of values
    rope_interleave: bool = True  # turned are neighbours (0, 1), (2, 3) of a head, as DeepSeek stores them; or halves
    attention_bias: bool = False  # biases where the token's state comes in (not on q_proj) and the heads go out

    @property
    def qk_head_dim(self) -> int:
        """Of a whole head of queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def check(self, where: str) -> None:
        """Raise ConfigError for sizes that can't be, naming the key."""
        for key in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            value = getattr(self, key)
            if value is None:  # the queries' rank
                continue
            if not 1 <= value <= LARGEST:
                raise ConfigError(f"{where}.{key}: must be in 1 .. {LARGEST}, not {value}")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"{where}.qk_rope_head_dim: rotary embedding needs an even one, not {self.qk_rope_head_dim}"
            )
