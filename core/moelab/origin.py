"""What a folder of weights says of itself beside them: its model's config, its tokenizer, and what goes along.

A Hugging Face folder says it in config.json and the files beside it; a moelab checkpoint in config.yaml, and in the
files that its run carried along. Whoever starts from a folder, evaluates or explains it takes this for what a config
leaves out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab import launcher
from moelab.checkpoint import CONFIG, is_moelab, read_run_config, resolve_checkpoint
from moelab.config.files import Layer, subtree
from moelab.config.model import ModelConfig
from moelab.config.stages import run_own
from moelab.config.stored import read_stored_tree
from moelab.data.json_tokenizer import JsonTokenizer
from moelab.data.tokenizer import Tokenizer, load_tokenizer
from moelab.data.tokenizer_file import definition_of
from moelab.errors import CheckpointError, ConfigError
from moelab.hf.carried import (
    GENERATION_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    carried_files,
    generation_settings,
    terms,
    token_ids,
    tokenizer_side_files,
)
from moelab.hf.config import CONFIG_FILE, read_config, read_fields
from moelab.hf.files import READING, read_json
from moelab.hf.gguf_file import gguf_of
from moelab.hub import user_folder
from moelab.integrity import Choice, Verify, newest_whole
from moelab.lock import LOCK, check_free
from moelab.paths import unresolved_hint, user_path
from moelab.records import Record
from moelab.registry import Registry
from moelab.safe_files import read_bytes
from moelab.trust import stored_registry

FIELDS_FILE = "config_fields.json"  # in a moelab checkpoint: what of config.json goes along
BYTES = "bytes"
SAMPLING_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")  # of generation_config.json
_NOT_IDS = ("version", "truncation", "padding", "post_processor")  # keys of tokenizer.json that leave ids alone


@dataclass(frozen=True)
class Origin:
    """A folder of weights, resolved."""

    folder: Path
    model: ModelConfig
    tokenizer: str | None  # as data.tokenizer names it; None where the folder has none
    own: Choice | None = None  # where the very run that wrote it goes on from it

    def registry(self, named: Registry) -> Registry:
        """The plugins that `model` is built with: those that the user named. CheckpointError where it needs others."""
        return stored_registry(read_run_config(self.folder), self.folder, registry=named) if self.is_run else named

    def own_tokenizer(self) -> Tokenizer | None:
        """What lies with the weights; of a GGUF file what its metadata makes. None where there is none."""
        if self.tokenizer is not None:
            return load_tokenizer(self.tokenizer)
        files = carried_files(self.folder) if gguf_of(self.folder) is not None else {}
        if TOKENIZER_FILE not in files:
            return None
        return JsonTokenizer(files[TOKENIZER_FILE], str(self.folder), files[TOKENIZER_CONFIG_FILE])

    @property
    def is_run(self) -> bool:
        """Whether it is a moelab checkpoint, which has the config of its run."""
        return is_moelab(self.folder)

    def layer(self) -> Layer:
        """What a config that starts from this folder need not say, as its lowest layer."""
        tree: dict[str, Any] = {"model": dataclasses.asdict(self.model)}
        if is_moelab(self.folder):  # as text that is data: nothing in it is looked up
            tree = {"model": read_stored_tree(self.folder / CONFIG)["model"]}
        if self.tokenizer is not None:
            tree["data"] = {"tokenizer": self.tokenizer}
        return Layer(f"the checkpoint {self.folder}", tree, data=True)


def read_origin(path: str | Path) -> Origin:
    """Of a run folder (its newest checkpoint), a moelab checkpoint or a Hugging Face folder.

    Raises CheckpointError naming the file and the cure.
    """
    folder = resolve_checkpoint(user_folder(path))
    model = read_run_config(folder).model if is_moelab(folder) else read_config(folder)
    return Origin(folder, model, _tokenizer(folder))


def origin_of(config: Mapping[str, Any], *, verify: Verify = True) -> Origin | None:
    """Where the weights of a run come from, by its plain config: its own newest checkpoint, or `train.init_from`.

    Of its own the newest that is as it was written (not `verify`: the newest), CheckpointError where all are damaged,
    UserError while another run of this machine writes there: what it finds could be gone when it is asked for.
    """
    run_dir = user_path(config["run_dir"], "run_dir") if config.get("run_dir") else None
    if run_dir is not None and (config.get("resume") or launcher.has_begun(run_dir)):
        check_free(run_dir / LOCK, what=f"run_dir: {run_dir}", otherwise="choose another run_dir")
        choice = newest_whole(run_dir, verify=verify)
        if choice.folder is not None:
            return dataclasses.replace(read_origin(choice.folder), own=choice)
    init_from = subtree(config, ("train", "init_from"))
    if init_from is None:
        return None
    try:
        return read_origin(user_folder(init_from, "train.init_from"))
    except CheckpointError as error:
        raise CheckpointError(f"train.init_from: {error}{unresolved_hint(init_from)}") from error


def origin_layer(config: Mapping[str, Any], *, verify: Verify = True) -> Layer | None:
    """For `load_config(below=...)`: what `origin_of` a config says.

    A run's own checkpoint says the model of the stage that made it: what stages leave out is as it was for the run.
    """
    origin = origin_of(config, verify=verify)
    if origin is None:
        return None
    layer = origin.layer()
    if origin.own:
        stages = read_stored_tree(origin.folder / CONFIG).get("stages")
        layer.tree["model"] |= run_own(config.get("stages"), stages, "model")
    return layer


def same_tokenizer(tokenizer: Tokenizer, folder: Path) -> bool:
    """Whether `folder` has this tokenizer: equal but for what leaves ids alone."""
    return _alike(definition_of(tokenizer.files()[TOKENIZER_FILE], TOKENIZER_FILE), read_json(folder / TOKENIZER_FILE))


def same_definition(files: Mapping[str, bytes], others: Mapping[str, bytes]) -> bool:
    """The same of two tokenizers that are no files on disk."""
    ours, theirs = (definition_of(found[TOKENIZER_FILE], TOKENIZER_FILE) for found in (files, others))
    return _alike(ours, theirs)


def _alike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return all(ours.get(key) == theirs.get(key) for key in (ours.keys() | theirs.keys()) - set(_NOT_IDS))


def check_vocabulary(vocab_size: int, tokenizer: Tokenizer, spec: str) -> None:
    """Raises ConfigError where the tokenizer gives ids that the embedding has no row for."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is less than the {tokenizer.vocab_size} tokens of the tokenizer '{spec}': "
            f"its largest id is {tokenizer.vocab_size - 1}; use the tokenizer that the weights were trained with, or a "
            "model with a row for each of them"
        )


