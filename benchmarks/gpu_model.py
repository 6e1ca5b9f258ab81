"""Whole models on a GPU: training steps with MFU, and attentions at length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import moelab
from gpu_common import BF16, QWEN_57B, TOY, Bench, choose
from gpu_layer import LEFT_OUT, Part, kernels_of
from layer import LayerShape, backends_for
from moelab.config.model import ModelConfig, MoEConfig
from moelab.hookspecs import ATTENTIONS
from moelab.nn.attention_inputs import AttentionContext, AttentionInputs
from moelab.nn.count import count_parameters, flops_per_token
from moelab.nn.full_attention import torch_attention
from moelab.nn.rope import Rope, rotate
from moelab.nn.transformer import Transformer
from report import markdown_table

HEADS, KEY_HEADS, HEAD_DIM = 28, 4, 128  # 57B-A14B's


def training_steps(bench: Bench) -> Part:
    """Four full-width layers of 57B-A14B: forward, backward, clipping, fused AdamW; bf16 matmuls, fp32 state."""
    names = [name for name in backends_for(_shape(bench), 8192, bench.device, BF16) if name not in LEFT_OUT]
    rows = []
    for sequences, positions in bench.sizes.steps:
        for name in names:
            rows.append(_measured(bench, name, sequences, positions))
        rows.append(_measured(bench, "grouped_mm", sequences, positions, ours=False))
    return rows, _table(rows)


def compiled_step(bench: Bench) -> Part:
    """The same with torch.compile around each layer."""
    rows = [_measured(bench, "grouped_mm", *bench.sizes.steps[0], compiled=True)]
    return rows, _table(rows)


def step_profile(bench: Bench) -> Part:
    """What the device does in one of these steps."""
    step, _ = _step(bench, "grouped_mm", *bench.sizes.steps[0])
    return kernels_of(step, bench, "one training step of the same four layers")


def _measured(
    bench: Bench, backend: str, sequences: int, positions: int, *, ours: bool = True, compiled: bool = False
) -> dict[str, Any]:
    bench.release()
    choose(ours)
    step, model = _step(bench, backend, sequences, positions, compiled)
    seconds = bench.seconds(step)
    choose(True)
    speed = sequences * positions / seconds
    return {
        "backend": backend + ", layers compiled" * compiled + ", torch's passes" * (not ours),
        "tokens": f"{sequences} x {positions}", "tokens_per_second": speed,
        "parameters": count_parameters(model).total,
        "mfu_of_matmul_rate": speed * flops_per_token(model, positions) / bench.rate, "peak_gb": bench.peak_gb(),
    }  # fmt: skip


def _step(
    bench: Bench, backend: str, sequences: int, positions: int, compiled: bool = False
) -> tuple[Callable[[], None], Transformer]:
    model = moelab.build(_four_layers(backend, _shape(bench), bench.sizes.step_experts), device=bench.device, seed=None)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)  # on the device; a model's own are drawn on the host
    if compiled:
        for layer in model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, 32000, (sequences, positions), device=bench.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(bench.device.type, BF16):
            output = model(ids, targets=ids)
        assert output.token_loss is not None
        output.token_loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, model


def _table(rows: list[dict[str, Any]]) -> str:
    body = [
        [r["backend"], r["tokens"], f"{r['tokens_per_second']:.0f}", f"{100 * r['mfu_of_matmul_rate']:.0f} %",
         f"{r['peak_gb']:.0f}"]
        for r in rows
    ]  # fmt: skip
    head = ["backend", "tokens", "tokens/s", "model FLOP/s of the matmul rate", "peak GB"]
    return "\ntraining step, 4 layers of full width\n\n" + markdown_table(head, body) + "\n"


def _shape(bench: Bench) -> LayerShape:
    return QWEN_57B if bench.device.type == "cuda" else TOY


def _four_layers(backend: str, shape: LayerShape, experts: int) -> ModelConfig:
    """57B-A14B's layer with 24 of its 64 experts, so that four layers and their fp32 state (62 GB) fit one card."""
    layout = {
        "name": "uniform",
        "num_experts": experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": shape.width,
    }
    moe = MoEConfig(
        layout=layout, shared_expert={"name": "gated", "intermediate_size": shape.shared}, backend={"name": backend}
    )
    heads = max(shape.hidden // HEAD_DIM, 1)
    return ModelConfig(
        vocab_size=32000, hidden_size=shape.hidden, intermediate_size=shape.hidden, num_hidden_layers=4,
        num_attention_heads=heads, num_key_value_heads=min(heads, KEY_HEADS), moe=moe,
    )  # fmt: skip


def attention(bench: Bench) -> Part:
    """Each attention beside torch's own kernel, in bf16: forward, forward and backward, peak memory."""
    rows = []
    for batch, length in bench.sizes.attention:
        shapes = [(batch, heads, length, HEAD_DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        heads = [torch.randn(shape, device=bench.device, dtype=BF16, requires_grad=True) for shape in shapes]
        for name, call in _attentions(batch, length, bench.device).items():
            bench.release()
            forward = bench.seconds(partial(call, *heads), 3)
            both = bench.seconds(partial(_both_ways, call, heads), 3)
            rows.append(
                {
                    "side": name, "sequences": batch, "positions": length, "forward_ms": forward * 1e3,
                    "total_ms": both * 1e3, "peak_gb": bench.peak_gb(),
                }
            )  # fmt: skip
    body = [
        [r["side"], f"{r['sequences']} x {r['positions']}", f"{r['forward_ms']:.2f}", f"{r['total_ms']:.2f}",
         f"{r['peak_gb']:.1f}"]
        for r in rows
    ]  # fmt: skip
    head = ["attention", "tokens", "forward ms", "forward + backward ms", "peak GB"]
    return rows, "\nattention of 28 heads in 4 groups of 128, bf16\n\n" + markdown_table(head, body) + "\n"


def _both_ways(call: Callable[..., Tensor], heads: list[Tensor]) -> None:
    y = call(*heads)
    torch.autograd.grad(y, heads, y.detach())


def _attentions(batch: int, length: int, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Each turns query and key itself; `torch` is scaled_dot_product_attention of turned ones."""
    registry = moelab.Registry(entry_points=False)
    context = AttentionContext(HEAD_DIM, HEADS, KEY_HEADS, 0, 1, length // 4)
    rope, positions = Rope(HEAD_DIM, 1e6), torch.arange(length, device=device).expand(batch, -1)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cos, sin = rope.tables(positions, query.dtype)
        return torch_attention(rotate(query, cos, sin), rotate(key, cos, sin), value, None)

    def ours(part: dict[str, Any], **more: Any) -> Callable[..., Tensor]:
        kernel = registry.build(ATTENTIONS, part, context, "attention")
        return lambda q, k, v: kernel(q, k, v, AttentionInputs(rope, positions, q.dtype, **more))

    return {
        "torch": plain,
        "full": ours({"name": "full"}),
        "full, documents of 512": ours({"name": "full"}, documents=positions // 512),
        "sliding_window of 1024": ours({"name": "sliding_window", "window": 1024}),
        "dual_chunk": ours({"name": "dual_chunk"}),
    }
