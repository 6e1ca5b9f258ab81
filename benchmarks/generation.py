"""Tokens a second of greedy generation beside transformers' `generate`: same weights, same prompts, same texts.

    python benchmarks/generation.py --out benchmarks/results
    python benchmarks/generation.py --shape 64:6:96 --hidden 384 --batch 1 8

transformers runs with each of its implementations of experts, and the fastest counts. Sides take turns, each in a
process of its own, since memory that one keeps or gives back changes the other's time; what is measured is a whole
call, prompt included, and the median of the rounds' ratios counts. Weights are wide enough that scores spread; a text
that differs is counted, with how far its token was behind in scores of a whole forward pass.

Beside it stands what the machine allows: a step reads the weights of all experts that are chosen (expected for tokens
that choose by themselves), the other weights, and keys and values, each once; the time in which a sum reads as many
bytes, again and again, and that in which a matmul of 2048 does as many FLOPs, are less than any step.
"""

from __future__ import annotations

import argparse
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import moelab
from cpu_step import Shape, _config, _matmul_rate, _peer
from moelab.nn.generate import generate_batch
from moelab.nn.sampling import Sampling
from report import machine, markdown_table, median, spread, write_results

PEERS = ("eager", "grouped_mm", "batched_mm")  # experts_implementation
WIDER = 4.0  # times the usual weights: at random ones scores are all alike


def main() -> None:
    options = _options()
    if int(transformers.__version__.split(".")[0]) < 5:
        print(f"transformers {transformers.__version__} computes experts in one way; nothing was measured")
        sys.exit(2)
    torch.set_num_threads(options.threads)
    results = []
    for experts, top_k, width in options.shape:
        shape = Shape(experts, top_k, width, options.hidden, options.layers, options.shared, options.vocab)
        for batch in options.batch:
            results.append(measure(shape, batch, options))
            print(_table(results[-1]), flush=True)
    if options.out:
        facts = machine() | {"threads": options.threads, "transformers": transformers.__version__}
        write_results(Path(options.out), "generation", facts, results, [_table(result) for result in results])


