"""One more token for each of several texts: the layers as generation needs them, over a cache.

Without records, and the head on one position alone. Where the attention is the plain kind (`FullAttention`, nothing
wrapped around its parts) it is computed here in a dozen operations: one product for query, key and value, tables of the
rotary embedding made once, keys written where they stay. Any other attention is called as in a forward pass, and a
model whose layers have hooks, or that computes under autocast, goes through its own forward pass as a whole.
B sequences, L positions with the new one, D hidden size, H query heads in G groups, d head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moelab.config.model import ModelConfig
from moelab.moe.block import MoEBlock
from moelab.moe.few_rows import ExpertTables, reading
from moelab.moe.routing import LayerRecord, Routing, TokenInfo
from moelab.moe.thin_product import PackedWeights, few_product, few_product_onto
from moelab.nn.attention import Attention
from moelab.nn.attention_inputs import AttentionInputs
from moelab.nn.full_attention import FullAttention, fastest
from moelab.nn.kv_cache import KVCache
from moelab.nn.linear import Linear, hooked
from moelab.nn.mlp import MLP
from moelab.nn.norm import RMSNorm
from moelab.nn.rope import Rope
from moelab.plugin_faults import PluginPart

FUSED_BYTES = 1 << 22  # of a layer's query, key and value matrices: up to here a copy as one costs less than two calls
COPY_BYTES = 1 << 29  # of all copies
COPY_TOKENS = (
    128  # of all texts: from here a copy of the experts' gate_up is made, which a token reads in half the time
)
TURNED_TOKENS = 64  # of a text that is alone: from here other matrices are turned
PACKED_TOKENS = 32  # of several: from here these are packed ...
PACKED_ROWS = 3  # ... those of fewer than PACKED_ALONE elements, where so many texts go on together
PACKED_ALONE = 1 << 20
PRODUCTS = 8  # texts times groups, from which two products for all heads serve; see `attended`
WIDE = (torch.float32, torch.float64)


class Decoder(Protocol):
    """What generating asks of a model: `nn.transformer.Transformer` is one."""

    config: ModelConfig
    training: bool
    rope: Rope
    embed_tokens: nn.Embedding
    layers: nn.ModuleList  # of `DecoderLayer`s
    norm: RMSNorm
    lm_head: nn.Linear

    def train(self, mode: bool = True) -> Any: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def plugin_parts(self) -> list[tuple[PluginPart, object]]: ...

    def attention_inputs(self, x: Tensor, positions: Tensor, *, past: int, **more: Any) -> AttentionInputs: ...

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, cache: KVCache
    ) -> tuple[Tensor, list[LayerRecord]]: ...


@dataclass(frozen=True)
class Step:
    """What the layers share while one token of each text passes."""

    inputs: AttentionInputs
    cache: KVCache
    cos: Tensor  # [B or 1, 1, d]
    sin: Tensor  # the same, its first half negated
    hidden: Tensor | None  # [B, 1, 1, L], -inf where there is padding; None: nowhere


class Decoding:
    """Made for a batch of texts, whose prompts come first; reads the weights as they are when it is made."""

    def __init__(self, model: Decoder, rows: int, longest: int, new_tokens: int) -> None:
        """At most `new_tokens` are to come in each of `rows` texts, behind prompts of `longest` positions at most."""
        self._room = longest + new_tokens
        self.model, self.cache = model, KVCache(len(model.layers), room=self._room)
        self.routings: dict[int, Routing] = {}  # layer -> who served the token of each text, of the last call
        weight = model.embed_tokens.weight
        self._dtype, self._device = weight.dtype, weight.device
        self._whole = not computes_apart(model)
        self._layers: list[Any] = list(model.layers)
        self._attend = [] if self._whole else [_attending(layer) for layer in self._layers]
        self._experts = {} if self._whole else _expert_tables(self._layers, rows * new_tokens)
        self._norms = [] if self._whole else [Norm(layer.post_attention_layernorm) for layer in self._layers]
        self._last_norm = Norm(model.norm)
        self._packed = PackedWeights(*self._to_pack(rows, new_tokens))
        scaling = model.rope.scaling
        self._moving = scaling is not None and scaling.length_matters
        self._cos, self._sin = self._tables(torch.arange(self._room, device=self._device), self._room)

    def read(self, ids: Tensor, padding: Tensor) -> Tensor:
        """ids [B, S], the prompts; padding [B] int64, positions before each -> scores [B, V] of what follows."""
        self._take_padding(padding)
        real = None if self._real is None else self._real[:, : ids.shape[1]]
        with self._packed.used(), reading(self._experts):
            hidden, records = self.model.hidden_states(ids, real, cache=self.cache)
            self.routings = {record.layer_id: record.routing for record in records}
            return self._scores(hidden[:, -1])

    def take_rows(self, rows: Tensor) -> None:
        """Go on with these texts, `rows` [B'] int64: some left out, or several times."""
        self.cache.take_rows(rows)
        self._take_padding(self._padding.index_select(0, rows))

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B] int64, the next of each text -> scores [B, V] of what follows."""
        model = self.model
        if self._whole:
            real = None if self._real is None else self._real[:, :1] | True
            hidden, records = model.hidden_states(tokens.unsqueeze(1), real, cache=self.cache)
            self.routings = {record.layer_id: record.routing for record in records}
            return self._scores(hidden[:, 0])
        with self._packed.used(), reading(self._experts):
            return self._through_layers(tokens)

    def _through_layers(self, tokens: Tensor) -> Tensor:
        model, past = self.model, self.cache.length
        positions = past - self._padding  # [B]
        x = model.embed_tokens(tokens)  # [B, D]
        step, before = self._step(x, positions, past), None
        for layer, attend, norm in zip(self._layers, self._attend, self._norms, strict=True):
            if attend is None:
                x = x + layer.self_attn(layer.input_layernorm(x.unsqueeze(1)), step.inputs).squeeze(1)
            else:
                x = attend(x, step)
            normed = norm(x)
            if isinstance(layer.mlp, MoEBlock):
                y, before = layer.mlp.serve(normed, self._info(tokens, positions, before))
                self.routings[layer.mlp.layer_id] = before
            else:
                y = layer.mlp(normed)
            x = x + y
        return self._scores(self._last_norm(x))

    def _to_pack(self, rows: int, new_tokens: int) -> tuple[list[tuple[Tensor, ...]], int, int]:
        """The matrices of which a copy pays for itself, how many bytes these may take, and rows of the products."""
        if self._whole or new_tokens < (TURNED_TOKENS if rows == 1 else PACKED_TOKENS):
            return [], 0, rows
        fused = [attend for attend in self._attend if attend is not None and attend.weight is not None]
        apart = {id(part.weight) for attend in fused for part in attend.parts}
        found: list[tuple[Tensor, ...]] = [(attend.weight,) for attend in fused if attend.weight is not None]
        for layer in self._layers:
            mlps = (module.reading_input() for module in layer.modules() if isinstance(module, MLP))
            for some in (_reading_input(layer.mlp), *mlps):
                if len(some) > 1 and apart.isdisjoint(map(id, some)):
                    apart |= set(map(id, some))
                    found.append(some)
            linear = [module.weight for module in layer.modules() if type(module) is Linear]
            found += [(weight,) for weight in linear if id(weight) not in apart]
        if type(self.model.lm_head) is nn.Linear:
            found.append((self.model.lm_head.weight,))
        least = PACKED_ALONE if 1 < rows < PACKED_ROWS else 0
        copied = sum(4 * each.gate_up.numel() for each in self._experts.values())
        return [some for some in found if sum(one.numel() for one in some) >= least], COPY_BYTES - copied, rows

    def _scores(self, x: Tensor) -> Tensor:
        head = self.model.lm_head
        if type(head) is nn.Linear and not hooked(head):
            return few_product(x, head.weight, head.bias)
        scores: Tensor = head(x)
        return scores

    def _take_padding(self, padding: Tensor) -> None:
        self._padding = padding
        self._rows = torch.arange(len(padding), device=self._device)
        self._zeros = torch.zeros_like(self._rows)
        self._real: Tensor | None = None  # [B, room] bool, False for padding
        self._hidden: Tensor | None = None
        if bool(padding.any()):  # once a batch
            self._real = torch.arange(self._room, device=self._device) >= padding.unsqueeze(1)
            lowest = torch.zeros(self._real.shape, dtype=self._dtype, device=self._device)
            self._hidden = lowest.masked_fill_(~self._real, float("-inf"))[:, None, None]

    def _tables(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """positions [N] -> cos and sin [N, d], the first half of sin negated."""
        cos, sin = (table[0, 0] for table in self.model.rope.tables(positions[None], self._dtype, length))
        half = sin.shape[-1] // 2
        return cos, torch.cat([-sin[:, :half], sin[:, half:]], -1)

    def _step(self, x: Tensor, positions: Tensor, past: int) -> Step:
        real = None if self._real is None else self._real[:, : past + 1]
        inputs = self.model.attention_inputs(
            x, positions.unsqueeze(1), past=past, padding=real, documents=None, cache=self.cache
        )
        hidden = None if self._hidden is None else self._hidden[..., : past + 1]
        if self._moving:
            cos, sin = self._tables(positions, past + 1)
        elif self._real is None:
            cos, sin = self._cos[past : past + 1], self._sin[past : past + 1]
        else:
            cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        return Step(inputs, self.cache, cos.unsqueeze(1), sin.unsqueeze(1), hidden)

    def _info(self, tokens: Tensor, positions: Tensor, before: Routing | None) -> TokenInfo:
        return TokenInfo(
            token_id=tokens, document_id=self._rows, domain_id=self._zeros, position=positions,
            sequence_id=self._rows, num_sequences=self._rows.shape[0], previous=before,
        )  # fmt: skip


class Norm:
    """A norm of x [..., D] in four operations, where torch needs nine on a CPU.

    Reads the weight as it was. Anything but an RMSNorm in full precision is called as it is.
    """

    def __init__(self, norm: nn.Module) -> None:
        self._norm = norm
        self._scale: Tensor | None = None
        if type(norm) is RMSNorm and norm.weight.dtype in WIDE and not hooked(norm):
            self._scale, self._least = scale_of(norm.weight, norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        if self._scale is None or x.dtype != self._scale.dtype:
            normed: Tensor = self._norm(x)
            return normed
        return scaled(x, self._scale, self._least)


def scale_of(weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight [..., D] -> what `scaled` wants: weight sqrt(D), sqrt(D eps)."""
    size = weight.shape[-1]
    return weight.detach() * size**0.5, weight.new_tensor((size * eps) ** 0.5)


