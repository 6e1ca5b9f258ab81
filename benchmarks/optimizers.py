"""What each optimizer takes of a training step, beside AdamW, and what memory it holds.

    python benchmarks/optimizers.py --out benchmarks/results
    python benchmarks/optimizers.py --pairs 2 --sequences 1      # a try, in a minute

Processor seconds of whole steps (forward, backward, clipping, the optimizer) on the same batch, and of the optimizer
alone, one side after the other in each round. Prints the median over rounds of a side's seconds to those of `adamw`,
with its 95 % interval by bootstrap, and the bytes that it holds for each number of the model, from `moelab plan`'s
counter. Online merging reads its tau from two models in memory. One thread.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import OptimizerConfig
from moelab.data.batches import Batch
from moelab.nn.allocator import keep_freed_memory
from moelab.nn.optimizing import Optimizer, OptimizerContext, trained_parameters
from moelab.nn.transformer import Transformer
from moelab.training.optimizer import begin, build_optimizer, state_bytes
from moelab.training.precision import Precision
from moelab.training.step import StepSettings, train_step
from report import machine, markdown_table, write_results

SEQUENCE, VOCABULARY = 512, 8192
MERGING = {"name": "online_merging", "reference": "1", "before": "2", "alpha": 1e-6}
SIDES: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw"},
    "muon": {"name": "muon"},
    "muon, fp32": {"name": "muon", "ns_dtype": "float32"},
    "ondare": MERGING,
    "ondare, p 0.1": {**MERGING, "reserve_rate": 0.1},
    "onties, p 0.1": {**MERGING, "method": "onties", "reserve_rate": 0.1},
    "onties, p 0.1, K 8": {**MERGING, "method": "onties", "reserve_rate": 0.1, "merge_every": 8},
}


def built(seed: int = 0) -> Transformer:
    layout = {"name": "uniform", "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": VOCABULARY}
    return moelab.build(ModelConfig(**sizes | heads, moe=MoEConfig(layout=layout)), seed=seed).train()


@dataclass
class InMemory:
    """A model in place of a folder."""

    model: Transformer

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    def read_into(self, name: str, tensor: Tensor) -> None:
        tensor.copy_(self.model.get_parameter(name).detach())


@dataclass
class Side:
    """A model and what trains it."""

    model: Transformer
    optimizer: Optimizer
    batch: Batch
    settings: StepSettings
    steps: int = 0
    alone: float = 0.0  # processor seconds of the optimizer in the last step

    def seconds(self) -> float:
        """Of the processor, of a whole step: others on the machine don't count."""
        started = time.process_time()
        train_step(self.model, self.optimizer, [], self.batch, self.steps, self.settings)
        self.steps += 1
        return time.process_time() - started


def side(algorithm: dict[str, Any], sequences: int) -> Side:
    model = built()
    settings = OptimizerConfig(algorithm)
    context = OptimizerContext(
        trained_parameters(model, {}), settings, weights=lambda seed, _: InMemory(built(int(seed)))
    )
    optimizer = build_optimizer(context, moelab.Registry(entry_points=False))
    begin(optimizer)
    ids = torch.randint(0, VOCABULARY, (sequences, SEQUENCE), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, ids.roll(-1, 1), torch.zeros_like(ids), torch.zeros_like(ids))
    made = Side(model, optimizer, batch, StepSettings(sequences, 1.0, 0, Precision(torch.device("cpu"), torch.float32)))
    clock: list[float] = [0.0]

    def before(*_: object) -> None:
        clock[0] = time.process_time()

    def after(*_: object) -> None:
        made.alone = time.process_time() - clock[0]

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return made


def interval(ratios: list[float]) -> list[float]:
    """Median, and the ends of its 95 % interval."""
    chance = random.Random(0)
    draws = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(2000))
    return [statistics.median(ratios), draws[50], draws[1949]]


def compare(pairs: int, sequences: int) -> dict[str, dict[str, Any]]:
    """{side: its ratios to adamw, whole and alone, and what it holds}."""
    sides = {name: side(algorithm, sequences) for name, algorithm in SIDES.items()}
    rounds = []
    for _ in range(pairs + 2):
        rounds.append({name: (one.seconds(), one.alone) for name, one in sides.items()})
    numbers = sum(parameter.numel() for parameter in sides["adamw"].model.parameters())
    found = {}
    for name, one in sides.items():
        of = partial(_ratios, rounds[2:], name)
        found[name] = {
            "step": interval(of(0)), "optimizer": interval(of(1)),
            "share": statistics.median(alone / whole for whole, alone in (r[name] for r in rounds[2:])),
            "bytes": state_bytes(one.optimizer) / numbers,
        }  # fmt: skip
    return found


def _ratios(rounds: list[dict[str, tuple[float, float]]], name: str, which: int) -> list[float]:
    return [one[name][which] / one["adamw"][which] for one in rounds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--sequences", type=int, default=8, help=f"of {SEQUENCE} tokens in a step")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a run has it
    found = compare(options.pairs, options.sequences)
    rows = [
        [name, *(f"{one[key][0]:.3f} [{one[key][1]:.3f}, {one[key][2]:.3f}]" for key in ("step", "optimizer")),
         f"{one['share']:.1%}", f"{one['bytes']:.2f}"]
        for name, one in found.items()
    ]  # fmt: skip
    head = ["", "a step, of adamw's", "the optimizer, of adamw's", "its share of a step", "bytes held a number"]
    table = markdown_table(head, rows)
    print(table)
    if options.out:
        facts = machine() | {"pairs": options.pairs, "tokens": options.sequences * SEQUENCE}
        write_results(options.out, "optimizers", facts, found, [table])


if __name__ == "__main__":
    main()
