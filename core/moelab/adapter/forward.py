"""One forward pass under transformers' conventions: its positions, masks and caches, told to our layers.

transformers itself is not imported here. B sequences, S new positions, P those a cache holds, D hidden size, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moelab.errors import ConfigError
from moelab.moe.routing import LayerRecord, RoutingOverride
from moelab.nn.transformer import LayerState, TokenContext, Transformer


class ForeignCache:
    """A cache of transformers as `Attention` asks ours: all keys and values in use, also of a cache of fixed length."""

    def __init__(self, cache: Any, past: int, seq: int, device: torch.device) -> None:
        self._cache = cache
        self._length = past + seq
        # transformers 4.57 wants to be told where a cache of fixed length is written; 5.x counts for itself.
        self._where = {"cache_position": torch.arange(past, past + seq, device=device)}

    def append(self, layer_id: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value [B, G, S, head_dim] -> [B, G, P + S, head_dim]."""
        keys, values = self._cache.update(key, value, layer_id, self._where)
        return keys[:, :, : self._length], values[:, :, : self._length]


class NoIds:
    """Stands where token ids would: whoever reads it is told what is missing."""

    def reshape(self, *shape: int) -> NoIds:
        """Itself, in any shape."""
        return self

    def __getattr__(self, name: str) -> Any:
        raise ConfigError("inputs_embeds: a router of this model reads token ids; give input_ids")

    @classmethod
    def __torch_function__(cls, *call: Any, **keywords: Any) -> Any:
        return cls().shape


class Shown:
    """Attention that keeps its weights, as transformers' eager one computes them."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []  # [B, H, S, P + S] of each layer

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None = None
    ) -> Tensor:
        """query [B, H, S, d], key and value [B, G, P + S, d] -> [B, H, S, d]. Weights of sinks [H] aren't kept."""
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        seq, length = scores.shape[-2:]
        if mask is None:
            mask = torch.ones(seq, length, dtype=torch.bool, device=scores.device).tril(length - seq)
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(len(scores), -1, seq, -1)], -1)
        weights = scores.softmax(-1, dtype=torch.float32)[..., :length]
        self.weights.append(weights.to(query.dtype))
        return self.weights[-1] @ value


@dataclass(frozen=True)
class Inputs:
    """What a forward pass of transformers is given; `embeddings` in place of ids."""

    input_ids: Tensor | None  # [B, S] int64
    embeddings: Tensor | None  # [B, S, D]
    mask: Tensor | None  # [B, P + S] 1 or True for real tokens; or [B, 1, S, P + S] as attention wants it
    position_ids: Tensor | None  # [B or 1, S]; None: those that follow the cache's
    cache: Any  # of transformers, or None
    noise: torch.Generator | None = None  # of routers that draw; None: torch's global stream
    override: RoutingOverride | None = None  # sends tokens elsewhere than their routers would


@dataclass(frozen=True)
class Passed:
    """What the layers gave."""

    hidden: Tensor  # [B, S, D] after the last norm
    records: list[LayerRecord]
    states: tuple[Tensor, ...]  # before each layer and after the last norm; empty where not asked for
    attentions: tuple[Tensor, ...]  # [B, H, S, P + S] of each layer; empty where not asked for


def start(decoder: Transformer, given: Inputs) -> LayerState:
    """What stands before the first layer. Raises ValueError for a mask of another length than cache and ids have."""
    x = decoder.embed_tokens(given.input_ids) if given.embeddings is None else given.embeddings
    batch, seq = x.shape[:2]
    past = 0 if given.cache is None else int(given.cache.get_seq_length())
    positions = given.position_ids
    if positions is None:
        positions = torch.arange(past, past + seq, device=x.device)[None]
    positions = positions.expand(batch, seq)
    whole, padding = _masks(given.mask, seq, past, x.device)
    document_id = None
    if given.mask is None and past == 0 and given.position_ids is not None:
        document_id = _packed(positions)
    if document_id is not None:
        document_id = document_id + seq * torch.arange(batch, device=x.device)[:, None]
    cache = None if given.cache is None else ForeignCache(given.cache, past, seq, x.device)
    ids: Any = NoIds() if given.input_ids is None else given.input_ids
    inputs = decoder.attention_inputs(
        x, positions, past=past, padding=padding, documents=document_id, given_mask=whole, cache=cache
    )
    real = None if padding is None else padding[:, past:]
    tokens = TokenContext(document_id=document_id, generator=given.noise, routing_override=given.override)
    return LayerState(x, inputs, decoder.token_info(ids, positions, real, tokens), [])


def run(decoder: Transformer, state: LayerState, *, states: bool = False, attentions: bool = False) -> Passed:
    """All layers and the last norm."""
    seen: list[Tensor] = []
    shown = Shown()
    if attentions:
        state = replace(state, inputs=replace(state.inputs, attend=shown))
    if states:
        for index in range(len(decoder.layers)):
            seen.append(state.x)
            state = decoder.run_layers(state, index, index + 1)
    else:
        state = decoder.run_layers(state)
    hidden = decoder.norm(state.x)
    return Passed(hidden, state.records, (*seen, hidden) if states else (), tuple(shown.weights))


def _masks(mask: Tensor | None, seq: int, past: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """-> what attention sees [B, 1, S, P + S], where it is said so, and which tokens are real [B, P + S]; None: all."""
    if mask is not None and mask.dim() == 4:
        if mask.shape[-2] != seq or mask.shape[-1] < past + seq:
            raise ValueError(
                f"attention_mask: its last two sizes must be {seq} and {past + seq}, not {tuple(mask.shape[-2:])}"
            )
        return mask[..., : past + seq], None
    if mask is not None and (mask.dim() != 2 or mask.shape[1] < past + seq):
        raise ValueError(
            f"attention_mask: must be [batch, {past + seq}], {past} cached positions and {seq} new ones, not "
            f"{tuple(mask.shape)}"
        )
    if mask is not None:
        mask = mask[:, : past + seq].to(device=device, dtype=torch.bool)
        if device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
            mask = None  # known at no cost, and attention without a mask is the quicker one
    return None, mask


def _packed(positions: Tensor) -> Tensor | None:
    """positions [B, S] -> which document each stands in [B, S], counted from 0; None where there is one alone.

    As transformers finds sequences packed into one row: a position that does not follow the one before it begins
    another (masking_utils.py, find_packed_sequence_indices).
    """
    begins = torch.zeros_like(positions)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return begins.cumsum(1) if bool(begins.any()) else None
