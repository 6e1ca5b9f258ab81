"""The parts of a CPU's training step that moelab computes otherwise than torch, each beside torch's own.

    python benchmarks/cpu_parts.py --out benchmarks/results

Milliseconds forward and backward, median of rounds in which both sides take turns: linear layers (oneDNN beside
torch's choice), causal attention (blocks beside scaled_dot_product_attention), the loss (chunks beside logits).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layer import Contender, time_in_turn
from moelab.nn.allocator import keep_freed_memory
from moelab.nn.causal_attention import causal_attention
from moelab.nn.full_attention import torch_attention
from moelab.nn.linear import Linear
from moelab.nn.loss import token_cross_entropy
from report import machine, markdown_table, write_results

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
LINEARS = (  # tokens, in, out
    (512, 256, 256),
    (512, 256, 512),
    (4096, 256, 512),
    (4096, 512, 256),
    (4096, 256, 256),
    (2048, 768, 2048),
    (2048, 2048, 2048),
)
ATTENTIONS = ((8, 4, 2, 512, 64), (16, 4, 2, 256, 64), (4, 14, 2, 512, 64), (2, 16, 2, 512, 128), (4, 4, 2, 1024, 64))
LOSSES = ((4096, 256, 4096), (1024, 512, 32768))  # tokens, hidden, vocabulary

Part = tuple[str, dict[str, Contender], Tensor]  # what, {"torch", "moelab"}, gradient of the output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="folder for cpu_parts.json and cpu_parts.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for what, sides, upstream in (*_linears(), *_attentions(), *_losses()):
        timing = time_in_turn(sides, upstream, options.rounds, CPU)
        seconds = {name: found.total for name, found in timing.items()}
        rows.append({"part": what, "seconds": seconds, "ratio": seconds["torch"] / seconds["moelab"]})
        print(f"{what}: {rows[-1]['ratio']:.2f} x", flush=True)
    body = [
        [row["part"], f"{1e3 * row['seconds']['torch']:.1f}", f"{1e3 * row['seconds']['moelab']:.1f}",
         f"{row['ratio']:.2f} x"]
        for row in rows
    ]  # fmt: skip
    table = "\n" + markdown_table(["forward and backward", "torch ms", "moelab ms", "ratio"], body) + "\n"
    print(table)
    if options.out:
        write_results(Path(options.out), "cpu_parts", machine() | {"threads": options.threads}, rows, [table])


def _linears() -> Iterator[Part]:
    for tokens, inputs, outputs in LINEARS:
        x = torch.randn(tokens, inputs, requires_grad=True)
        ours, theirs = Linear(inputs, outputs, bias=False), nn.Linear(inputs, outputs, bias=False)
        sides = {"torch": _calls(theirs, x), "moelab": _calls(ours, x)}
        yield f"linear, {tokens} x {inputs} to {outputs}, fp32", sides, torch.randn(tokens, outputs)


def _calls(module: nn.Module, x: Tensor) -> Contender:
    return Contender(lambda: module(x), [x, *module.parameters()])


def _attentions() -> Iterator[Part]:
    for dtype in (FP32, BF16):
        for batch, heads, groups, seq, width in ATTENTIONS:
            made = [torch.randn(batch, seq, n, width, dtype=dtype).transpose(1, 2) for n in (heads, groups, groups)]
            query, key, value = (tensor.requires_grad_() for tensor in made)
            leaves = [query, key, value]
            sides = {
                "torch": Contender(lambda q=query, k=key, v=value: torch_attention(q, k, v, None), leaves),
                "moelab": Contender(lambda q=query, k=key, v=value: causal_attention(q, k, v), leaves),
            }
            what = f"attention, {batch} x {seq}, {heads} heads of {width}, {groups} of keys, {_short(dtype)}"
            yield what, sides, torch.randn(batch, seq, heads, width, dtype=dtype).transpose(1, 2)


def _losses() -> Iterator[Part]:
    for tokens, hidden_size, vocab in LOSSES:
        hidden = torch.randn(1, tokens, hidden_size, requires_grad=True)
        head = nn.Parameter(0.02 * torch.randn(vocab, hidden_size))
        targets = torch.randint(0, vocab, (1, tokens))

        def plain(h: Tensor = hidden, w: Tensor = head, t: Tensor = targets) -> Tensor:
            return nn.functional.cross_entropy((h @ w.t())[0], t[0], reduction="none")[None]

        sides = {
            "torch": Contender(plain, [hidden, head]),
            "moelab": Contender(lambda h=hidden, w=head, t=targets: token_cross_entropy(h, w, t), [hidden, head]),
        }
        yield f"loss, {tokens} x {hidden_size}, vocabulary {vocab}, fp32", sides, torch.rand(1, tokens)


def _short(dtype: torch.dtype) -> str:
    return {FP32: "fp32", BF16: "bf16"}[dtype]


if __name__ == "__main__":
    main()
