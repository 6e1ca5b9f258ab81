"""Attention of the plain kind for one more token of each of several texts, in few calls of torch.

At so few numbers a call costs what it computes, so there are twenty where the model's own forward pass makes fifty.
Numbers that the rotary embedding turns together stand side by side here, in the projections' copy and in the keys, as
real and imaginary part: turning is one product. Keys and values have a memory of their own behind the prompts.
B texts, L positions with the new one, D hidden size, H query heads in G groups, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moelab.moe.few_rows import bags
from moelab.moe.thin_product import adder, few_product, reader
from moelab.nn.attention import Attention
from moelab.nn.full_attention import FullAttention, fastest
from moelab.nn.kv_cache import KVCache
from moelab.nn.linear import Linear, hooked
from moelab.nn.norm import RMSNorm
from moelab.nn.rope import Rope

FUSED_BYTES = 1 << 22  # of a layer's query, key and value matrices: up to here a copy as one costs less than two calls
PRODUCTS = 8  # texts times groups, from which two products for all heads serve; see `HeldHeads.attended`
WIDE = (torch.float32, torch.float64)


class Norm:
    """A norm of x [..., D] in four operations, where torch needs nine on a CPU.

    Reads the weight as it was. Anything but an RMSNorm in full precision is called as it is.
    """

    def __init__(self, norm: nn.Module) -> None:
        self._norm = norm
        self._scale: Tensor | None = None
        if type(norm) is RMSNorm and norm.weight.dtype in WIDE and not hooked(norm):
            self._scale, self._least = _scale_of(norm.weight, norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        if self._scale is None or x.dtype != self._scale.dtype:
            normed: Tensor = self._norm(x)
            return normed
        return (x * self._scale).div_(_length(x, self._least))


def _scale_of(weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight [..., D] -> weight sqrt(D) and sqrt(D eps), so that x / sqrt(mean(x^2) + eps) * weight is x times the one
    over `_length` of x and the other: |x|^2 + D eps is a hypotenuse's square.
    """
    size = weight.shape[-1]
    return weight.detach() * size**0.5, weight.new_tensor((size * eps) ** 0.5)


def _length(x: Tensor, least: Tensor) -> Tensor:
    """x [..., D] -> [..., 1]."""
    return torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), least)


