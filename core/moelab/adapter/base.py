"""What our models are to transformers, whatever stands on them: weights, embeddings, gradients, one forward pass.

Works with transformers 4.57 and 5.x (docs/judges.md says what was run).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast

from moelab.adapter.config import MoelabConfig
from moelab.adapter.folders import is_ours, read_folder
from moelab.adapter.forward import Inputs, Passed, run, start
from moelab.builder import build_model
from moelab.errors import CheckpointError, ConfigError
from moelab.moe.block import MoEBlock
from moelab.moe.routing import LayerRecord, RoutingOverride
from moelab.nn.transformer import DecoderLayer, Transformer
from moelab.registry import Registry
from moelab.seeds import generator

CACHE_LINE = 64  # bytes; torch's own CPU memory begins on one
VERSION = int(transformers.__version__.partition(".")[0])


class CheckpointedLayer(GradientCheckpointingLayer, DecoderLayer):
    """A decoder layer that transformers may compute a second time in the backward pass; else the same."""


class Backbone:
    """`base_model` of ours as transformers' trainers call it: the layers and the last norm, under its conventions.

    Not a module, since the parameters are the `Transformer`'s, under its names; what else is asked, that one answers.
    """

    def __init__(self, owner: MoelabPreTrainedModel) -> None:
        self._owner = owner

    def __call__(self, input_ids: Tensor | None = None, **kwargs: Any) -> MoeModelOutputWithPast:
        """input_ids [B, S], and what `MoelabForCausalLM.forward` takes -> last_hidden_state [B, S, D] and the rest."""
        passed, cache = self._owner.passed(input_ids, **kwargs)
        return MoeModelOutputWithPast(
            last_hidden_state=passed.hidden,
            past_key_values=cache,
            hidden_states=passed.states or None,
            attentions=passed.attentions or None,
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._owner.model, name)


class MoelabPreTrainedModel(PreTrainedModel):
    """`model` is the `moelab.nn.transformer.Transformer`; nothing of it is copied.

    Attention is ours whatever `attn_implementation` says ("eager" or "sdpa"; others are refused by transformers).
    `on_records` is told the records of the MoE layers of each forward pass: balance losses, loads and routes come from
    them, whoever computes the loss.
    """

    config_class = MoelabConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(
        self, config: MoelabConfig, decoder: Transformer | None = None, *, registry: Registry | None = None
    ) -> None:
        """`decoder`: what to wrap, its weights left as they are; None: one is built, initialised by seed 0."""
        super().__init__(config)
        if decoder is None:
            device = torch.get_default_device()
            dtype = torch.get_default_dtype()
            decoder = build_model(config.model_config(), registry, device=device, seed=0).to(dtype)
        for layer in decoder.layers:
            if type(layer) is DecoderLayer:
                layer.__class__ = CheckpointedLayer  # the same object: parameters, names and hooks stay
        self.model = decoder
        self.on_records: Callable[[Sequence[LayerRecord]], None] | None = None
        self.noise: torch.Generator | None = None  # what routers that draw draw from; None: torch's global stream
        self.override: RoutingOverride | None = None  # sends tokens elsewhere than their routers would; None: nobody
        self._built_empty = any(parameter.is_meta for parameter in decoder.parameters())
        self.vocab_size = config.vocab_size
        self._registry = registry
        self._constants: dict[str, Tensor] | None = None  # buffers as constructors make them, when first needed

    @property
    def base_model(self) -> Any:
        """The layers without a head, called as transformers calls them."""
        return Backbone(self)

    def passed(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **unused: Any,
    ) -> tuple[Passed, Cache | None]:
        """All layers and the last norm, told to `on_records`; and the cache that holds what they computed."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give exactly one of them")
        cache = self._cache_to_use(past_key_values, use_cache)
        passed = run(
            self.model,
            start(
                self.model,
                Inputs(input_ids, inputs_embeds, attention_mask, position_ids, cache, self.noise, self.override),
            ),
            states=self._asked(output_hidden_states, "output_hidden_states"),
            attentions=self._asked(output_attentions, "output_attentions"),
        )
        if self.on_records is not None:
            self.on_records(passed.records)
        return passed, cache

    def _asked(self, said: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name, False) if said is None else said)

    def _cache_to_use(self, past: Cache | None, use_cache: bool | None) -> Cache | None:
        if past is not None and not isinstance(past, Cache):
            raise ValueError(f"past_key_values: must be a transformers Cache, not {type(past).__name__}")
        if use_cache is None:  # a training step has no use for one, and it would keep keys and values alive
            use_cache = self.config.use_cache and not self.training
        if use_cache and past is None and not (self.training and self.is_gradient_checkpointing):
            return DynamicCache()
        return past

    # --- what transformers asks of a model -------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value  # type: ignore[assignment]

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers does it. Raises ConfigError where a router has a row for each token id."""
        if new_num_tokens is not None and new_num_tokens != self.config.vocab_size:
            self._refuse_tables()
        resized: nn.Embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.model.config = dataclasses.replace(self.model.config, vocab_size=self.config.vocab_size)
        return resized

    def _refuse_tables(self) -> None:
        blocks = [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, MoEBlock)]
        for block in blocks:
            router: Any = block.router
            for name, tensor in (*router.named_buffers(), *router.named_parameters()):
                if tensor.dim() > 0 and tensor.shape[0] == self.config.vocab_size != block.layout.num_experts:
                    raise ConfigError(
                        f"resize_token_embeddings: {name} of layer {block.layer_id}'s router has a row for each of the "
                        f"{self.config.vocab_size} token ids, and only the router knows what new ones would be; use "
                        "one that reads no ids"
                    )

    def init_weights(self) -> None:
        """Only ties, since a decoder is built with its weights or loaded; one built on the meta device is filled."""
        if self._built_empty and not any(parameter.is_meta for parameter in self.parameters()):
            super().init_weights()
        else:
            self.tie_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What a folder lacks, as a new model has it; transformers names such tensors in a warning."""
        self._init_buffers(module)
        own = [p for p in module.parameters(recurse=False) if not getattr(p, "_is_hf_initialized", False)]
        if not own:
            return
        custom = getattr(module, "initialise", None)
        if callable(custom) and len(own) == len(list(module.parameters(recurse=False))):
            custom(generator(0, "init", type(module).__name__))
        elif isinstance(module, nn.Linear | nn.Embedding) or "RMSNorm" in type(module).__name__:
            super()._init_weights(module)
        else:
            for parameter in own:
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, 0.0, self.config.initializer_range)
        finish = getattr(module, "after_initialise", None)
        if callable(finish):
            finish()

    def _init_buffers(self, module: nn.Module) -> None:
        """What only the constructor knows: a folder without it, or a model begun on the meta device, gets it anew."""
        lacking = [
            (name, buffer)
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.device.type != "meta" and not getattr(buffer, "_is_hf_initialized", False)
        ]
        if not lacking:
            return
        if self._constants is None:  # its parameters are not touched, so they take no memory
            fresh = build_model(self.config.model_config(), self._registry, seed=None)
            self._constants = dict(fresh.named_buffers())
        path = next(name for name, other in self.model.named_modules() if other is module)
        for name, buffer in lacking:
            buffer.copy_(self._constants[f"{path}.{name}"])

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        """Never the reentrant kind, which would cut the routers' records off from the gradient."""
        func = functools.partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, func, **kwargs)

    @classmethod
    def of(cls, model: Transformer, **fields: Any) -> Any:
        """On `model` itself, in the mode it is in; `fields`: of `MoelabConfig`, beside the model's.

        It goes by the folder it was read from, in which TRL looks for its reference and PEFT for what it adapts.
        """
        told = {"architectures": [cls.__name__], "name_or_path": str(model.folder or "")}
        config = MoelabConfig.of(model.config, dtype=model.embed_tokens.weight.dtype, **told | fields)
        return cls(config, model).train(model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Of a run folder, a moelab checkpoint, a Hugging Face folder of Qwen2 or what `save_pretrained` wrote.

        `registry`, `trust`: as `moelab.load` takes them. Raises CheckpointError naming the file and the cure.
        """
        if is_ours(pretrained_model_name_or_path):
            fields = {name: kwargs.pop(name) for name in ("num_labels", "pad_token_id") if name in kwargs}
            adapted = cls.of(read_folder(Path(pretrained_model_name_or_path), kwargs), **fields)
            adapted.name_or_path = adapted.config.name_or_path = str(pretrained_model_name_or_path)
            told: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
            return (adapted, told | {"error_msgs": []}) if kwargs.get("output_loading_info") else adapted
        if not kwargs.setdefault("use_safetensors", True):
            raise CheckpointError("use_safetensors: other files of weights are programs (pickle); they aren't read")
        kwargs.pop("trust", None)
        if kwargs.get("registry", 0) is None:
            kwargs.pop("registry")
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        _align(found[0] if isinstance(found, tuple) else found)
        return found


def _align(model: nn.Module) -> None:
    """Move what lies mapped from a file to memory of its own, where it does not begin on a cache line.

    A tensor in a file begins wherever the header's length puts it, and a CPU's kernels may sum in another order then:
    logits of the same weights differed in the last bits.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % CACHE_LINE:
            parameter.data = parameter.data.clone()