def measure(shape: Shape, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One model, one number of prompts: all sides in turn."""
    context = get_context("spawn")
    pipes, processes = {}, []
    for peer in (None, *options.peers):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(peer, shape, batch, options, theirs), daemon=True)
        process.start()
        theirs.close()  # else a side that dies leaves us waiting for it
        processes.append(process)
        pipes["moelab" if peer is None else f"transformers {peer}"] = ours
    for pipe in pipes.values():
        pipe.recv()  # it is built
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    texts: dict[str, Tensor] = {}
    for turn in range(options.rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            taken, texts[name] = pipe.recv()
            if turn:  # the first warms up
                seconds[name].append(taken)
    for process in processes:
        process.terminate()
        process.join()
    return _result(shape, batch, options, seconds, texts)


def _result(
    shape: Shape, batch: int, options: argparse.Namespace, seconds: dict[str, list[float]], texts: dict[str, Tensor]
) -> dict[str, Any]:
    limit = least(shape, batch, options.prompt + options.tokens // 2)
    tokens = batch * options.tokens
    rates = {name: tokens / median(times) for name, times in seconds.items()}
    best = max((name for name in rates if name != "moelab"), key=lambda name: rates[name])
    different = (texts["moelab"] != texts[best]).any(1).nonzero().flatten().tolist()
    model, prompts = _model(shape), _prompts(shape, batch, options)
    pairs = zip(seconds[best], seconds["moelab"], strict=True)
    return {
        "shape": shape.title, "batch": batch, "prompt": options.prompt, "tokens": options.tokens,
        "rates": rates, "spread": {name: [tokens / t for t in spread(times)] for name, times in seconds.items()},
        "limit": limit, "best": best, "speedup": median([theirs / ours for theirs, ours in pairs]),
        "different": len(different),
        "behind": max((_behind(model, prompts[row], texts["moelab"][row]) for row in different), default=0.0),
    }  # fmt: skip


def _serve(peer: str | None, shape: Shape, batch: int, options: argparse.Namespace, pipe: Any) -> None:
    """A side's process: whenever it is asked, seconds of a call, and its texts."""
    torch.set_num_threads(options.threads)
    model, prompts = _model(shape), _prompts(shape, batch, options)
    theirs = None if peer is None else _peer(shape, peer, model).eval()
    pipe.send(True)
    while pipe.recv():
        begun = time.perf_counter()
        texts = _ours(model, prompts, options.tokens) if theirs is None else _theirs(theirs, prompts, options.tokens)
        pipe.send((time.perf_counter() - begun, texts))


def _model(shape: Shape) -> Any:
    model = moelab.build(_config(shape, "auto"), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(WIDER)
    return model.eval()


def _prompts(shape: Shape, batch: int, options: argparse.Namespace) -> Tensor:
    return torch.randint(0, shape.vocab, (batch, options.prompt), generator=torch.Generator().manual_seed(1))


def least(shape: Shape, batch: int, positions: int) -> dict[str, float]:
    """Of one step of `batch` texts with `positions` cached each: bytes, FLOPs, and ms that either takes at least.

    As `cpu_step._config` builds it: 4 heads in 2 groups, a gated shared expert.
    """
    size, kept = shape.hidden, shape.hidden // 2  # keys of a token; as many values
    dense = 2 * size * size + 2 * size * kept + (shape.num_experts + 3 * shape.shared + 1) * size
    expert, top_k = 3 * size * shape.moe_intermediate_size, shape.num_experts_per_tok
    chosen = shape.num_experts * (1 - (1 - top_k / shape.num_experts) ** batch)
    head = shape.vocab * size
    read = 4 * (shape.layers * (dense + chosen * expert + 2 * batch * positions * kept) + head)
    per_token = shape.layers * (2 * (dense + top_k * expert) + 4 * positions * size) + 2 * head
    numbers = torch.ones(int(read) // 4)
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - begun)
    work, rate = batch * per_token, max(_matmul_rate() for _ in range(5))
    return {"bytes": read, "flops": work, "reading_ms": 1e3 * min(times), "computing_ms": 1e3 * work / rate}


def _ours(model: Any, prompts: Tensor, tokens: int) -> Tensor:
    found = generate_batch(model, prompts.tolist(), Sampling(tokens, temperature=0.0), batch_size=len(prompts))
    return torch.tensor([one.ids for one in found])


def _theirs(peer: Any, prompts: Tensor, tokens: int) -> Tensor:
    ids = peer.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, use_cache=True, pad_token_id=0,
    )  # fmt: skip
    found: Tensor = ids[:, prompts.shape[1] :]
    return found


@torch.no_grad()
def _behind(model: Any, prompt: Tensor, text: Tensor) -> float:
    """How far scores of the text's tokens are behind the best of a whole forward pass, at worst."""
    logits = model(torch.cat([prompt, text])[None]).logits[0, len(prompt) - 1 : -1]
    return float((logits.amax(-1) - logits[torch.arange(len(text)), text]).max())


def _table(result: dict[str, Any]) -> str:
    rows = [
        [name, f"{rate:.0f}", " .. ".join(f"{value:.0f}" for value in sorted(result["spread"][name]))]
        for name, rate in result["rates"].items()
    ]
    return "\n".join(
        [
            f"{result['shape'].rpartition(',')[0]}; {result['batch']} prompts of {result['prompt']} tokens, "
            f"{result['tokens']} new ones",
            markdown_table(["", "tokens/s (median)", "quartiles"], rows),
            _limits(result),
            f"moelab / {result['best']}: {result['speedup']:.2f} x; {result['different']} texts of {result['batch']} "
            "differ" + (f", by {result['behind']:.1e} of a score" if result["different"] else ""),
        ]
    )


def _limits(result: dict[str, Any]) -> str:
    limit, best = result["limit"], result["best"]
    floor = max(limit["reading_ms"], limit["computing_ms"])
    step = {name: 1e3 * result["batch"] / result["rates"][name] for name in ("moelab", best)}
    return (
        f"a step reads {limit['bytes'] / 1e6:.1f} MB, in {limit['reading_ms']:.2f} ms at least, and does "
        f"{limit['flops'] / 1e9:.3f} GFLOP, in {limit['computing_ms']:.2f} ms; moelab took {step['moelab']:.2f} ms, "
        f"{step['moelab'] / floor:.1f} times the longer; {best} {step[best]:.2f} ms, {step[best] / floor:.1f} times"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["32:4:128", "128:8:64"], help="experts:top_k:width")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    for name, value in (
        ("hidden", 256), ("layers", 4), ("shared", 512), ("vocab", 4096), ("prompt", 32), ("tokens", 128),
        ("rounds", 7), ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out")
    options = parser.parse_args()
    options.shape = [tuple(map(int, shape.split(":"))) for shape in options.shape]
    return options


if __name__ == "__main__":
    main()
