"""What a run starts from: random weights, or a checkpoint's, of which config and tokenizer must be the config's own.

Most of what makes a model another one shows in no shape: theta, eps, heads, top-k, normalisation. So the checkpoint's
config is compared key by key, and whatever differs is refused, unless `train.init_overrides` names it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moelab.builder import build_model, resolve_model
from moelab.checkpoint import OwnWeights, model_tensors, read_state
from moelab.config.model import ModelConfig
from moelab.config.run import RunConfig
from moelab.data.tokenizer import Tokenizer
from moelab.errors import CheckpointError, ConfigError
from moelab.hf.carried import tokenizer_side_files
from moelab.hookspecs import ROUTERS, SHARED_EXPERTS, ExtensionPoint
from moelab.hub import commit_of, user_folder
from moelab.integrity import Verify, verified
from moelab.layouts import build_layouts
from moelab.loading import open_weights
from moelab.moe.per_layer import layer_parts
from moelab.nn.transformer import Transformer
from moelab.origin import Origin, model_files, origin_of, read_origin, same_definition, same_tokenizer, tokenizer_files
from moelab.registry import Registry
from moelab.stored_weights import StoredWeights, build_empty, fill

TOKENIZER = "data.tokenizer"
OVERRIDES, COMMIT = "init_overrides", "init_commit"  # of summary.json and of a checkpoint's state.json
# Of the dense part, what decides the function. Not: initializer_range, which only what is made anew sees, and
# max_position_embeddings, which plain rotary embedding doesn't read (a longer sequence than the checkpoint's is said).
FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling", "qkv_bias", "o_bias", "attention_sinks",
    "use_qk_norm",
    "tie_word_embeddings", "activation", "mlp_bias",
)  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
POINTS: dict[str, ExtensionPoint[Any, Any]] = {"router": ROUTERS, "shared_expert": SHARED_EXPERTS}


@dataclass(frozen=True)
class Difference:
    """A key under which a config and a checkpoint mean different functions."""

    key: str
    config: Any
    checkpoint: Any

    def covered_by(self, names: Sequence[str]) -> bool:
        """Whether one of the names is the key or lies above it."""
        plain = self.key.replace('"', "")
        return any(plain == name or plain.startswith(f"{name}.") for name in (n.replace('"', "") for n in names))


@dataclass(frozen=True)
class Start:
    """How a run begins."""

    origin: Origin | None = None
    overrides: dict[str, Any] = field(default_factory=dict)  # {key: {config, checkpoint}} of the named differences
    commit: str | None = None  # of the Hugging Face hub, where the weights have their name from there
    told: tuple[str, ...] = ()  # a line for each, and for whatever else should be known
    files: dict[str, bytes] = field(default_factory=dict)  # go along into checkpoints and exports


def find_start(config: RunConfig, tokenizer: Tokenizer, registry: Registry, *, verify: Verify = True) -> Start:
    """Compare the config with what it starts from, before anything is built.

    Raises ConfigError naming the key that differs, both values and the cure; CheckpointError, where it is to `verify`,
    for a checkpoint that was changed after it was written.
    """
    names = config.train.init_overrides
    origin = origin_of(dataclasses.asdict(config), verify=verify)
    if origin is None:
        idle = "train.init_overrides: there is no train.init_from, so there is nothing to override"
        return Start(told=(idle,) if names else (), files=tokenizer_files(config.data.tokenizer))
    if origin.own:  # which restores everything, and is compared as a whole (`check_same_run`)
        state = read_state(origin.folder)
        commit = state.get(COMMIT)
        return Start(
            origin,
            state.get(OVERRIDES, {}),
            commit if isinstance(commit, str) else None,
            files=tokenizer_side_files(origin.folder) | model_files(origin.folder, ids=True),
        )
    verified(origin.folder, verify=verify)
    found = list(differences(config, origin, registry, tokenizer))
    refuse_others(found, origin, names)
    if TOKENIZER not in names:
        _check_gguf_tokenizer(config.data.tokenizer, tokenizer, origin)
    told = [f"train.init_overrides: {d.key} is {d.config!r}, where {origin.folder} has {d.checkpoint!r}" for d in found]
    told += [
        f"train.init_overrides: {name} overrides nothing: it is as in {origin.folder}"
        for name in names
        if not any(difference.covered_by([name]) for difference in found)
    ]
    if origin.tokenizer is None and origin.own_tokenizer() is None:
        told.append(
            f"train.init_from: {origin.folder} holds no tokenizer.json, so whether its weights know the ids of "
            f"data.tokenizer '{config.data.tokenizer}' can't be told"
        )
    with_ids = not any(difference.key == TOKENIZER for difference in found)
    if not with_ids:
        told.append(f"train.init_from: the token ids and generation settings of {origin.folder} mean nothing any more")
    return Start(
        origin,
        overrides={d.key: {"config": d.config, "checkpoint": d.checkpoint} for d in found},
        commit=commit_of(origin.folder),
        told=tuple(told),
        files=tokenizer_files(config.data.tokenizer) | model_files(origin.folder, ids=with_ids),
    )


def _check_gguf_tokenizer(spec: str, tokenizer: Tokenizer, origin: Origin) -> None:
    """A GGUF file's lies in its metadata, where `data.tokenizer` can't name it. Raises ConfigError for another one."""
    theirs = origin.own_tokenizer() if origin.tokenizer is None else None
    if theirs is not None and not same_definition(tokenizer.files(), theirs.files()):
        raise ConfigError(
            f"data.tokenizer: '{spec}' is not the one in the metadata of {origin.folder}; write both out, `moelab "
            f"export {origin.folder} FOLDER`, and start from FOLDER, or write train.init_overrides=[{TOKENIZER}] to "
            "mean another"
        )


def differences(
    config: RunConfig, origin: Origin, registry: Registry, tokenizer: Tokenizer | None
) -> Iterator[Difference]:
    """Every key under which a resolved config and a checkpoint differ in what is computed, the tokenizer included."""
    stored = copy.deepcopy(origin.model)
    plugins = origin.registry(registry)
    resolve_model(stored, plugins)
    yield from model_differences(config.model, stored, registry, plugins)
    length, ours, theirs = config.train.sequence_length, config.model, stored
    if ours.max_position_embeddings != theirs.max_position_embeddings and length > theirs.max_position_embeddings:
        key = "model.max_position_embeddings"
        yield Difference(key, ours.max_position_embeddings, theirs.max_position_embeddings)
    if tokenizer is not None and origin.tokenizer is not None and not same_tokenizer(tokenizer, origin.folder):
        yield Difference(TOKENIZER, config.data.tokenizer, origin.tokenizer)


def same_model(
    config: RunConfig, registry: Registry, tokenizer: Tokenizer | None, *, verify: Verify = True
) -> Callable[[str, str], StoredWeights]:
    """-> (folder, key that names it) -> its weights, none read yet.

    That raises ConfigError naming the key where they are of another model or another tokenizer than the config's, and
    CheckpointError for a folder that can't be read. No `tokenizer`: it is not compared.
    """

    def opened(folder: str, key: str) -> StoredWeights:
        try:
            origin = read_origin(verified(user_folder(folder, key), verify=verify))
            weights = open_weights(origin.folder, registry=registry)
        except CheckpointError as error:
            raise CheckpointError(f"{key}: {error}") from error
        found = list(differences(config, origin, registry, tokenizer))
        if found:
            lines = "; ".join(f"{d.key}: {d.config!r} here, {d.checkpoint!r} there" for d in found[:3])
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ConfigError(
                f"{key}: {origin.folder} is another model than the one that is trained ({lines}{more}); name a "
                "checkpoint of the same one (of experts that were upcycled, the upcycled model)"
            )
        return weights

    return opened


def model_differences(ours: ModelConfig, theirs: ModelConfig, mine: Registry, other: Registry) -> Iterator[Difference]:
    """Of two resolved model configs; a part that several layers share is named once."""
    for key, attribute in {**{key: key for key in FIELDS}, "head_dim": "attention_head_dim"}.items():
        a, b = getattr(ours, attribute), getattr(theirs, attribute)
        if a != b:
            yield Difference(f"model.{key}", a, b)
    if (ours.latent_attention is None) != (theirs.latent_attention is None):
        kinds = ("grouped-query" if model.latent_attention is None else "latent" for model in (ours, theirs))
        yield Difference("model.latent_attention", *kinds)
    elif ours.latent_attention is not None and theirs.latent_attention is not None:
        a, b = dataclasses.asdict(ours.latent_attention), dataclasses.asdict(theirs.latent_attention)
        yield from (Difference(f"model.latent_attention.{key}", a[key], b[key]) for key in a if a[key] != b[key])
    if ours.num_hidden_layers != theirs.num_hidden_layers:
        return
    if (ours.moe is None) != (theirs.moe is None):
        yield Difference("model.moe", *("none" if model.moe is None else "experts" for model in (ours, theirs)))
        return
    for key in ("moe_latent_size", "moe_latent_norm") if ours.moe is not None else ():
        a, b = getattr(ours.moe, key), getattr(theirs.moe, key)
        if a != b:
            yield Difference(f"model.moe.{key}", a, b)
    found: dict[str, Difference] = {}
    for where, a, b in _parts(ours, theirs, mine, other):
        for key in ["name"] if a.get("name") != b.get("name") else sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                found.setdefault(f"{where}.{key}", Difference(f"{where}.{key}", a.get(key), b.get(key)))
    yield from found.values()


def _parts(
    ours: ModelConfig, theirs: ModelConfig, mine: Registry, other: Registry
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(key, our options, the checkpoint's) of each part of each layer that has experts on either side."""
    if ours.moe is None or theirs.moe is None:
        return
    left, right = build_layouts(ours, mine), build_layouts(theirs, other)
    here, there = layer_parts(ours.moe, ours.num_hidden_layers), layer_parts(theirs.moe, theirs.num_hidden_layers)
    for layer_id in sorted(left.keys() | right.keys()):
        a, b = left.get(layer_id), right.get(layer_id)
        where = here[layer_id].where("layout")
        if a is None or b is None:
            yield (
                where,
                {f"layer {layer_id}": "dense" if a is None else "experts"},
                {f"layer {layer_id}": "dense" if b is None else "experts"},
            )
            continue
        yield where, dataclasses.asdict(a), dataclasses.asdict(b)
        for part, point in POINTS.items():
            where = here[layer_id].where(part)
            yield (
                where,
                mine.resolve(point, getattr(here[layer_id], part), where),
                other.resolve(point, getattr(there[layer_id], part), where),
            )


