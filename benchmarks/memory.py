"""The peak memory of a training step beside `moelab plan` and beside transformers; and what each way to save it costs.

    python benchmarks/memory.py                        # results in benchmarks/results/memory.md; 6 minutes
    python benchmarks/memory.py --cases 0,3 --rounds 1

Every row is a process of its own: a large model on one thread, four steps of fused AdamW, the largest resident set
(VmHWM) from before the model is built, and the median time of its last three steps. transformers' Qwen2-MoE of the same
sizes runs as shipped (grouped_mm experts, gradient checkpointing where moelab has it). A price is time over that of the
row which saves nothing, as measured and as `train.memory_budget` takes it to be; on a busy machine only peaks hold.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import RunConfig, TrainConfig
from moelab.data.batches import Batch
from moelab.nn.allocator import keep_freed_memory
from moelab.nn.checkpointing import apply_activation_checkpointing
from moelab.planning.budget import price_of
from moelab.planning.memory import predict
from moelab.planning.of_run import problem_of
from moelab.registry import Registry
from moelab.training.precision import Precision
from moelab.training.step import StepSettings, train_step
from report import machine, markdown_table, median, write_results

HERE = Path(__file__).resolve().parent
MOST_UNTIMED = 2  # steps: one after the first is no median


@dataclass(frozen=True)
class Case:
    """A step: sequences of 512 tokens, and what is done to save memory."""

    batch: int = 4
    micro: int = 4
    checkpointing: int = 0
    recompute_logits: bool = False
    dtype: str = "float32"
    vocab: int = 32_000
    layers: int = 4

    def __str__(self) -> str:
        parts = [f"{self.batch} x 512 tokens" if self.micro == self.batch else f"{self.batch} x 512 by {self.micro}"]
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += [f"every {self.checkpointing}. layer twice"] if self.checkpointing else []
        return ", ".join(parts + (["logits twice"] if self.recompute_logits else []))


CASES = (
    Case(),
    Case(micro=2),
    Case(micro=1),
    Case(checkpointing=2),
    Case(checkpointing=1),
    Case(recompute_logits=True),
    Case(micro=1, checkpointing=1, recompute_logits=True),
    Case(dtype="bfloat16"),
    Case(dtype="bfloat16", micro=1, checkpointing=1),
)
SIDES = ("moelab", "transformers")


def config_of(case: Case) -> ModelConfig:
    """47 M parameters: 4 layers of 16 experts, top-4, with a shared one."""
    layout = {"name": "uniform", "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
    moe = MoEConfig(layout=layout, shared_expert={"name": "gated", "intermediate_size": 512})
    return ModelConfig(
        vocab_size=case.vocab, hidden_size=512, intermediate_size=1024, num_hidden_layers=case.layers,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True, moe=moe,
    )  # fmt: skip


def run_of(case: Case) -> RunConfig:
    """Whose step it is."""
    train = TrainConfig(
        steps=1, batch_size=case.batch, micro_batch_size=case.micro, sequence_length=512, dtype=case.dtype,
        activation_checkpointing=case.checkpointing, recompute_logits=case.recompute_logits, device="cpu",
    )  # fmt: skip
    return RunConfig(run_dir="none", model=config_of(case), train=train)


def batch_of(case: Case, step: int) -> torch.Tensor:
    """[B, 513] ids."""
    return torch.randint(0, case.vocab, (case.batch, 513), generator=torch.Generator().manual_seed(step))


def ours(case: Case, steps: int) -> list[float]:
    """Seconds of each step."""
    keep_freed_memory()
    config = config_of(case)
    model = moelab.build(config, seed=0)
    model.recompute_logits = case.recompute_logits
    if case.checkpointing:
        apply_activation_checkpointing(model, case.checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    settings = StepSettings(case.micro, 1.0, 0, Precision(torch.device("cpu"), getattr(torch, case.dtype)))
    seconds = []
    for step in range(steps):
        ids = batch_of(case, step)
        began = time.perf_counter()
        nothing = torch.zeros_like(ids[:, 1:])
        train_step(model, optimizer, [], Batch(ids[:, :-1], ids[:, 1:], nothing, nothing), step, settings)
        seconds.append(time.perf_counter() - began)
    return seconds


def theirs(case: Case, steps: int) -> list[float]:
    """The same of transformers' model, of equal sizes."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(
        vocab_size=case.vocab, hidden_size=512, intermediate_size=1024, num_hidden_layers=case.layers,
        num_attention_heads=8, num_key_value_heads=2, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=256,
        shared_expert_intermediate_size=512, norm_topk_prob=False, rope_theta=1e6, use_cache=False,
        tie_word_embeddings=True, attn_implementation="sdpa", experts_implementation="grouped_mm",
    )).train()  # fmt: skip
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    seconds = []
    for step in range(steps):
        ids = batch_of(case, step)[:, :-1]
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        for part in ids.split(case.micro):
            with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
                loss = model(part, labels=part).loss * len(part) / case.batch
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return seconds