class Turn(NamedTuple):
    """What turns the heads at some positions, complex: times a query, with the scores' scale, and times key and value.

    The value's half of the second is one, so that both are written in one call.
    """

    query: Tensor  # [N, 1, d / 2]
    stored: Tensor  # [N, 2, 1, d / 2]

    @classmethod
    def of(cls, rope: Rope, positions: Tensor, dtype: torch.dtype, length: int) -> Turn:
        """positions [N], in a forward pass of `length` positions; dtype: float32 or float64."""
        cos, sin = (table[0, 0, :, : rope.head_dim // 2] for table in rope.tables(positions[None], dtype, length))
        turn = torch.complex(cos, sin)
        stored = torch.stack([turn, torch.ones_like(turn)], 1).unsqueeze(2)
        return cls((turn * rope.head_dim**-0.5).unsqueeze(1), stored)

    def at(self, position: int) -> Turn:
        """Of one position, for all texts."""
        return Turn(self.query.narrow(0, position, 1), self.stored.narrow(0, position, 1))

    def of_each(self, positions: Tensor) -> Turn:
        """positions [B], one for each text."""
        return Turn(self.query.index_select(0, positions), self.stored.index_select(0, positions))


class HeldHeads:
    """Keys, turned, and values of one layer's texts, with room ahead: [2, B, G, room, d]."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        _, batch, groups, room, size = memory.shape
        pairs = torch.view_as_complex(memory.view(2, batch, groups, room, size // 2, 2))
        self._places = pairs.transpose(0, 1)  # [B, 2, G, room, d / 2]
        self._products = memory.device.type == "cpu" and batch * groups >= PRODUCTS
        self._keys, self._values = memory.unbind(0)
        if self._products:
            self._keys = self._keys.flatten(0, 1).transpose(1, 2)  # [B G, d, room]

    @classmethod
    def of_prompts(cls, keys: Tensor, values: Tensor, order: Tensor, room: int) -> HeldHeads:
        """keys, values [B, G, L, d] as attention's own forward pass keeps them; order [d], of a head's numbers here."""
        batch, groups, length, size = keys.shape
        memory = keys.new_zeros(2, batch, groups, room, size)
        memory[0, :, :, :length] = keys[..., order]
        memory[1, :, :, :length] = values
        return cls(memory)

    def take_rows(self, rows: Tensor) -> HeldHeads:
        return HeldHeads(self._memory.index_select(1, rows))

    def write(self, stored: Tensor, turn: Tensor, position: int) -> None:
        """stored [B, 2, G, d / 2] complex, key and value, and what turns them."""
        torch.mul(stored, turn, out=self._places.select(3, position))

    def attended(self, query: Tensor, length: int, hidden: Tensor | None) -> Tensor:
        """query [B, H, d], scaled; hidden [B, 1, 1, L], -inf where nobody looks, or None -> [B, H d].

        On a CPU torch's kernel is the faster one for few texts. For more it is a product with the keys and, for each
        head, a bag of the values' rows, which takes 0.5 to 0.7 of the time of a second product (4 to 32 texts of 48 to
        1,000 positions, two threads and one): 0.6 to 0.8 of the kernel's time with two threads, 0.6 to 0.85 with one.
        """
        _, batch, groups, room, size = self._memory.shape
        if not self._products:
            rows = query.view(batch, groups, -1, size)  # those of a group as if they were positions
            keys, values = self._keys.narrow(2, 0, length), self._values.narrow(2, 0, length)
            out = nn.functional.scaled_dot_product_attention(rows, keys, values, attn_mask=hidden, scale=1.0)
            return out.reshape(batch, -1)
        flat, keys = query.view(batch * groups, -1, size), self._keys.narrow(2, 0, length)
        if hidden is None:
            scores = torch.bmm(flat, keys)
        else:
            scores = torch.baddbmm(hidden.expand(batch, groups, 1, -1).reshape(batch * groups, 1, -1), flat, keys)
        weights = scores.softmax(-1)  # [B G, H / G, L]
        rows = _rows_of_values(batch * groups, weights.shape[1], room, length)
        return bags(rows, weights, self._memory.view(-1, size), len(rows)).view(batch, -1)


@lru_cache(maxsize=1)  # for all layers of a step
def _rows_of_values(groups: int, each: int, room: int, length: int) -> Tensor:
    """Of B G groups with so many heads each -> [B H, L] int32, in memory as a table [2 B G room, d]."""
    first = torch.arange(groups, 2 * groups, dtype=torch.int32).mul_(room).repeat_interleave(each)
    return first.unsqueeze(1) + torch.arange(length, dtype=torch.int32)


class PlainAttention:
    """x [B, D] -> x and what attention adds, [B, D]: norm, projections and heads of one layer, for one token each."""

    def __init__(self, norm: RMSNorm, attention: Attention, room: int) -> None:
        """`room`: positions of a text, at most."""
        self._norm = Norm(norm)
        self._layer_id, self._head_dim, self._room = attention.layer_id, attention.head_dim, room
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self._heads, self._groups = (part.out_features // self._head_dim for part in parts[:2])
        size, turned = self._head_dim, self._heads + self._groups
        # Of a head: 0, d / 2, 1, d / 2 + 1, ..; the rotary embedding turns number i and i + d / 2 together.
        self._paired = torch.arange(size, device=norm.weight.device).view(2, -1).t().flatten()
        starts = torch.arange(turned, device=norm.weight.device).unsqueeze(1) * size
        values = torch.arange(turned * size, (turned + self._groups) * size, device=norm.weight.device)
        self._order = torch.cat([(starts + self._paired).flatten(), values])  # [(H + 2 G) d]
        self.parts, self.weight, self._bias = parts, None, None
        weights = [part.weight for part in parts]
        if sum(weight.numel() * weight.element_size() for weight in weights) <= FUSED_BYTES:
            self.weight = torch.cat(weights)[self._order]
            self._bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])[self._order]
        self._head_scale: tuple[Tensor, Tensor] | None = None  # [H + G, d] and its least, of normed heads
        if attention.q_norm is not None and attention.k_norm is not None:
            scales = (attention.q_norm.weight.expand(self._heads, -1), attention.k_norm.weight.expand(self._groups, -1))
            self._head_scale = _scale_of(torch.cat(scales)[:, self._paired], attention.q_norm.eps)
        self._output, self._output_bias = attention.o_proj.weight, attention.o_proj.bias
        self._held: HeldHeads | None = None
        self._read: Callable[[Tensor], Tensor] = self._project
        self._add = adder(self._output, self._output_bias)

    def begin(self, cache: KVCache) -> None:
        """Go on from the prompts in the cache, which forgets them."""
        self._held = HeldHeads.of_prompts(*cache.taken(self._layer_id), self._paired, self._room)
        self._add = adder(self._output, self._output_bias)
        if self.weight is not None:
            self._read = reader(self.weight, bias=self._bias) or partial(
                few_product, weight=self.weight, bias=self._bias
            )

    def take_rows(self, rows: Tensor) -> None:
        """Go on with these texts, `rows` [B'] int64."""
        if self._held is not None:
            self._held = self._held.take_rows(rows)

    def __call__(self, x: Tensor, turn: Turn, position: int, hidden: Tensor | None) -> Tensor:
        """`position`: where the new keys lie; hidden [B, 1, 1, L], -inf where there is padding; None: nowhere."""
        assert self._held is not None, "begins behind the prompts"
        batch, heads, groups = x.shape[0], self._heads, self._groups
        projected = self._read(self._norm(x))  # [B, (H + 2 G) d]
        if self._head_scale is not None:
            scale, least = self._head_scale
            turned = projected.view(batch, heads + 2 * groups, -1).narrow(1, 0, heads + groups)
            length = _length(turned, least)
            turned.mul_(scale).div_(length)
        pairs = torch.view_as_complex(projected.view(batch, heads + 2 * groups, -1, 2))
        self._held.write(pairs.narrow(1, heads, 2 * groups).view(batch, 2, groups, -1), turn.stored, position)
        query = torch.view_as_real(pairs.narrow(1, 0, heads) * turn.query)  # [B, H, d / 2, 2]
        out = self._held.attended(query, position + 1, hidden)
        return self._add(x, out)

    def _project(self, x: Tensor) -> Tensor:
        """x [B, D] -> query, key and value [B, (H + 2 G) d] in `_order`, by matrices too large to be copied as one."""
        return torch.cat([part(x) for part in self.parts], -1).index_select(-1, self._order)


def plain_attention(layer: nn.Module, room: int) -> PlainAttention | None:
    """What computes a decoder layer's attention here; None where its own forward pass must."""
    attention, norm = layer.self_attn, layer.input_layernorm
    if type(attention) is not Attention or not isinstance(norm, RMSNorm):
        return None
    kernel = attention.kernel
    parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    norms = [each for each in (norm, attention.q_norm, attention.k_norm) if each is not None]
    ours = (
        type(kernel) is FullAttention
        and attention.sinks is None
        and kernel.attend is fastest
        and all(type(part) is Linear and type(part.weight) is nn.Parameter for part in parts)
        and all(type(each) is RMSNorm for each in norms)
        and all(part.weight.dtype in WIDE for part in (*parts, *norms))
        and not any(hooked(module) for module in (attention, *parts, *norms))
    )
    return PlainAttention(norm, attention, room) if ours else None