def refuse_others(found: Sequence[Difference], origin: Origin, names: Sequence[str]) -> None:
    """Raises ConfigError for the differences that `names` don't cover."""
    found = [difference for difference in found if not difference.covered_by(names)]
    if not found:
        return
    lines = "; ".join(f"{d.key}: {d.config!r} here, {d.checkpoint!r} there" for d in found[:5])
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    keys = ", ".join(d.key.replace('"', "") for d in found[:5])
    raise ConfigError(
        f"{found[0].key}: is not as in the checkpoint {origin.folder} ({lines}{more}); leave it out of the config, "
        f"which then takes the checkpoint's, or write train.init_overrides=[{keys}] to mean another model than these "
        "weights are"
    )


def starting_model(config: RunConfig, registry: Registry, device: torch.device, start: Start) -> Transformer:
    """A fresh model, or the weights of `start`, its own where it is resumed, in the config's own parts.

    The checkpoint must have the same parameters: a router with state of its own keeps what `seed` gives it. Each is
    read to where it stays, so that it takes the memory of the weights once, and nothing is drawn for it.
    """
    weights = starting_weights(config, registry, start)
    if weights is None:
        return build_model(config.model, registry, device=device, seed=config.seed)
    model = build_empty(config.model, registry, weights.shapes, device=device, seed=config.seed)
    fill(model, weights)
    return model


