"""What an expert-parallel layer costs beside its products: its overhead against the bare all-to-alls that it makes.

python benchmarks/exchange.py                    # on an idle machine; results in benchmarks/results/exchange.md

Two processes of one thread. Each round times, forward and backward: the experts of a layer on the rank's own tokens,
without exchange; the same with the experts dealt out; and the all-to-alls of that, alone, with the same rows. Dealt
out, a rank computes as many rows with half as many experts. The overhead is the second less the first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("core", "plugins", "upcycling", "tools", "tests")]

import torch  # noqa: E402  (after the path)
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.distributed.tensor import Shard, distribute_tensor  # noqa: E402

from moelab.hookspecs import EXPERT_BACKENDS  # noqa: E402
from moelab.moe.contracts import BackendContext  # noqa: E402
from moelab.moe.experts import ExpertBank  # noqa: E402
from moelab.moe.layout import ExpertLayout  # noqa: E402
from moelab.moe.routing import Routing  # noqa: E402
from moelab.nn.allocator import keep_freed_memory  # noqa: E402
from moelab.parallel.exchange import ExchangeBackend  # noqa: E402
from moelab.registry import Registry  # noqa: E402
from processes import run_on  # noqa: E402
from report import machine, markdown_table, write_results  # noqa: E402

EXPERTS, TOP_K = 16, 4
WARM = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512])
    chosen = parser.parse_args()
    results, rows = [], []
    for hidden in chosen.hidden:
        with tempfile.TemporaryDirectory() as folder:
            ranks = run_on(2, layer, Path(folder), hidden, chosen.tokens, chosen.rounds)
        # A round ends when the slower of the two has ended.
        taken = {key: [max(pair) for pair in zip(*(rank[key] for rank in ranks), strict=True)] for key in ranks[0]}
        alone, dealt, bare = (1e3 * statistics.median(taken[key]) for key in taken)
        over = 1e3 * statistics.median(b - a for a, b in zip(taken["alone"], taken["dealt"], strict=True))
        results.append({"hidden": hidden, "tokens": chosen.tokens, "seconds": taken})
        rows.append([str(hidden), *(f"{value:.2f}" for value in (alone, dealt, over, bare)), f"{over / bare:.2f}"])
        print(" | ".join(rows[-1]), flush=True)
    head = [
        "hidden size",
        "without exchange, ms",
        "with, ms",
        "overhead, ms",
        "bare all-to-alls, ms",
        "overhead / bare",
    ]
    facts = machine() | {"tokens": chosen.tokens, "experts": EXPERTS, "top_k": TOP_K, "rounds": chosen.rounds}
    write_results(chosen.output, "exchange", facts, results, ["", markdown_table(head, rows), ""])


def layer(hidden: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """On this rank: seconds of each round, of each of the three."""
    keep_freed_memory()
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    torch.manual_seed(rank)
    context = BackendContext(ExpertLayout(EXPERTS, TOP_K, hidden), hidden, 0, dict)
    backend = Registry(entry_points=False).build(EXPERT_BACKENDS, {"name": "batched"}, context, "backend")
    whole, dealt = _bank(hidden), _bank(hidden)
    for name, parameter in list(dealt.named_parameters()):
        cut = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        dealt.register_parameter(name, nn.Parameter(cut))
    scores = torch.rand(tokens, EXPERTS).topk(TOP_K)
    routing = Routing.from_topk(scores.indices, scores.values, EXPERTS)
    x = torch.randn(tokens, hidden, requires_grad=True)
    exchange = ExchangeBackend(backend, mesh)
    bare = _bare(routing, hidden, mesh)
    jobs: dict[str, Callable[[], object]] = {
        "alone": lambda: backend(x, routing, whole).sum().backward(),
        "dealt": lambda: exchange(x, routing, dealt).sum().backward(),
        "bare": bare,
    }
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + WARM):
        for name, job in jobs.items():
            dist.barrier()
            begun = time.perf_counter()
            job()
            if number >= WARM:
                taken[name].append(time.perf_counter() - begun)
    return taken


def _bank(hidden: int) -> ExpertBank:
    layout = ExpertLayout(EXPERTS, TOP_K, hidden)
    bank = ExpertBank(layout, hidden)
    for parameter in bank.parameters():
        nn.init.normal_(parameter, std=0.02)
    return bank


def _bare(routing: Routing, hidden: int, mesh: DeviceMesh) -> Callable[[], object]:
    """The counts, the rows there and back, and the same for gradients: four exchanges of rows."""
    there = routing.counts().view(2, -1)
    here = wait_tensor(all_to_all_single(there.contiguous(), None, None, mesh))
    send, receive = there.sum(1).tolist(), here.sum(1).tolist()
    out, back = torch.randn(sum(send), hidden), torch.randn(sum(receive), hidden)

    def job() -> list[Tensor]:
        made = [wait_tensor(all_to_all_single(there.contiguous(), None, None, mesh))]
        for _ in range(2):
            made.append(wait_tensor(all_to_all_single(out, receive, send, mesh)))
            made.append(wait_tensor(all_to_all_single(back, send, receive, mesh)))
        return made

    return job


if __name__ == "__main__":
    main()
