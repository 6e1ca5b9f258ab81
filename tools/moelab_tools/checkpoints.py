"""What the commands ask of a checkpoint folder beside its model."""

from __future__ import annotations

from pathlib import Path

from moelab.checkpoint import is_moelab, read_run_config, resolve_checkpoint
from moelab.config.files import is_override
from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.data.tokenizer import Tokenizer, load_tokenizer
from moelab.errors import CheckpointError


def tokenizer_of(path: Path, given: str | None) -> Tokenizer:
    """The tokenizer asked for, or the one stored in the checkpoint."""
    if given is not None:
        return load_tokenizer(given)
    folder = resolve_checkpoint(path)
    if is_moelab(folder) and read_run_config(folder).data.tokenizer == "bytes":
        return load_tokenizer("bytes")
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder}: holds no tokenizer.json; name one with --tokenizer, or use --tokenizer bytes")
    return load_tokenizer(str(folder / "tokenizer.json"))


def run_config_of(path: Path) -> RunConfig | None:
    """The config a moelab checkpoint was trained under; None for a Hugging Face folder."""
    folder = resolve_checkpoint(path)
    return read_run_config(folder) if is_moelab(folder) else None


def evaluation_config(path: Path, arguments: tuple[str, ...]) -> RunConfig:
    """The run config that says what to evaluate on: the checkpoint's own, under the given files and overrides."""
    own = resolve_checkpoint(path) / "config.yaml"
    files = [argument for argument in arguments if not is_override(argument)]
    below = own if own.is_file() and not files else None
    if below is None and not arguments:
        raise CheckpointError(f"{path}: says nothing of its data; name a config, as in configs/train/tiny_moe.yaml")
    loaded = load_config([*arguments, *(() if below else ("run_dir=unused",))], RunConfig, below=below)
    loaded.config.search_path += [str(folder.resolve()) for folder in loaded.search_path]
    return loaded.config
