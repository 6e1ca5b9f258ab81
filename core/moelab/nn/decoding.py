"""One more token for each of several texts: the layers as generation needs them, over a cache.

Without records, and the head on one position alone. Where the attention is the plain kind (`FullAttention`, nothing
wrapped around its parts) `nn/plain_attention.py` computes it. Any other attention is called as in a forward pass, and a
model whose layers have hooks, or that computes under autocast, goes through its own forward pass as a whole.
B sequences, L positions with the new one, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moelab.config.model import ModelConfig
from moelab.moe.block import MoEBlock
from moelab.moe.few_rows import ExpertTables, reading
from moelab.moe.routing import LayerRecord, Routing, TokenInfo
from moelab.moe.thin_product import PackedWeights, few_product
from moelab.moe.thin_ways import TABLES, Experts, Matrices, Problem, measured_way
from moelab.nn.attention_inputs import AttentionInputs
from moelab.nn.kv_cache import KVCache
from moelab.nn.linear import Linear, hooked
from moelab.nn.mlp import MLP
from moelab.nn.norm import RMSNorm
from moelab.nn.plain_attention import Norm, Turn, plain_attention
from moelab.nn.reach import Positional
from moelab.nn.rope import Rope
from moelab.nn.serving import ServedBlock, reads_few_rows
from moelab.plugin_faults import PluginPart

COPY_BYTES = 1 << 29  # of all copies
COPY_TOKENS = (
    128  # of all texts: from here a copy of the experts' gate_up is made, which a token reads in half the time
)
TURNED_TOKENS = 64  # of a text that is alone: from here other matrices are turned
PACKED_TOKENS = 32  # of several: from here these are packed


class Decoder(Protocol):
    """What generating asks of a model: `nn.transformer.Transformer` is one."""

    config: ModelConfig
    training: bool
    rope: Rope
    positional: Positional
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


class Decoding:
    """Made for a batch of texts, whose prompts come first; reads the weights as they are when it is made."""

    def __init__(self, model: Decoder, rows: int, longest: int, new_tokens: int, autotune: bool | None = False) -> None:
        """At most `new_tokens` are to come in each of `rows` texts, behind prompts of `longest` positions at most.

        `autotune`: see `nn.sampling.Sampling`.
        """
        self._room = longest + new_tokens
        self.model = model
        self.routings: dict[int, Routing] = {}  # layer -> who served the token of each text, of the last call
        weight = model.embed_tokens.weight
        self._dtype, self._device = weight.dtype, weight.device
        self._whole = not computes_apart(model)
        self._layers: list[Any] = list(model.layers)
        self._attend = [] if self._whole else [plain_attention(layer, self._room) for layer in self._layers]
        self._plain = [attend for attend in self._attend if attend is not None]
        self._passed = 0  # positions, padding among them
        alone = len(self._plain) == len(self._layers)  # the cache is for prompts alone
        self.cache = KVCache(len(self._layers), room=longest if alone else self._room)
        self._serve: list[ServedBlock | Callable[[Tensor, Tensor], Tensor]] = []
        self._norms = [] if self._whole else [Norm(layer.post_attention_layernorm) for layer in self._layers]
        self._last_norm = Norm(model.norm)
        self._experts, self._packed = self._copies(rows, new_tokens, autotune)
        scaling = model.rope.scaling
        self._moving = scaling is not None and scaling.length_matters
        self._turns = None  # of all positions
        if self._plain and not self._moving:
            self._turns = Turn.of(model.rope, torch.arange(self._room, device=self._device), self._dtype, self._room)

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
        for attend in self._plain:
            attend.take_rows(rows)
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
        if not self._passed:
            self._leave_prompts()
        model, past = self.model, self._passed
        self._passed += 1
        positions = past - self._padding  # [B]
        x = model.embed_tokens(tokens)  # [B, D]
        inputs, turn, before = self._inputs(x, positions, past), self._turn(positions, past), None
        hidden = None if self._hidden is None else self._hidden[..., : past + 1]
        for layer, attend, norm, served in zip(self._layers, self._attend, self._norms, self._serve, strict=True):
            if attend is None or turn is None:
                x = x + layer.self_attn(layer.input_layernorm(x.unsqueeze(1)), inputs).squeeze(1)
            else:
                x = attend(x, turn, past, hidden)
            normed = norm(x)
            if isinstance(served, ServedBlock):
                x, before = served(normed, self._info(tokens, positions, before), x)
                self.routings[served.layer_id] = before
            else:
                x = served(x, normed)
        return self._scores(self._last_norm(x))

    def _leave_prompts(self) -> None:
        """Look up what the steps need. Not before: the prompts' rows may have been taken several times."""
        self._passed = self.cache.length
        for attend in self._plain:
            attend.begin(self.cache)
        self._serve = [_serving(layer.mlp, self._experts) for layer in self._layers]

    def _copies(
        self, rows: int, new_tokens: int, autotune: bool | None
    ) -> tuple[dict[int, ExpertTables], PackedWeights]:
        """Of the weights that are read faster so, where enough tokens are to come: the experts', and others."""
        if self._whole:
            return {}, PackedWeights([], 0)
        experts = _worth_tables(self._layers, rows * new_tokens)
        many = new_tokens >= (TURNED_TOKENS if rows == 1 else PACKED_TOKENS)
        matrices = list(map(Matrices, self._matrices())) if many else []
        asked: list[Problem] = [*experts, *matrices] if many else []
        way = measured_way(asked, rows, new_tokens, lambda: self.model.state_dict().values(), autotune)
        tables = ExpertTables.of_all(one.bank for one in experts if way is None or way(one) == TABLES)
        copied = sum(4 * each.gate_up.numel() for each in tables.values())
        way_of = None if way is None else lambda some: way(Matrices(some))
        return tables, PackedWeights([one.weights for one in matrices], COPY_BYTES - copied, rows, way_of)

    def _matrices(self) -> list[tuple[Tensor, ...]]:
        """All that a token reads but the experts': each alone, or those that read the same."""
        fused = [attend for attend in self._plain if attend.weight is not None]
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
        return found

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

    def _inputs(self, x: Tensor, positions: Tensor, past: int) -> AttentionInputs | None:
        """What attention of other kinds wants; None where there is none."""
        if len(self._plain) == len(self._layers):
            self.model.positional.check(past + 1)  # which tells of a text that is too long
            return None
        real = None if self._real is None else self._real[:, : past + 1]
        return self.model.attention_inputs(
            x, positions.unsqueeze(1), past=past, padding=real, documents=None, cache=self.cache
        )

    def _turn(self, positions: Tensor, past: int) -> Turn | None:
        """For plain attention; None where there is none."""
        if not self._plain:
            return None
        if self._turns is None:
            return Turn.of(self.model.rope, positions, self._dtype, past + 1)
        return self._turns.at(past) if self._real is None else self._turns.of_each(positions)

    def _info(self, tokens: Tensor, positions: Tensor, before: Routing | None) -> TokenInfo:
        return TokenInfo(
            token_id=tokens, document_id=self._rows, domain_id=self._zeros, position=positions,
            sequence_id=self._rows, num_sequences=self._rows.shape[0], previous=before,
        )  # fmt: skip


