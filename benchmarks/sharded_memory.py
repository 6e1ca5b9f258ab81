"""What each of several processes takes to build, save and read a model that lies on all of them: peak against whole.

    python benchmarks/sharded_memory.py    # 4 processes, Qwen2-57B-A14B's layout at a seventh of its width: 1.6 GB

The layout is 57B-A14B's: 64 experts, 8 of them for a token, a gated shared expert of eight times an expert's width,
every layer sparse, head and embedding apart. Peak: VmHWM of a process since the phase began, less what it took then,
which is Python, torch and gloo. Every phase starts its processes anew.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("core", "plugins", "upcycling", "tools", "tests")]

import torch  # noqa: E402  (after the path)

import moelab  # noqa: E402
from moelab.builder import build_hollow, build_model, resolve_model  # noqa: E402
from moelab.checkpoint import CONFIG, OwnWeights  # noqa: E402
from moelab.config.model import ModelConfig, MoEConfig  # noqa: E402
from moelab.config.run import OptimizerConfig, ParallelConfig, RunConfig, TrainConfig  # noqa: E402
from moelab.config.stored import to_yaml  # noqa: E402
from moelab.hf.save import save_hf  # noqa: E402
from moelab.loading import open_model, open_weights  # noqa: E402
from moelab.parallel.filling import fill_hollow, make_room  # noqa: E402
from moelab.parallel.group import Group  # noqa: E402
from moelab.parallel.mesh import make_meshes  # noqa: E402
from moelab.parallel.parallelise import parallelise  # noqa: E402
from moelab.training.checkpoint import TrainingState, save_checkpoint  # noqa: E402
from moelab.training.optimizer import build_adamw  # noqa: E402
from processes import run_on  # noqa: E402
from report import machine, markdown_table, write_results  # noqa: E402

MESH = {"shard": 4, "expert": 2}
CPU = torch.device("cpu")


def config_of(layers: int) -> ModelConfig:
    """Qwen2-57B-A14B's config.json has hidden 3584, experts of 2560, shared 20480, 28 layers, 151936 tokens."""
    config = ModelConfig(
        vocab_size=21_760, hidden_size=512, intermediate_size=2560, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
        moe=MoEConfig(layout={"name": "uniform", "num_experts": 64, "num_experts_per_tok": 8,
                              "moe_intermediate_size": 256},
                      router={"name": "softmax_topk", "norm_topk_prob": False},
                      shared_expert={"name": "gated", "intermediate_size": 2048}),
    )  # fmt: skip
    resolve_model(config, moelab.Registry(entry_points=False))
    return config


def _memory(key: str) -> int:
    """Bytes: VmRSS now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


class Watch:
    """Peak bytes over what the process took when it began, and seconds."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts anew
        self._before, self._began = _memory("VmRSS"), time.perf_counter()

    def told(self) -> dict[str, float]:
        return {"peak": _memory("VmHWM") - self._before, "seconds": time.perf_counter() - self._began}


def _spread(layers: int, weights: Any = None) -> Any:
    config = config_of(layers)
    meshes = make_meshes(ParallelConfig(**MESH), Group().size, "cpu")
    watch = Watch()
    model = build_hollow(config, moelab.Registry(entry_points=False), device=CPU, seed=0)
    parallelise(model, meshes)
    fill_hollow(model, make_room(model, CPU), weights() if weights else None, config.initializer_range, 0)
    return model, watch.told()


def build_and_save(layers: int, folder: str) -> dict[str, Any]:
    model, built = _spread(layers)
    watch, run = Watch(), RunConfig(run_dir="x", model=config_of(layers), train=TrainConfig(steps=1))
    training = TrainingState(build_adamw(model, OptimizerConfig()), [])
    save_checkpoint(Path(folder), model, training, {}, {CONFIG: to_yaml(run).encode()}, Group())
    return {"built": built, "saved": watch.told()}


def read_own(layers: int, folder: str) -> dict[str, Any]:
    return _spread(layers, lambda: OwnWeights(Path(folder)))[1]


def read_hugging_face(layers: int, folder: str) -> dict[str, Any]:
    return _spread(layers, lambda: open_weights(Path(folder)))[1]


def export(layers: int, source: str, folder: str) -> dict[str, Any]:
    watch = Watch()
    model, weights = open_model(Path(source))
    save_hf(model, folder, dtype=torch.bfloat16, max_shard_size="100MB", weights=weights)
    return watch.told()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    layers = parser.parse_args().layers
    parameters = list(build_model(config_of(layers), device="meta", seed=None).parameters())
    whole, largest = sum(p.nbytes for p in parameters), max(p.nbytes for p in parameters)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        first = run_on(4, build_and_save, root / "1", layers, f"{name}/own")
        exported = run_on(1, export, root / "2", layers, f"{name}/own", f"{name}/hf")
        phases = {
            "draw": [found["built"] for found in first],
            "save": [found["saved"] for found in first],
            "read its checkpoint": run_on(4, read_own, root / "3", layers, f"{name}/own"),
            "export to Hugging Face, bfloat16, files of 100 MB": exported,
            "read that folder into float32": run_on(4, read_hugging_face, root / "4", layers, f"{name}/hf"),
        }
    rows = [
        [
            phase,
            str(len(ranks)),
            ", ".join(f"{rank['peak'] / 1e6:,.0f}" for rank in ranks),
            f"{max(rank['peak'] for rank in ranks) / whole:.2f}",
            f"{max(rank['seconds'] for rank in ranks):.0f}",
        ]
        for phase, ranks in phases.items()
    ]
    header = ["phase", "processes", "peak of each, MB", "largest / whole", "seconds"]
    said = (
        f"{whole / 4e6:,.0f} M parameters: {whole / 1e6:,.0f} MB in float32 in all, {whole / 4e6:,.0f} MB of them on "
        f"each of 4 processes (shard 4, expert 2); the largest tensor has {largest / 1e6:,.0f} MB."
    )
    write_results(
        Path(__file__).parent / "results",
        "sharded_memory",
        machine(),
        {"whole": whole, "largest": largest, "phases": phases},
        ["", said, "", markdown_table(header, rows), ""],
    )


if __name__ == "__main__":
    main()