def child(side: str, case: Case, steps: int) -> dict[str, Any]:
    """In a process of its own."""
    torch.set_num_threads(1)
    seconds = (ours if side == "moelab" else theirs)(case, steps)
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert peak is not None
    return {"peak": int(peak[1]) * 1024, "seconds": median(seconds[1:])}


def measured(side: str, case: Case, rounds: int, steps: int) -> dict[str, Any]:
    """The largest peak and the least time of several processes."""
    command = [sys.executable, __file__, "--steps", str(steps), "--child", side, json.dumps(asdict(case))]
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(rounds)
    ]
    return {key: choose(each[key] for each in found) for key, choose in (("peak", max), ("seconds", min))}


def has_peer(case: Case) -> bool:
    """transformers can't checkpoint every second layer, or compute logits twice."""
    return case.checkpointing in (0, 1) and not case.recompute_logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="numbers of those to run, with commas; all of them otherwise")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind")
    parser.add_argument("--steps", type=int, default=4, help="at least 2; of two no time is told")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "CASE"))
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], Case(**json.loads(options.child[1])), options.steps)))
        return
    registry, results, rows = Registry(entry_points=False), [], []
    for number in [int(part) for part in options.cases.split(",") if part] or range(len(CASES)):
        case = CASES[number]
        whole = replace(case, micro=case.batch, checkpointing=0, recompute_logits=False)
        plan = predict(config_of(case), problem_of(run_of(case), "cpu"), registry)
        prices = [price_of(run_of(each), registry, "cpu") for each in (case, whole)]
        sides = [side for side in SIDES if side == "moelab" or has_peer(case)]
        found = {side: measured(side, case, options.rounds, options.steps) for side in sides}
        results.append({"case": asdict(case), "plan": plan.memory.peak, "sides": found, "price": prices[0] / prices[1]})
        base = next((each["sides"]["moelab"]["seconds"] for each in results if each["case"] == asdict(whole)), None)
        peak = found["moelab"]["peak"]
        rows.append([str(case), f"{plan.memory.peak / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{peak / plan.memory.peak:.2f}"])
        rows[-1] += [f"{found[side]['peak'] / 1e9:.2f}" if side in found else "" for side in SIDES[1:]]
        timed = base and options.steps > MOST_UNTIMED
        rows[-1] += [f"{found['moelab']['seconds'] / base:.2f}" if timed else "", f"{prices[0] / prices[1]:.2f}"]
        print(" | ".join(rows[-1]), flush=True)
    head = ["step", "plan, GB", "moelab, GB", "of the plan", "transformers, GB", "time", "as priced"]
    facts = machine() | {"parameters": f"{plan.total_parameters:,}", "threads": 1, "rounds": options.rounds}
    write_results(options.out, "memory", facts, results, ["", markdown_table(head, rows), ""])


if __name__ == "__main__":
    main()
