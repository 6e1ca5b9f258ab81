"""The decoder: embed, layers, norm, head. Dense models and those with experts differ only in their `mlp`s.

B sequences, S positions, T = B * S tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelab.config.model import ModelConfig
from moelab.data.tokenizer import Tokenizer, load_tokenizer
from moelab.errors import ConfigError
from moelab.moe.block import MoEBlock
from moelab.moe.routing import LayerRecord, RoutingOverride, TokenInfo
from moelab.nn.attention import Attention
from moelab.nn.attention_inputs import AttentionInputs, AttentionKernel, run_starts
from moelab.nn.full_attention import FullAttention
from moelab.nn.kv_cache import KVCache
from moelab.nn.latent_attention import LatentAttention
from moelab.nn.loss import token_cross_entropy
from moelab.nn.mlp import MLP
from moelab.nn.norm import RMSNorm
from moelab.nn.reach import Positional
from moelab.nn.rope import Rope, RopeScaling
from moelab.nn.texts import Speech, continue_texts
from moelab.plugin_faults import PluginPart


@dataclass(frozen=True)
class ModelOutput:
    """`logits` without targets, `token_loss` with them."""

    logits: Tensor | None  # [B, S, V]
    token_loss: Tensor | None  # [B, S] fp32, nats; 0 where the target is ignored
    records: list[LayerRecord]  # of the MoE layers, in order


@dataclass(frozen=True)
class TokenContext:
    """Optional facts about the tokens of a batch, for routers; all tensors [B, S]."""

    document_id: Tensor | None = None
    domain_id: Tensor | None = None
    generator: torch.Generator | None = None
    measure: bool = False  # records hold the norms of the layers' outputs
    routing_override: RoutingOverride | None = None  # sends tokens elsewhere than their routers would
    attention_id: Tensor | None = None  # attention and positions stay among equal neighbours; None: one a sequence


@dataclass(frozen=True)
class LayerState:
    """What stands between two layers: from here the rest of the model can be run again, and differently."""

    x: Tensor  # [B, S, D]
    inputs: AttentionInputs
    info: TokenInfo
    records: list[LayerRecord]  # of the MoE layers below, in order


class _Embedding(nn.Embedding):
    """On the meta device nothing is drawn: torch imports sympy to know that a drawn tensor has its own shape (1 s)."""

    def reset_parameters(self) -> None:
        """N(0, 1), until the model's own rule."""
        if self.weight.device.type != "meta":
            super().reset_parameters()


def attention_of(config: ModelConfig, layer_id: int) -> Attention | LatentAttention:
    """The attention of a layer that the config says."""
    sizes = config.latent_attention
    return Attention(config, layer_id) if sizes is None else LatentAttention(config, sizes, layer_id)