def starting_weights(config: RunConfig, registry: Registry, start: Start) -> StoredWeights | None:
    """The weights that a run starts from, none read yet; None where it begins at random.

    Raises CheckpointError where they are not those of the config's model; of its own, which another config can't take,
    it says nothing and gives None: what is resumed is compared as a whole later (`check_same_run`).
    """
    if start.origin is None:
        return None
    if start.origin.own:
        own = OwnWeights(start.origin.folder)
        hollow = build_model(config.model, registry, device="meta", seed=None)
        return own if {name: tuple(t.shape) for name, t in model_tensors(hollow).items()} == own.shapes else None
    try:
        weights = open_weights(start.origin.folder, registry=registry)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"train.init_from: {error}") from error
    if not config.model.tie_word_embeddings and HEAD not in weights.shapes:
        weights = _Untied(weights)
    _check_fit(config, registry, weights)
    return weights


class _Untied:
    """Weights of a model that ties its head to its embedding, for one that doesn't: its head begins as a copy."""

    def __init__(self, inner: StoredWeights) -> None:
        self._inner = inner
        self.shapes = {**inner.shapes, HEAD: inner.shapes[EMBEDDING]}

    def read_into(self, name: str, tensor: torch.Tensor) -> None:
        self._inner.read_into(EMBEDDING if name == HEAD else name, tensor)


def _check_fit(config: RunConfig, registry: Registry, weights: StoredWeights) -> None:
    """Raises CheckpointError where the config's model isn't made of these tensors; no memory is asked for."""
    model = build_model(config.model, registry, device="meta", seed=None)
    wanted, found = model_tensors(model), weights.shapes
    missing = sorted({name for name, _ in model.named_parameters()} - found.keys())  # a tied matrix comes once
    misfits = [n for n in sorted(wanted.keys() & found.keys()) if tuple(wanted[n].shape) != found[n]]
    unexpected = sorted(found.keys() - wanted.keys())
    if missing or misfits or unexpected:
        raise CheckpointError(
            f"train.init_from: {config.train.init_from} does not fit `model`: missing {missing[:3]}, of another shape "
            f"{misfits[:3]}, unexpected {unexpected[:3]}; give `model` the checkpoint's dimensions"
        )
