"""What the kills are tried on: commands on models of a few thousand parameters, and what is to be equal afterwards."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from moelab.manifest import MANIFEST
from moelab.training.format import without_clock
from moelab_upcycling.output import MANIFEST as UPCYCLE_MANIFEST

RUN, OUTPUT = "run", "out"
# With every kind of state: a router's bias (a buffer), a loss, moments, a tokenizer, held-out documents.
CONFIG: dict[str, Any] = {
    "name": "small",
    "entry_points": False,
    "observers": [{"name": "recorder"}],
    "model": {
        "vocab_size": 257, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True,
        "moe": {
            "layout": {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            "router": {"name": "sigmoid_topk"},
            "balance_losses": [{"name": "load_balance", "weight": 0.01}],
        },
    },
    "data": {"source": {"name": "embedded", "domains": ["code_py"], "max_bytes_per_domain": 20000}},
    "train": {"steps": 24, "batch_size": 2, "sequence_length": 16, "save_every": 4, "log_every": 3, "threads": 1},
    "evaluation": {"sequences": 2, "every": 8, "sample_tokens": 2},
}  # fmt: skip
EXPORTABLE = (  # what Qwen2-MoE can say
    "model.moe.router.name=softmax_topk", "model.moe.shared_expert={name: gated, intermediate_size: 16}",
)  # fmt: skip
_SKIPPED = re.compile(r"log\.txt|events\.out\.tfevents\..*|.*\.lock")


def load_libraries() -> None:
    """Import what the commands need, so that a fork need not; nothing is computed, since OpenMP can't be forked."""
    import torch

    import moelab_tools.compare.report
    import moelab_tools.exporting
    import moelab_tools.upcycling
    from moelab import registry
    from moelab.data import byte_tokenizer, json_tokenizer  # noqa: F401
    from moelab.training import summary, trainer  # noqa: F401
    from moelab_tools import checkpoints, cli, progress  # noqa: F401

    for name in ("train", "export", "upcycle", "compare"):
        import_module(f"moelab_tools.commands.{name}")
    registry.Registry(entry_points=False)
    registry.packages_distributions = cache(registry.packages_distributions)  # type: ignore[attr-defined]
    registry.packages_distributions()  # type: ignore[attr-defined]
    moelab_tools.exporting.check_auto_tokenizer = lambda *_: None  # imports transformers for seconds, writes nothing
    summary.peak_flops = lambda precision: 1e11  # a third of a second, of what is not compared
    torch.nn.Embedding(1, 1, device="meta")  # its initialisation imports torch._dynamo


def command(*arguments: str | Path) -> Callable[[], int]:
    """A moelab command line, to be run in a fork."""
    from moelab_tools import cli

    return lambda: cli.run([str(one) for one in arguments])


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """small.yaml: CONFIG with these values changed, by section."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {**CONFIG, **{key: {**CONFIG.get(key, {}), **values} for key, values in sections.items()}}
    (folder / "small.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder / "small.yaml"


def contents(folder: Path) -> dict[str, Any]:
    """{relative path: bytes, or JSON without what the clock says} of every file: equal for runs that are equal.

    Left out: log.txt and TensorBoard's events, which hold dates, and locks of killed processes.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not _SKIPPED.fullmatch(path.name):
            found[str(path.relative_to(folder))] = _comparable(path)
    return found


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """A line for each file that is missing, left over or other, JSON down to the key."""
    lines = [f"missing: {name}" for name in sorted(wanted.keys() - found.keys())]
    lines += [f"left over: {name}" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        if wanted[name] != found[name]:
            lines.append(f"differs: {name}{_where(wanted[name], found[name])}")
    return lines


def copy(source: Path, target: Path) -> None:
    """A fresh copy, whatever was there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def _comparable(path: Path) -> Any:
    content = path.read_bytes()
    try:
        if path.name == MANIFEST:
            return _manifest(json.loads(content))
        if path.suffix == ".safetensors":
            return _tensors(content)
        if path.suffix == ".json":
            return _state(json.loads(content))
        if path.suffix == ".jsonl":
            lines = [without_clock(json.loads(line)) for line in content.splitlines()]
            # An upcycling's manifest has its shards in the order in which its processes were done.
            return sorted(lines, key=lambda line: str(line["shard"])) if path.name == UPCYCLE_MANIFEST else lines
    except ValueError:
        return content  # half a file: equal to nothing whole
    if path.name == "config.yaml":
        return content.replace(b"resume: true", b"resume: false")  # how the run was called, not what it is
    return content


def _state(value: Any) -> Any:
    """Without the revision of the folder that a process ran in, either, but with what `logged` counts."""
    if not isinstance(value, dict):
        return value
    logged = value.pop("logged", None)
    value.pop("git", None)
    return without_clock(value) | ({"logged": logged[1:]} if logged else {})


def _manifest(value: dict[str, Any]) -> Any:
    """Without the checksums of files that hold a clock or how the run was called, and so without its own."""
    held = {name: entry for name, entry in value["files"].items() if name not in ("state.json", "config.yaml")}
    return {**value, "files": held, "checksum": None}


def _tensors(content: bytes) -> Any:
    """Rust's library writes the metadata in any order."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _where(one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys(), key=str):
            if one.get(key) != other.get(key):
                return f" at {key}{_where(one.get(key), other.get(key))}"
    if isinstance(one, list) and isinstance(other, list):
        for index, (left, right) in enumerate(zip(one, other, strict=False)):
            if left != right:
                return f" at {index}{_where(left, right)}"
        return f": {len(one)} entries, {len(other)} found"
    return f": {str(one)[:80]!r}, {str(other)[:80]!r} found"
