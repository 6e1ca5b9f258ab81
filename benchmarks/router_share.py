"""Each router's share of a MoE layer's forward and backward pass.

python benchmarks/router_share.py [TOKENS] [THREADS]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from moelab import Registry, TokenInfo
from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.hookspecs import ROUTERS
from moelab.testing.tensors import make_info

HIDDEN, EXPERTS, TOP_K, WIDTH, REPEATS = 512, 64, 8, 128, 5


def main(tokens: int = 2048, threads: int = 1) -> None:
    torch.set_num_threads(threads)
    print(f"{tokens} tokens, hidden {HIDDEN}, {TOP_K} of {EXPERTS} experts of width {WIDTH}, {threads} threads, CPU")
    print(f"{'router':<22}{'router ms':>10}{'layer ms':>10}{'share':>8}")
    registry = Registry(entry_points=False)
    for name in registry.components(ROUTERS):
        top_k = {"switch": 1, "gshard": 2}.get(name, TOP_K)
        layout = {
            "name": "uniform",
            "num_experts": EXPERTS,
            "num_experts_per_tok": top_k,
            "moe_intermediate_size": WIDTH,
        }
        config = ModelConfig(
            256, HIDDEN, 1024, 1, 8, 8,
            moe=MoEConfig(layout=layout, router={"name": name}, allow_noncausal=True),
        )  # fmt: skip
        block = build_model(config, registry).train().layers[0].mlp
        x = torch.randn(tokens, HIDDEN, requires_grad=True)
        info = make_info(4, tokens // 4, 256, training=True)

        def route(block: object = block, x: torch.Tensor = x, info: TokenInfo = info) -> None:
            weight = block.router(x, info).weight  # type: ignore[attr-defined]
            if weight.requires_grad:
                weight.sum().backward()

        def layer(block: object = block, x: torch.Tensor = x, info: TokenInfo = info) -> None:
            block(x, info)[0].sum().backward()  # type: ignore[operator]

        router_time, layer_time = _best(route), _best(layer)
        print(
            f"{name:<22}{router_time * 1e3:>10.2f}{layer_time * 1e3:>10.2f}{router_time / layer_time:>8.1%}", flush=True
        )


def _best(call: Callable[[], None]) -> float:
    """Seconds of the fastest of some calls, after one to warm up."""
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
