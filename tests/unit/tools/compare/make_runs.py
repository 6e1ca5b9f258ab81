"""Writes run folders like those of `moelab train`, with curves that look like training.

By hand: python tests/unit/tools/compare/make_runs.py DIR
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

DOMAINS = ("code_py", "docs_en", "code_cpp", "legal", "maths")
TOKENS_PER_STEP = 16 * 256
LAYERS, EXPERTS = 4, 16
AXES = ("step", "tokens", "flops", "flops_declared", "seconds")
UNTRAINED = math.log(257)  # nats a token, before the first step


@dataclass(frozen=True)
class FakeRun:
    """What sets one run apart from the others."""

    name: str
    quality: float = 0.0  # nats a token above the others' loss at every step
    router: str | None = "softmax_topk"  # None: dense
    balance: float = 1.0  # MaxVio at the end
    seed: int = 0
    steps: int = 300
    planned: int | None = None  # steps of the config, where the run stopped before
    eval_every: int = 60  # 0: only at the end
    flops_per_token: float = 2.0e6  # served
    declared: float = 1.0  # FLOPs that the routers declare, by those served
    documents: int = 60
    noise: float = 0.02  # of a document's difference between runs, nats a token
    wobble: float = 0.003  # of another seed, nats a token
    taste: float = 0.0  # of a document's difference between recipes, nats a token
    fingerprint: str = "sha256:aaaa"
    tokenizer: str = "bytes"
    status: str = "finished"


def write_run(folder: Path, fake: FakeRun) -> Path:
    """-> the run folder, named after the run."""
    path = folder / fake.name
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(_config(path, fake)))
    rows = _rows(fake)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if fake.status == "killed":
        return path
    documents = _documents(fake) if fake.status == "finished" else []
    if documents:
        (path / "evaluation_documents.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    (path / "summary.json").write_text(json.dumps(_summary(fake, rows)))
    about = {"step": fake.steps, "seed": fake.seed, "temperature": 0.8}
    samples = [{"prompt": one, "text": f"{one}{fake.name}", **about} for one in ("def ", "The ")]
    (path / "evaluation_samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    return path


def _moe(fake: FakeRun) -> dict[str, Any] | None:
    if fake.router is None:
        return None
    return {
        "layout": {"name": "uniform", "num_experts": EXPERTS, "num_experts_per_tok": 4, "moe_intermediate_size": 64},
        "router": {"name": fake.router},
        "shared_expert": {"name": "gated", "intermediate_size": 128},
        "backend": {"name": "auto"},
        "balance_losses": [{"name": "load_balance", "weight": 0.01}] if fake.router == "softmax_topk" else [],
        "layers": {},
    }


def _config(path: Path, fake: FakeRun) -> dict[str, Any]:
    return {
        "run_dir": str(path),
        "name": None,
        "seed": fake.seed,
        "model": {"hidden_size": 128, "num_hidden_layers": LAYERS, "moe": _moe(fake)},
        "data": {"source": {"name": "embedded"}, "tokenizer": fake.tokenizer, "seed": 0},
        "train": {"steps": fake.planned or fake.steps, "batch_size": 16, "sequence_length": 256, "init_from": None},
        "optimizer": {"lr": 1e-3},
        "observers": [{"name": "tensorboard"}],
    }


def _loss(fake: FakeRun, step: float) -> float:
    luck = fake.wobble * float(_own(fake, 7).normal())
    return 1.6 + 3.9 * (1 + step / 8) ** -0.75 + (fake.quality + luck) * min(1.0, step / 100)


def _own(fake: FakeRun, purpose: int) -> np.random.Generator:
    return np.random.default_rng([fake.seed, purpose, *fake.name.encode()])


def _rows(fake: FakeRun) -> list[dict[str, Any]]:
    generator = np.random.default_rng([fake.seed, *fake.name.encode()])
    untrained = {"eval/loss": UNTRAINED, "eval/perplexity": math.exp(UNTRAINED)}
    untrained |= {"eval/bits_per_byte": UNTRAINED / math.log(2)}
    rows: list[dict[str, Any]] = [dict.fromkeys(AXES, 0) | untrained]
    for step in range(1, fake.steps + 1):
        tokens = step * TOKENS_PER_STEP
        base = {"step": step, "tokens": tokens, "flops": tokens * fake.flops_per_token}
        base |= {"flops_declared": tokens * fake.flops_per_token * fake.declared, "seconds": step * 0.25}
        if step % 5 == 0:
            lm_loss = _loss(fake, step) + generator.normal(0, 0.03)
            row = base | {"train/lm_loss": lm_loss, "train/loss": lm_loss + 0.01, "train/grad_norm": 0.8}
            row |= {"train/lr": 1e-3 * (1 - step / fake.steps), "perf/tokens_per_second": generator.normal(16000, 200)}
            row |= {"perf/mfu": 0.3, "perf/memory_gb": 0.8}
            rows.append(row | (_balance_tags(fake, step, generator) if fake.router else {}))
        if step == fake.steps or (fake.eval_every and step % fake.eval_every == 0):
            if step == fake.steps and fake.status != "finished":
                continue
            loss = _loss(fake, step)
            tags = {"eval/loss": loss, "eval/perplexity": math.exp(loss), "eval/bits_per_byte": loss / math.log(2)}
            rows.append(base | tags)
    return rows


def _balance_tags(fake: FakeRun, step: int, generator: np.random.Generator) -> dict[str, float]:
    violation = fake.balance + 3 * math.exp(-step / 50)
    tags = {}
    for layer in (*range(LAYERS), None):
        where = "mean" if layer is None else f"layer_{layer:02d}"
        noise = generator.normal(0, 0.05)
        tags |= {
            f"moe/{where}/max_violation": violation + noise,
            f"moe/{where}/dead_fraction": max(0.0, 0.2 * math.exp(-step / 40)),
            f"moe/{where}/load_entropy": 1 - 0.05 * violation + noise / 20,
            f"moe/{where}/router_entropy": math.log(EXPERTS) * (0.7 + 0.3 * math.exp(-step / 150)) + noise / 5,
            f"moe/{where}/top_k_mass": 0.6,
        }
    return tags


def _documents(fake: FakeRun) -> list[dict[str, Any]]:
    """Difficulty is shared by all runs; what a run makes of a document differs by `noise`."""
    shared, own = np.random.default_rng(1), np.random.default_rng([fake.seed, *fake.name.encode()])
    tastes = np.random.default_rng([11, *fake.name.split("_seed")[0].encode()])
    rows = []
    for index in range(fake.documents):
        tokens = int(shared.integers(40, 600))
        difficulty = shared.normal(0, 0.4)
        loss = _loss(fake, fake.steps) + difficulty + own.normal(0, fake.noise) + fake.taste * tastes.normal()
        domain = DOMAINS[index % len(DOMAINS)]
        name = f"{domain}/{index:03d}"
        nats = max(0.1, loss) * tokens
        rows.append({"document": name, "domain": domain, "nats": nats, "tokens": tokens, "bytes": tokens})
    return rows


def _summary(fake: FakeRun, rows: list[dict[str, Any]]) -> dict[str, Any]:
    final: dict[str, float] = {}
    for row in rows:
        final |= {key: value for key, value in row.items() if "/" in key}
    if (documents := _documents(fake)) and fake.status == "finished":
        final["eval/loss"] = sum(d["nats"] for d in documents) / sum(d["tokens"] for d in documents)
        final["eval/bits_per_byte"] = final["eval/loss"] / math.log(2)
        for number, place in enumerate(("000", "001", "002-003", "004-007")):
            for kind in ("position", "context"):
                final[f"eval_{kind}/bits_per_byte/{place}"] = final["eval/bits_per_byte"] * (1.5 - number / 10)
    shares = np.random.default_rng(fake.seed).dirichlet(np.full(EXPERTS, 4 / fake.balance**2), LAYERS)
    shares[0, 3] = 0.0
    moe = _moe(fake)
    return {
        "format_version": 2,
        "name": fake.name,
        "status": fake.status,
        "steps": fake.steps,
        **{key: rows[-1][key] for key in ("tokens", "flops", "flops_declared", "seconds")},
        "parameters": {"total": 3_500_000, "active": 1_200_000, "active_served": 1_150_000}
        if moe
        else {"total": 1_100_000, "active": 1_100_000, "active_served": 1_100_000},
        "flops_per_token": fake.flops_per_token * fake.declared,
        "final": final,
        "data": {
            "fingerprint": fake.fingerprint, "tokenizer": fake.tokenizer, "source": "embedded",
            "train_tokens": 30_000_000, "validation_tokens": 1_500_000, "sequence_length": 256, "batch_size": 16,
            "seed": 0,
        },
        "components": {"layout": "uniform", "router": fake.router, "shared_expert": "gated", "backend": "auto",
                       "balance_losses": "load_balance" if moe["balance_losses"] else "none"} if moe else {},
        "backends": ["grouped_mm"] if moe else [],
        "plugins": {"moelab": "0.1.0"},
        "versions": {"moelab": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
        "device": "cpu x86_64", "threads": 2, "dtype": "float32", "git": "0123456789abcdef",
        "init_from": None, "seed": fake.seed,
        "expert_load": {str(layer): list(shares[layer]) for layer in range(LAYERS)} if moe else {},
    }  # fmt: skip


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_run(target, FakeRun("dense", 0.04, router=None, flops_per_token=1.6e6))
    write_run(target, FakeRun("upcycled", 0.0))
    write_run(target, FakeRun("upcycled_loss_free", 0.003, router="sigmoid_topk", balance=0.1))
    for number in range(3):
        write_run(target, FakeRun(f"expert_choice_seed{number}", 0.02, "expert_choice", 0.02, number, steps=240))
    write_run(target, FakeRun("diverged", 0.3, balance=2.5, status="failed", steps=100))