def scaled(x: Tensor, scale: Tensor, least: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension: |x|^2 + D eps is a hypotenuse's square."""
    return (x * scale).div_(torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), least))


class PlainAttention:
    """x [B, D] -> x and what attention adds, [B, D]: norm, projections and heads of one layer, for one token each."""

    def __init__(self, norm: RMSNorm, attention: Attention) -> None:
        self._norm = Norm(norm)
        self._layer_id, self._head_dim = attention.layer_id, attention.head_dim
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.parts, self.weight, self._bias = parts, None, None
        weights = [part.weight for part in parts]
        if sum(weight.numel() * weight.element_size() for weight in weights) <= FUSED_BYTES:
            self.weight = torch.cat(weights)
            self._bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        self._heads, self._groups = (part.out_features // self._head_dim for part in parts[:2])
        self._head_scale: tuple[Tensor, Tensor] | None = None  # [H + G, d] and its least, of normed heads
        if attention.q_norm is not None and attention.k_norm is not None:
            scales = (attention.q_norm.weight.expand(self._heads, -1), attention.k_norm.weight.expand(self._groups, -1))
            self._head_scale = scale_of(torch.cat(scales), attention.q_norm.eps)
        self._output, self._output_bias = attention.o_proj.weight, attention.o_proj.bias

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        batch, heads, groups, size = x.shape[0], self._heads, self._groups, self._head_dim
        turned, value = self._project(self._norm(x)).split_with_sizes([heads + groups, groups], 1)
        if self._head_scale is not None:
            turned = scaled(turned, *self._head_scale)
        turned = torch.addcmul(turned * step.cos, turned.roll(size // 2, -1), step.sin)
        query, key = turned.split_with_sizes([heads, groups], 1)
        keys, values = step.cache.append_one(self._layer_id, key, value)  # [B, G, L, d]
        query = query.view(batch, groups, heads // groups, size)  # those of a group as if they were positions
        out = attended(query, keys, values, step.hidden)
        return few_product_onto(x, out.reshape(batch, heads * size), self._output, self._output_bias)

    def _project(self, x: Tensor) -> Tensor:
        """x [B, D] -> query, key and value [B, H + 2 G, d]."""
        if self.weight is not None:
            projected = few_product(x, self.weight, self._bias)
        else:
            projected = torch.cat([part(x) for part in self.parts], -1)
        return projected.view(x.shape[0], -1, self._head_dim)


def attended(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """query [B, G, H / G, d], keys and values [B, G, L, d], hidden [B, 1, 1, L] or None -> [B, G, H / G, d].

    On a CPU torch's kernel is the faster one for few texts; for more, and two threads, it takes up to twice as long as
    the products where texts are short (16 of 40 to 160 positions), and as long where they are long. With one thread the
    products take 0.8 to 1.2 of its time.
    """
    batch, groups, each, size = query.shape
    rows = batch * groups
    if query.device.type != "cpu" or rows < PRODUCTS:
        return nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=hidden)
    flat, turned = query.reshape(rows, each, size), keys.flatten(0, 1).transpose(1, 2)
    if hidden is None:
        scores = torch.baddbmm(query.new_empty(1), flat, turned, beta=0, alpha=size**-0.5)
    else:
        added = hidden.expand(batch, groups, 1, -1).reshape(rows, 1, -1)
        scores = torch.baddbmm(added, flat, turned, alpha=size**-0.5)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(query.shape)


def computes_apart(model: Decoder) -> bool:
    """Whether the layers may be computed part by part: no hook that a layer's own call would run, no autocast."""
    device = model.embed_tokens.weight.device.type
    return not torch.is_autocast_enabled(device) and not any(hooked(layer) for layer in model.layers)


def _attending(layer: Any) -> PlainAttention | None:
    """What computes its attention here; None where its own forward pass must."""
    attention = layer.self_attn
    if type(attention) is not Attention:
        return None
    kernel = attention.kernel
    parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    norms = [norm for norm in (layer.input_layernorm, attention.q_norm, attention.k_norm) if norm is not None]
    ours = (
        type(kernel) is FullAttention
        and attention.sinks is None
        and kernel.attend is fastest
        and all(type(part) is Linear and type(part.weight) is nn.Parameter for part in parts)
        and all(type(norm) is RMSNorm for norm in norms)
        and all(part.weight.dtype in WIDE for part in (*parts, *norms))
        and not any(hooked(module) for module in (attention, *parts, *norms))
    )
    return PlainAttention(layer.input_layernorm, attention) if ours else None


def _expert_tables(layers: list[Any], new_tokens: int) -> dict[int, ExpertTables]:
    """Tables of the layers' experts, which a token reads faster; none where it would not pay, or takes much memory."""
    banks = [layer.mlp.experts for layer in layers if isinstance(layer.mlp, MoEBlock) and layer.mlp.reads_few_rows]
    if new_tokens < COPY_TOKENS or sum(4 * bank.gate_up.numel() for bank in banks) > COPY_BYTES:
        return {}
    return ExpertTables.of_all(banks)


def _reading_input(mlp: nn.Module) -> tuple[Tensor, ...]:
    """The matrices of a layer that all read its input: the shared expert's, then the router's; of a dense one none."""
    if not isinstance(mlp, MoEBlock):
        return ()
    asked = (getattr(part, "reading_input", None) for part in (mlp.shared_expert, mlp.router))
    return tuple(weight for ask in asked if ask is not None for weight in ask())
