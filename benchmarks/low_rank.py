"""What a training step costs with adapters on all experts: in place of all training, and as LoRA is usually formed.

    python benchmarks/low_rank.py --out benchmarks/results
    python benchmarks/low_rank.py --memory all|adapters|formed

Processor seconds of whole steps, AdamW's included, on the same batch: `all`, every parameter is trained; `adapters`,
`train.adapters` on every matrix of every expert, which keeps the sum and turns its gradient into those of the factors;
`formed`, the same factors as a parametrization (`torch.nn.utils.parametrize`), which forms W + (alpha / r) B A in each
forward pass, as PEFT's `target_parameters` does. Prints the median of the pairs' ratios to `all` with its 95 % interval
by bootstrap. `--memory`: the most resident bytes of a process that makes three steps of one side.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import moelab
from moelab.config.adapters import AdapterConfig
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import OptimizerConfig
from moelab.data.batches import Batch
from moelab.nn.low_rank import adapter_targets, train_alone
from moelab.nn.transformer import Transformer
from moelab.training.adapters import attach
from moelab.training.optimizer import build_adamw
from moelab.training.precision import Precision
from moelab.training.step import StepSettings, train_step
from report import machine, markdown_table, write_results

BATCH, SEQUENCE, VOCABULARY, RANK = 4, 256, 8192, 8
CHOSEN = [AdapterConfig("*.experts.*", r=RANK)]
SETTINGS = StepSettings(BATCH, 1.0, 0, Precision(torch.device("cpu"), torch.float32))
Step = Callable[[], None]


def built() -> Transformer:
    layout = {"name": "uniform", "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": VOCABULARY}
    return moelab.build(ModelConfig(**sizes | heads, moe=MoEConfig(layout=layout))).train()


def batch() -> Batch:
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(0))
    return Batch(ids, ids.roll(-1, 1), torch.zeros_like(ids), torch.zeros_like(ids))


class Formed(nn.Module):
    """W [E, rows, columns] -> W + 2 left right."""

    def __init__(self, left: tuple[int, ...], right: tuple[int, ...]) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.zeros(left)), nn.Parameter(torch.randn(right) / 16)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.baddbmm(weight, self.left, self.right, alpha=2.0)


def all_trained() -> Step:
    model = built()
    optimizer = build_adamw(model, OptimizerConfig())
    return lambda: _step(model, optimizer)


def adapters_trained() -> Step:
    model = built()
    adapters = attach(model, CHOSEN, 0)
    assert adapters is not None
    optimizer = build_adamw(adapters, OptimizerConfig())
    adapters.follow(optimizer)
    return lambda: _step(model, optimizer, adapters)


def formed_in_forward() -> Step:
    model = built()
    targets = adapter_targets(model, CHOSEN)
    train_alone(model, targets)
    for target in targets:
        target.parameter.requires_grad_(False)
        parametrize.register_parametrization(
            target.owner, target.name.rpartition(".")[2], Formed(target.left, target.right)
        )
    optimizer = build_adamw(model, OptimizerConfig())

    def step() -> None:
        with parametrize.cached():
            _step(model, optimizer)

    return step


SIDES = {"all": all_trained, "adapters": adapters_trained, "formed": formed_in_forward}


def _step(model: Transformer, optimizer: torch.optim.Optimizer, adapters: object = None) -> None:
    train_step(model, optimizer, [], batch(), 0, SETTINGS, adapters=adapters)  # type: ignore[arg-type]


def seconds(step: Step) -> float:
    """Of the processor: others on the machine don't count."""
    begin = time.process_time()
    step()
    return time.process_time() - begin


def compare(pairs: int) -> dict[str, list[float]]:
    """{side: its ratio to `all`, and the ends of the interval}."""
    steps = {name: make() for name, make in SIDES.items()}
    rounds = [{name: seconds(step) for name, step in steps.items()} for _ in range(pairs + 2)][2:]
    chance, found = random.Random(0), {}
    for name in ("adapters", "formed"):
        ratios = [one[name] / one["all"] for one in rounds]
        draws = sorted(statistics.median(chance.choices(ratios, k=pairs)) for _ in range(2000))
        found[name] = [statistics.median(ratios), draws[50], draws[1949]]
    return found


def memory(side: str) -> None:
    """Print the most resident bytes after three steps of one side."""
    step = SIDES[side]()
    for _ in range(3):
        step()
    print(f"{side}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB resident")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--memory", choices=SIDES, help="measure this instead, of one side")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.memory:
        memory(options.memory)
        return
    found = compare(options.pairs)
    rows = [[name, f"{middle:.3f}", f"[{low:.3f}, {high:.3f}]"] for name, (middle, low, high) in found.items()]
    table = markdown_table(["side", "step, of one that trains all", "95 % interval"], rows)
    print(table)
    if options.out:
        write_results(options.out, "low_rank", machine() | {"pairs": options.pairs}, found, [table])


if __name__ == "__main__":
    main()
