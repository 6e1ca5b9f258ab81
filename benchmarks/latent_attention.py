"""Latent attention's choices, measured: how a cache is read, and how values narrower than keys are computed.

    OMP_NUM_THREADS=1 python benchmarks/latent_attention.py [--heads 16] [--hidden 2048] [--repeats 5]

Sizes are DeepSeek-V2-Lite's: c 512, n 128, r 64, v 128. Each line is a ratio within this run, so that a busy machine
moves it little; a minute on one core of a Zen 4.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import click
import torch
from torch import nn

from moelab.config.latent_attention import LatentAttentionConfig
from moelab.config.model import ModelConfig
from moelab.nn.attention_inputs import AttentionInputs
from moelab.nn.causal_attention import causal_attention
from moelab.nn.full_attention import torch_attention
from moelab.nn.latent_attention import LatentAttention
from moelab.nn.rope import Rope

SIZES = LatentAttentionConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats`, after one that isn't counted."""
    run()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found)


@click.command()
@click.option("--heads", default=16)
@click.option("--hidden", default=2048)
@click.option("--repeats", default=5)
def main(heads: int, hidden: int, repeats: int) -> None:
    """Print both tables."""
    config = ModelConfig(
        vocab_size=8, hidden_size=hidden, intermediate_size=8, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=heads, qkv_bias=False, latent_attention=SIZES,
    )  # fmt: skip
    attention = LatentAttention(config, SIZES, 0).eval()
    print("a cache as it is, beside keys and values made of it: time of `absorbed` / `expanded`, and which is chosen")
    with torch.inference_mode():
        for batch, past, new in ((1, 64, 1), (1, 512, 1), (8, 512, 1), (1, 2048, 1), (1, 512, 16), (1, 512, 128)):
            inputs = AttentionInputs(
                Rope(64, 1e4), torch.arange(past, past + new).expand(batch, -1), torch.float32, past=past
            )
            query = torch.randn(batch, heads, new, SIZES.qk_head_dim)
            latent = torch.randn(batch, 1, past + new, 576)
            ways = (attention._absorbed, attention._expanded)
            one, other = (best(partial(way, query, latent, inputs), repeats) for way in ways)
            chosen = "absorbed" if attention._absorbs(inputs) else "expanded"
            print(f"  {batch} x {new} after {past}: {one / other:.2f} ({1e3 * one:.2f} ms), {chosen}", flush=True)
    print("values of 128 beside keys of 192, forward and backward: time over torch's own way with unlike widths")
    for seq in (256, 512, 1024, 2048):
        parts = [torch.randn(1, 8, seq, width, requires_grad=True) for width in (192, 192, 128)]

        def step(by: Callable[..., torch.Tensor], parts: list[torch.Tensor] = parts) -> None:
            by(*parts).sum().backward()

        plain = best(
            lambda: step(lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)), repeats
        )
        widened = best(lambda: step(lambda q, k, v: torch_attention(q, k, v, None)), repeats)
        blocks = best(lambda: step(causal_attention), repeats)
        print(f"  {seq} positions: zeros behind them {widened / plain:.2f}, blocks {blocks / plain:.2f}", flush=True)


if __name__ == "__main__":
    main()