def tokenizer_files(spec: str) -> dict[str, bytes]:
    """What stands beside the tokenizer.json that `data.tokenizer` names."""
    if spec == BYTES:
        return {}
    path = user_folder(spec, "data.tokenizer")
    return tokenizer_side_files(path if path.is_dir() else path.parent)


def model_files(folder: Path, *, ids: bool) -> dict[str, bytes]:
    """What goes along with the weights of `folder`; `ids`: also what holds token ids."""
    found = terms(folder)
    if ids:
        found |= generation_settings(folder)
        fields = carried_ids(folder)
        if fields:
            found[FIELDS_FILE] = (json.dumps(fields, indent=2) + "\n").encode()
    return found


def carried_ids(folder: Path) -> dict[str, Any]:
    """The token ids of config.json, or those that a moelab checkpoint carries along."""
    gguf = gguf_of(folder)
    if gguf is not None:
        return token_ids(read_fields(folder).values, gguf)
    path = folder / (FIELDS_FILE if is_moelab(folder) else CONFIG_FILE)
    return token_ids(read_json(path), path) if path.is_file() else {}


def end_token_ids(folder: Path) -> tuple[tuple[int, ...], str] | None:
    """(every id that ends a generated text, the file that says so); None where no file does.

    As transformers decides: generation_config.json, else config.json.
    """
    path = folder / GENERATION_FILE
    said = token_ids(read_json(path), path).get("eos_token_id") if path.is_file() else None
    name = GENERATION_FILE
    if said is None:
        said, name = carried_ids(folder).get("eos_token_id"), CONFIG_FILE
    if said is None:
        return None
    return (tuple(said) if isinstance(said, list) else (said,)), name


def sampling_settings(folder: Path) -> dict[str, Any]:
    """How generation_config.json wants texts drawn, as fields of `nn.sampling.Sampling`; nothing where it doesn't say.

    `do_sample: false` is a temperature of 0. What stands there without a word on sampling is taken as said, where
    transformers would be greedy. Raises CheckpointError for values without sense.
    """
    path = folder / GENERATION_FILE
    if not path.is_file():
        return {}
    record = Record(str(path), read_json(path), READING)
    found: dict[str, Any] = {key: record.number(key, None, least=0.0) for key in SAMPLING_NUMBERS}
    found["top_k"] = record.integer("top_k", None, least=0)
    found["max_new_tokens"] = record.integer("max_new_tokens", None, least=1)
    if record.flag("do_sample", None) is False:
        found["temperature"] = 0.0
    return {key: value for key, value in found.items() if value is not None}


def _tokenizer(folder: Path) -> str | None:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return BYTES if is_moelab(folder) and read_run_config(folder).data.tokenizer == BYTES else None
    if read_bytes(path, READING) == load_tokenizer(BYTES).files()[TOKENIZER_FILE]:
        return BYTES
    return str(folder)