def computes_apart(model: Decoder) -> bool:
    """Whether the layers may be computed part by part: no hook that a layer's own call would run, no autocast."""
    device = model.embed_tokens.weight.device.type
    return not torch.is_autocast_enabled(device) and not any(hooked(layer) for layer in model.layers)


def _worth_tables(layers: list[Any], new_tokens: int) -> list[Experts]:
    """The layers' experts, where tables of them would pay by constants, and don't take much memory."""
    blocks = [layer.mlp for layer in layers if isinstance(layer.mlp, MoEBlock) and reads_few_rows(layer.mlp)]
    if new_tokens < COPY_TOKENS or sum(4 * block.experts.gate_up.numel() for block in blocks) > COPY_BYTES:
        return []
    return [Experts(block.experts, block.layout.num_experts_per_tok) for block in blocks]


def _serving(mlp: nn.Module, tables: Mapping[int, ExpertTables]) -> ServedBlock | Callable[[Tensor, Tensor], Tensor]:
    """What adds the second half of a layer; of a dense one (base, x) -> base + what x gives."""
    if isinstance(mlp, MoEBlock):
        return ServedBlock(mlp, tables.get(id(mlp.experts.gate_up)))
    served: Callable[[Tensor, Tensor], Tensor] = mlp.serving()  # type: ignore[operator]
    return served


def _reading_input(mlp: nn.Module) -> tuple[Tensor, ...]:
    """The matrices of a layer that all read its input: the shared expert's, then the router's; of a dense one none."""
    if not isinstance(mlp, MoEBlock):
        return ()
    asked = (getattr(part, "reading_input", None) for part in (mlp.shared_expert, mlp.router))
    return tuple(weight for ask in asked if ask is not None for weight in ask())
