"""Inputs for the checks, comparisons, and a watch for operations that wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moelab.moe.routing import Routing, TokenInfo
from moelab.moe.waiting import as_on_an_accelerator

TOLERANCE = 1e-6

# What asks a tensor for a value, or for a shape that depends on values: on an accelerator the host would wait.
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten.bincount.default,
    torch.ops.aten.repeat_interleave.Tensor,
}


class HostWaits(TorchDispatchMode):
    """Notes every operation that makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        # A range repeated with a known output size asks nothing.
        told = func is torch.ops.aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is not None
        if (func in WAITING and not told) or masked:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def make_info(batch: int, length: int, vocab: int, *, training: bool, seed: int = 0) -> TokenInfo:
    """A batch of `batch` sequences of `length` tokens, without padding."""
    tokens = batch * length
    ids = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    sequence = torch.arange(batch).repeat_interleave(length)
    return TokenInfo(
        token_id=ids,
        document_id=sequence,
        domain_id=torch.zeros_like(sequence),
        position=torch.arange(length).repeat(batch),
        sequence_id=sequence,
        training=training,
        generator=torch.Generator().manual_seed(seed + 1),
        num_sequences=batch,
    )


def take(info: TokenInfo, rows: Tensor, num_sequences: int) -> TokenInfo:
    """The same tokens at `rows` [n] int64, as a batch of its own."""
    sequence = info.sequence_id[rows]
    return replace(
        info,
        token_id=info.token_id[rows],
        document_id=info.document_id[rows],
        domain_id=info.domain_id[rows],
        position=info.position[rows],
        sequence_id=sequence - sequence.min() if rows.numel() else sequence,
        mask=None if info.mask is None else info.mask[rows],
        num_sequences=num_sequences,
    )


def fresh_noise(info: TokenInfo, seed: int) -> TokenInfo:
    """The same tokens under another stream of noise."""
    return replace(info, generator=torch.Generator().manual_seed(seed))


def dense_weights(routing: Routing) -> Tensor:
    """[T, E]: the weight with which each token's output takes each expert."""
    out = routing.weight.new_zeros(routing.num_tokens, routing.num_experts)
    return out.index_put((routing.token, routing.expert), routing.weight, accumulate=True)


def outcome(routing: Routing) -> Tensor:
    """[T, E (+ D)]: all that a routing does to each token."""
    dense = dense_weights(routing)
    return dense if routing.bypass is None else torch.cat([dense, routing.bypass.to(dense.dtype)], dim=1)


def assert_close(found: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Equal shapes, and values within an absolute and relative tolerance."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    if found.numel():
        found, expected = found.detach(), expected.detach()
        gap = (found.double() - expected.double()).abs()
        worst = float((gap - tolerance * expected.double().abs()).max())
        assert worst <= tolerance, f"{what}: differs by {float(gap.max()):.3g}"


def assert_finite(tensor: Tensor | None, what: str) -> None:
    """No NaN and no Inf."""
    assert tensor is None or bool(torch.isfinite(tensor).all()), f"{what} is NaN or Inf"


@torch.no_grad()
def fill_parameters(module: nn.Module, seed: int, std: float = 0.5) -> None:
    """Every parameter ~ N(0, std^2): large enough that experts differ clearly."""
    stream = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=stream))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that hang on modules outside parameters and buffers."""
    return {
        f"{name}.{key}": value
        for name, child in module.named_modules()
        for key, value in vars(child).items()
        if isinstance(value, Tensor)
    }


def host_waits(call: Callable[[], Any]) -> list[str]:
    """What in `call` would make the host wait for an accelerator; `moe.waiting.waiting_is_free` is false in it."""
    with as_on_an_accelerator(), HostWaits() as watch:
        call()
    return watch.found