class DecoderLayer(nn.Module):
    """Pre-norm residual layer."""

    def __init__(self, config: ModelConfig, layer_id: int, mlp: MLP | MoEBlock) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention_of(config, layer_id)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x: Tensor, inputs: AttentionInputs, info: TokenInfo) -> tuple[Tensor, LayerRecord | None]:
        """x [B, S, D] -> [B, S, D], and the record of a sparse layer."""
        x, normed = self.attend(x, inputs)
        if isinstance(self.mlp, MoEBlock):
            y, record = self.mlp(normed.flatten(0, 1), info)
            return x + y.view_as(x), record
        return x + self.mlp(normed), None

    def attend(self, x: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """x [B, S, D] -> with attention added, and that normed."""
        x = x + self.self_attn(self.input_layernorm(x), inputs)
        return x, self.post_attention_layernorm(x)


class Transformer(nn.Module):
    """A causal language model. Layers are handed in ready-made by `moelab.build`."""

    def __init__(
        self,
        config: ModelConfig,
        mlps: list[MLP | MoEBlock],
        kernels: Sequence[AttentionKernel | None] | None = None,
        scaling: RopeScaling | None = None,
    ) -> None:
        """`kernels`: of each layer's attention, None for full; `scaling`: of the rotary embedding, None for plain."""
        super().__init__()
        self.config = config
        self.recompute_logits: bool | None = None  # for the loss's backward pass; None: beyond a number of them
        self.speech: Callable[[], Speech] | Speech | None = None  # read when first asked; None: nobody knows
        self.folder: Path | None = None  # whose weights these were when they were read; None: of no folder
        self.embed_tokens: nn.Embedding = _Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, mlp) for i, mlp in enumerate(mlps))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.take_positions(config, kernels or [None] * config.num_hidden_layers, scaling)

    def take_positions(
        self, config: ModelConfig, kernels: Sequence[AttentionKernel | None], scaling: RopeScaling | None
    ) -> None:
        """Compute with these from now on, as `config` says: `moelab.builder.reposition` makes them."""
        self.config = config
        self.rope = Rope(config.rotary_head_dim, config.rope_theta, scaling)
        attentions = [module for module in self.modules() if isinstance(module, Attention | LatentAttention)]
        for attention, kernel in zip(attentions, kernels, strict=True):
            attention.take(kernel or FullAttention(attention.layer_id), scaling)
        self.positional = Positional(attentions, scaling, config.max_position_embeddings)

    def tie_weights(self) -> None:
        """Make head and embedding one parameter where the config says so; `to_empty` parts them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def plugin_parts(self) -> list[tuple[PluginPart, object]]:
        """Who to blame for what a router, backend or shared expert raises outside a forward pass."""
        blocks = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoEBlock)]
        return [part for block in blocks for part in block.plugin_parts()]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        tokens: TokenContext | None = None,
        head: bool = True,
    ) -> ModelOutput:
        """input_ids [B, S] int64 -> logits [B, S, V], or with targets [B, S] (-100 ignored) the loss of each token.

        attention_mask [B, S]: 1 or True for real tokens. With a `cache`, the positions continue those stored.
        Without the `head` neither is computed: records alone.
        """
        x, records = self.hidden_states(input_ids, attention_mask, cache=cache, tokens=tokens)
        if not head:
            return ModelOutput(None, None, records)
        if targets is None:
            return ModelOutput(self.lm_head(x), None, records)
        return ModelOutput(
            None, token_cross_entropy(x, self.lm_head.weight, targets, recompute=self.recompute_logits), records
        )

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int | None = None,
        *,
        samples: int | None = None,
        batch_size: int | None = None,
        tokenizer: Tokenizer | str | None = None,
        **settings: Any,
    ) -> Any:
        """Each prompt with its continuation, as `moelab generate` writes it: one text for one, a list for several.

        With `samples` a list of so many in place of each text. `settings`: `nn.sampling.Sampling`'s (temperature,
        top_k, top_p, min_p, repetition_penalty, stop, seed); what isn't given is as generation_config.json says.
        A text doesn't hang on `batch_size`, nor on its neighbours, but on its place among the prompts.
        `tokenizer`: "bytes", the path of a tokenizer.json, or one; None: that of the folder which `moelab.load` read.
        Raises ConfigError where nobody knows one and for settings without sense, CheckpointError where weights are
        damaged.
        """
        speech = self.speech_by(tokenizer)
        sampling = speech.sampling({"max_new_tokens": max_new_tokens, **settings})
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = continue_texts(self, prompts, speech, sampling, samples=samples or 1, batch_size=batch_size)
        answers = [each[0] if samples is None else each for each in texts]
        return answers[0] if isinstance(prompt, str) else answers

    def speech_by(self, tokenizer: Tokenizer | str | None) -> Speech:
        """By a tokenizer, "bytes" or the path of one; None: that of the folder which `moelab.load` read.

        Raises ConfigError where nobody knows one.
        """
        if tokenizer is not None:
            chosen = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
            return Speech(chosen, (chosen.eos_token_id,))
        if self.speech is None:
            raise ConfigError(
                "generate: this model was built, not loaded, so its tokenizer isn't known; give tokenizer='bytes' or a "
                "tokenizer.json"
            )
        self.speech = speech = self.speech if isinstance(self.speech, Speech) else self.speech()
        return speech

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        tokens: TokenContext | None = None,
    ) -> tuple[Tensor, list[LayerRecord]]:
        """The normed output of the last layer, [B, S, D], and the records; no logits."""
        state = self.run_layers(self.embed(input_ids, attention_mask, cache=cache, tokens=tokens))
        return self.norm(state.x), state.records

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        tokens: TokenContext | None = None,
    ) -> LayerState:
        """What stands before the first layer."""
        batch, seq = input_ids.shape
        past = cache.length if cache is not None else 0
        mask = None if attention_mask is None else attention_mask.bool()
        seen = mask if cache is None or mask is None else cache.extend_mask(mask)
        position_ids = torch.arange(past, past + seq, device=input_ids.device).expand(batch, seq)
        tokens = tokens or TokenContext()
        documents = tokens.attention_id
        if documents is None and seen is not None:  # a text begins behind the padding on its left
            position_ids = (position_ids - seen.int().argmax(1, keepdim=True)).clamp(min=0)
        if documents is not None:
            if cache is not None:
                documents = cache.extend_documents(documents)
            position_ids = position_ids - run_starts(documents)[:, past:]
        x = self.embed_tokens(input_ids)
        if torch.is_autocast_enabled(x.device.type):  # which narrows products, not what layers add up
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        inputs = self.attention_inputs(x, position_ids, past=past, padding=seen, documents=documents, cache=cache)
        return LayerState(x, inputs, self.token_info(input_ids, position_ids, mask, tokens), [])

    def attention_inputs(self, x: Tensor, positions: Tensor, *, past: int, **more: Any) -> AttentionInputs:
        """What the layers' attention shares. ConfigError for a cache of another mode; told once: a text too long."""
        self.positional.check(past + positions.shape[1])
        cache = more.get("cache")
        if isinstance(cache, KVCache):
            cache.take_mode(self.positional.cache_mode(self.config.rope_scaling))
        return AttentionInputs(self.rope, positions, x.dtype, past, **more)

    def run_layers(self, state: LayerState, first: int = 0, last: int | None = None) -> LayerState:
        """Layers `first` .. `last` - 1 on what stands before them; None: to the end. The state given stays as it is."""
        x, info, records = state.x, state.info, list(state.records)
        for layer in islice(self.layers, first, last):
            x, record = layer(x, state.inputs, info)
            if record is not None:
                records.append(record)
                info = replace(info, previous=record.routing)
        return LayerState(x, state.inputs, info, records)

    def token_info(
        self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, tokens: TokenContext
    ) -> TokenInfo:
        """What routers may know of tokens; all [B, S], ids and positions int64, mask bool."""
        batch, seq = position_ids.shape
        sequence_id = torch.arange(batch, device=position_ids.device)[:, None].expand(batch, seq).reshape(-1)
        zeros = torch.zeros_like(sequence_id)
        return TokenInfo(
            token_id=input_ids.reshape(-1),
            document_id=sequence_id if tokens.document_id is None else tokens.document_id.reshape(-1),
            domain_id=zeros if tokens.domain_id is None else tokens.domain_id.reshape(-1),
            position=position_ids.reshape(-1),
            sequence_id=sequence_id,
            mask=None if mask is None else mask.reshape(-1),
            training=self.training,
            generator=tokens.generator,
            num_sequences=batch,
            measure=tokens.measure,
            routing_override=tokens.routing_override,
        )
