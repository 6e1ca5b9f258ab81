"""`MoelabForCausalLM`: a model of moelab inside transformers' `PreTrainedModel`, with any router, dense ones too.

Its config.json holds the model's part of a moelab config under model_type "moelab". A folder is data here as
everywhere: its weights are safetensors or not read, its plugins the installed ones or those that the caller names.
Works with transformers 4.57 and 5.x (docs/judges.md says what was run).
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from moelab.adapter.folders import MODEL_TYPE, is_ours, read_folder
from moelab.adapter.forward import Inputs, run, start
from moelab.builder import build_model
from moelab.config.model import ModelConfig
from moelab.config.typed import Typing
from moelab.errors import CheckpointError, ConfigError, UserError
from moelab.moe.block import MoEBlock
from moelab.nn.loss import IGNORE_INDEX, logits_and_cross_entropy
from moelab.nn.transformer import DecoderLayer, Transformer
from moelab.registry import Registry
from moelab.seeds import generator

EMBEDDING, HEAD = "model.embed_tokens.weight", "model.lm_head.weight"
# Name in config.json -> field of ModelConfig. transformers 5 takes `rope_scaling` for itself and rewrites it.
RENAMED = {"rope_scaling": "stretched_wavelengths"}
STORED = {RENAMED.get(field.name, field.name): field.name for field in dataclasses.fields(ModelConfig)}
SAID_TO_LOSS = {"shift_labels", "num_items_in_batch", "cache_position"}  # of forward's other arguments
VERSION = int(transformers.__version__.partition(".")[0])


class MoelabConfig(PretrainedConfig):
    """The fields of `ModelConfig`, named as there but for RENAMED; `moe` is the plain tree of a config file.

    The defaults are of a toy, since transformers wants every config to have some.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (as transformers reads it)

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
        use_qk_norm: bool = False,
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


class CheckpointedLayer(GradientCheckpointingLayer, DecoderLayer):
    """A decoder layer that transformers may compute a second time in the backward pass; else the same."""


class MoelabForCausalLM(PreTrainedModel, GenerationMixin):
    """`model` is the `moelab.nn.transformer.Transformer`; nothing of it is copied.

    Balance losses are the trainer's, so `loss` is the cross-entropy alone. Attention is ours whatever
    `attn_implementation` says ("eager" or "sdpa"; others are refused by transformers).
    """

    config_class = MoelabConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _tied_weights_keys = {HEAD: EMBEDDING} if VERSION >= 5 else [HEAD]

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
        self._built_empty = any(parameter.is_meta for parameter in decoder.parameters())
        self.vocab_size = config.vocab_size
        self._registry = registry
        self._constants: dict[str, Tensor] | None = None  # buffers as constructors make them, when first needed
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids [B, S] or inputs_embeds [B, S, D] -> logits [B, S, V], or the last `logits_to_keep` of them.

        attention_mask [B, P + S] or [B, 1, S, P + S]; position_ids [B, S], and where they begin anew without a mask,
        as sequences packed into one; labels [B, S], shifted here, -100 ignored. Padding is left out of what
        routers count. Raises ValueError, naming the argument, for what contradicts itself.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give exactly one of them")
        cache = self._cache_to_use(past_key_values, use_cache)
        passed = run(
            self.model,
            start(self.model, Inputs(input_ids, inputs_embeds, attention_mask, position_ids, cache)),
            states=self._asked(output_hidden_states, "output_hidden_states"),
            attentions=self._asked(output_attentions, "output_attentions"),
        )
        logits, loss = self._judged(passed.hidden, labels, logits_to_keep, kwargs)
        router_logits = tuple(r.routing.logits for r in passed.records if r.routing.logits is not None)
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=passed.states or None,
            attentions=passed.attentions or None,
            router_logits=(router_logits or None) if output_router_logits else None,
        )
        return output if self._asked(return_dict, "return_dict") else output.to_tuple()

    def _judged(
        self, hidden: Tensor, labels: Tensor | None, keep: int | Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and loss: by transformers' own function, or with the same numbers by ours, which costs less."""
        head, shifted = self.model.lm_head, kwargs.get("shift_labels")
        plain = (
            type(head) is nn.Linear and head.bias is None and not head._forward_hooks and not head._forward_pre_hooks
        )
        if labels is None or not plain or not isinstance(keep, int) or keep or set(kwargs) - SAID_TO_LOSS:
            logits = head(hidden[:, slice(-keep, None) if isinstance(keep, int) else keep])
            if labels is None:
                return logits, None
            return logits, self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) if shifted is None else shifted
        logits, nats = logits_and_cross_entropy(hidden, head.weight, targets.to(hidden.device))
        count = kwargs.get("num_items_in_batch")
        if count is None:
            count = (targets != IGNORE_INDEX).sum()
        return logits, nats.sum() / (count.to(nats.device) if isinstance(count, Tensor) else count)

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

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.lm_head = new_embeddings  # type: ignore[assignment]

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
    def wrap(cls, model: Transformer) -> MoelabForCausalLM:
        """`model` itself, in the mode it is in, told where its texts end if its folder says so."""
        adapted = cls(MoelabConfig.of(model.config, dtype=model.embed_tokens.weight.dtype), model)
        adapted.train(model.training)
        try:
            speech = model.speech() if callable(model.speech) else model.speech
        except UserError:  # a folder without a tokenizer
            speech = None
        if speech is not None:
            model.speech = speech
            ends = list(speech.end_token_ids)
            adapted.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
            adapted.generation_config.pad_token_id = ends[0]
        return adapted

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Of a run folder, a moelab checkpoint, a Hugging Face folder of Qwen2 or what `save_pretrained` wrote.

        `registry`, `trust`: as `moelab.load` takes them. Raises CheckpointError naming the file and the cure.
        """
        if is_ours(pretrained_model_name_or_path):
            adapted = cls.wrap(read_folder(Path(pretrained_model_name_or_path), kwargs))
            adapted.name_or_path = str(pretrained_model_name_or_path)
            told: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
            return (adapted, told | {"error_msgs": []}) if kwargs.get("output_loading_info") else adapted
        if not kwargs.setdefault("use_safetensors", True):
            raise CheckpointError("use_safetensors: other files of weights are programs (pickle); they aren't read")
        kwargs.pop("trust", None)
        if kwargs.get("registry", 0) is None:
            kwargs.pop("registry")
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
