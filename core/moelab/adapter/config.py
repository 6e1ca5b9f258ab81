"""`MoelabConfig`: the model's part of a moelab config, as transformers keeps configs."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

from transformers import PretrainedConfig

from moelab.adapter.folders import MODEL_TYPE
from moelab.config.model import ModelConfig
from moelab.config.typed import Typing

# Name in config.json -> field of ModelConfig. transformers 5 takes `rope_scaling` for itself and rewrites it.
RENAMED = {"rope_scaling": "stretched_wavelengths"}
STORED = {RENAMED.get(field.name, field.name): field.name for field in dataclasses.fields(ModelConfig)}


class MoelabConfig(PretrainedConfig):
    """The fields of `ModelConfig`, named as there but for RENAMED; `moe` is the plain tree of a config file.

    The defaults are of a toy, since transformers wants every config to have some.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (as transformers reads it)
    # No code of a folder's own; TRL asks so of every architecture that transformers itself doesn't have.
    auto_map = MappingProxyType({})  # type: ignore[var-annotated]

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 64,
        intermediate_size: int = 128,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int | None = None,
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1_000_000.0,
        stretched_wavelengths: dict[str, Any] | None = None,
        attention: dict[str, Any] | None = None,
        activation: dict[str, Any] | None = None,
        mlp_bias: bool = False,
        qkv_bias: bool = True,
        o_bias: bool = False,
        attention_sinks: bool = False,
        use_qk_norm: bool = False,
        latent_attention: dict[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        initializer_range: float = 0.02,
        moe: dict[str, Any] | None = None,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        activation = activation or ModelConfig().activation
        if latent_attention is None:
            head_dim = head_dim or hidden_size // num_attention_heads  # caches of transformers read it
        given = dict(locals())
        for name in STORED:
            setattr(self, name, given[name])
        self.use_cache = use_cache
        ids = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **ids, **kwargs)
        for name, value in ids.items():
            setattr(self, name, value)

    @classmethod
    def of(cls, config: ModelConfig, **kwargs: Any) -> MoelabConfig:
        """The config of a model that was built."""
        tree = dataclasses.asdict(config)
        return cls(**{name: tree[field] for name, field in STORED.items()}, **kwargs)

    def model_config(self) -> ModelConfig:
        """What `moelab.build` takes. Raises ConfigError naming the key of config.json that is wrong."""
        config = Typing(settled=True).build(ModelConfig, {field: getattr(self, name) for name, field in STORED.items()})
        config.check("config.json")
        return config
