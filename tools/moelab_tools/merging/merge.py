"""All of `moelab merge`: open, compare, and write one parameter after the other, a matrix of each model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelab.across_versions import as_ever
from moelab.builder import resolve_model
from moelab.checksums import checksum, running
from moelab.data.lineage import LINEAGE, converted, lineage_of
from moelab.data.seen import carried_record
from moelab.errors import CheckpointError, ConfigError, RunFailure
from moelab.hf.save import check_target
from moelab.hub import user_folder
from moelab.integrity import verified
from moelab.loading import open_model, open_weights
from moelab.moe.surgery import expert_rows_of
from moelab.nn.count import moe_blocks
from moelab.nn.names import matching
from moelab.nn.optimizing import trained_parameters
from moelab.nn.transformer import Transformer
from moelab.origin import Origin, read_origin, same_definition
from moelab.paths import user_path
from moelab.registry import Registry
from moelab.seeds import generator
from moelab.tensor_parts import Stored, read_block
from moelab.training.start import Difference, model_differences
from moelab_tools.exporting import write_folder, written_dtype
from moelab_tools.merging.arithmetic import merged
from moelab_tools.merging.declaration import LINEAR, MergeConfig
from moelab_tools.merging.experts import ALIKE, Order, order_of
from moelab_tools.merging.report import (
    REPORT,
    TensorAccount,
    bytes_of,
    compare_options,
    compare_sources,
    read_report,
    report,
)
from moelab_tools.waiting import Waiting

FREE = ("output", "max_shard_size", "plugins", "entry_points")  # which change no number


@dataclass(frozen=True)
class Source:
    """One of the folders, its weights not read."""

    key: str  # that names it
    origin: Origin
    stored: Mapping[str, Stored]
    orders: Mapping[int, Order]  # {layer: of its experts beside the leading folder's}


class MergedWeights:
    """The merged weights as a `StoredWeights`: each is made when it is read."""

    def __init__(self, config: MergeConfig, model: Transformer, sources: Sequence[Source], dtype: torch.dtype) -> None:
        """sources: the base, if there is one, and the models. `dtype`: in which they are written.

        Raises ConfigError for patterns that match nothing.
        """
        self._config, self._sources, self._dtype = config, sources, dtype
        self.accounts: dict[str, TensorAccount] = {}  # of the tensors that were made
        self._hashes = [running() for _ in sources]  # of the one that is made now
        self._matrices = {one.name: one for one in trained_parameters(model, {})}
        self._lead = sources[0].stored
        self.shapes = {name: stored.shape for name, stored in self._lead.items()}
        self._weights = [
            {name: weight for pattern, weight in one.weights.items()
             for name in matching(self.shapes, pattern, f"models.{number}.weights")}
            for number, one in enumerate(config.models)
        ]  # fmt: skip
        self._rows = {
            f"layers.{block.layer_id}.mlp.router.{name}": (block.layer_id, block.layout.num_experts)
            for block in moe_blocks(model)
            for name in _rows_of(block.router)
        }
        self._banks = {
            f"layers.{block.layer_id}.mlp.experts.{name}": block.layer_id
            for block in moe_blocks(model)
            for name, _ in block.experts.named_parameters()
        }

    def read_into(self, name: str, tensor: Tensor) -> None:
        """Merge it, a matrix at a time."""
        account = self.accounts[name] = TensorAccount(self.shapes[name])
        if not self._lead[name].dtype.is_floating_point:  # a count, of which there is no mean
            read_block(self._lead[name], (0,) * tensor.dim(), tensor)
            account.checksum = checksum(bytes_of(tensor.to(self._dtype)))
            account.sources = [checksum(bytes_of(tensor.float()))]
            return
        self._hashes = [running() for _ in self._sources]
        out = torch.empty(self.shapes[name])
        one = self._matrices.get(name)
        if name in self._banks:
            blocks = one.blocks if one is not None else 1
            rows = out.shape[1] // blocks
            for expert in range(out.shape[0]):
                for block in range(blocks):
                    self._fill(
                        name, out[expert : expert + 1, block * rows : (block + 1) * rows], (expert, block * rows)
                    )
        else:
            self._fill(name, out, ())
        tensor.copy_(out)
        account.checksum = checksum(bytes_of(out.to(self._dtype)))
        account.sources = [one.hexdigest() for one in self._hashes]

    def _fill(self, name: str, out: Tensor, at: tuple[int, ...]) -> None:
        """A block of one parameter, which begins `at` its first axes."""
        read = [self._read(source, name, out, at) for source in self._sources]
        for one, values in zip(self._hashes, read, strict=True):
            one.update(bytes_of(values))
        base = None if self._config.base is None else read.pop(0)
        weights = [own.get(name, one.weight) for own, one in zip(self._weights, self._config.models, strict=True)]
        if self._config.normalizes and self._config.method == LINEAR and not sum(weights):
            raise ConfigError(f"models: the weights of '{name}' add up to 0, and they are divided by")
        stream = partial(generator, self._config.seed, "dare", name, *at)
        out.copy_(merged(self._config, base, read, weights, stream, self.accounts[name]))

    def _read(self, source: Source, name: str, like: Tensor, at: tuple[int, ...]) -> Tensor:
        found, stored = torch.empty(like.shape), source.stored[name]
        first = at + (0,) * (like.dim() - len(at))
        if name in self._banks and self._banks[name] in source.orders:
            first = (source.orders[self._banks[name]].experts[first[0]], *first[1:])
        read_block(stored, first, found)
        if name in self._rows and self._rows[name][0] in source.orders:
            layer, count = self._rows[name]
            found[:count] = found[list(source.orders[layer].experts)]
        return found


def run_merge(config: MergeConfig, registry: Registry, *, verify: bool = True, trust: bool = False) -> Iterator[str]:
    """Do it; -> lines to print. Raises UserError before anything is written for whatever can't be."""
    output = user_path(config.output, "output")
    check_target(output)
    model, sources, lines = _opened(config, registry, verify, trust)
    yield from lines
    lead = sources[0].origin
    dtype, _ = written_dtype(lead, config.dtype)
    weights = MergedWeights(config, model, sources, dtype)
    folders = [source.origin.folder for source in sources]
    identity = _identity(config, registry)
    sources_told = [lineage_of(folder, folder.name) for folder in folders]
    more = {**carried_record(folders), LINEAGE: converted(identity, config.seed, sources_told).to_bytes()}

    def closing() -> dict[str, bytes]:
        own = {**identity, "seed": config.seed}
        return {REPORT: report(own, _named(sources), str(dtype).removeprefix("torch."), weights.accounts)}

    yield from write_folder(
        lead, model, weights, output, dtype=config.dtype, max_shard_size=config.max_shard_size, force=False, more=more,
        closing=closing,
    )  # fmt: skip


def verify_merge(config: MergeConfig, registry: Registry, *, trust: bool = False) -> str:
    """Merge again, and compare with what the output holds; -> what was compared. RunFailure for what differs.

    What differs is looked for in this order: the options, a source, the output.
    """
    output = user_path(config.output, "output")
    said = read_report(output)
    compare_options(said, {**_identity(config, registry), "seed": config.seed}, registry)
    model, sources, _ = _opened(config, registry, True, trust)
    weights = MergedWeights(config, model, sources, written_dtype(sources[0].origin, config.dtype)[0])
    there = open_weights(verified(output), registry=registry)
    count = 0
    with Waiting("verifying, tensors", len(weights.shapes)) as waiting:
        for name, shape in weights.shapes.items():
            stored: Stored = there.stored[name]  # type: ignore[attr-defined]
            again, found = torch.empty(shape, dtype=stored.dtype), torch.empty(shape, dtype=stored.dtype)
            weights.read_into(name, again)
            compare_sources(said, name, weights.accounts[name].sources, _named(sources))
            read_block(stored, (0,) * len(shape), found)
            if not torch.equal(again, found):
                raise RunFailure(f"{output}: '{name}' is not what this config makes of its sources")
            count += again.nbytes
            waiting.step()
    return f"{output}: as this config makes it of its sources, {len(weights.shapes)} tensors, {count / 1e9:.3f} GB"


def _opened(
    config: MergeConfig, registry: Registry, verify: bool, trust: bool
) -> tuple[Transformer, list[Source], list[str]]:
    """The leading model without a number in it, all sources, and what is to be told of them."""
    found: list[tuple[str, Origin, Any]] = []
    for key, path in config.folders:
        try:
            origin = read_origin(verified(user_folder(path, key), verify=verify))
            found.append((key, origin, open_weights(origin.folder, registry=registry)))
        except CheckpointError as error:
            raise CheckpointError(f"{key}: {error}") from error
    lead = found[0][1]
    model, _ = open_model(lead.folder, registry=registry, trust=trust)
    for key, origin, weights in found[1:]:
        _check_same(key, origin, lead, registry)
        if dict(weights.shapes) != dict(found[0][2].shapes):
            name = next(n for n in sorted({*weights.shapes, *found[0][2].shapes})
                        if weights.shapes.get(n) != found[0][2].shapes.get(n))  # fmt: skip
            raise ConfigError(
                f"{key}: {origin.folder} has '{name}' of shape {weights.shapes.get(name)}, {lead.folder} of "
                f"{found[0][2].shapes.get(name)}; only checkpoints of one model can be merged"
            )
    sources = [Source(found[0][0], lead, found[0][2].stored, {})]
    lines = [_says(config, found[0][1])]
    for key, origin, weights in found[1:]:
        orders = _orders(model, found[0][2].stored, weights.stored)
        lines += _told(key, origin.folder, orders, config.align_experts)
        used = {layer: order for layer, order in orders.items() if order.differs} if config.align_experts else {}
        sources.append(Source(key, origin, weights.stored, used))
    return model, sources, lines


def _named(sources: Sequence[Source]) -> list[tuple[str, Path]]:
    return [(source.key, source.origin.folder) for source in sources]


def _check_same(key: str, origin: Origin, lead: Origin, registry: Registry) -> None:
    ours, theirs = lead.model, origin.model
    plugins = lead.registry(registry), origin.registry(registry)
    resolve_model(ours, plugins[0])
    resolve_model(theirs, plugins[1])
    differing: list[Difference] = list(model_differences(ours, theirs, *plugins))
    if differing:
        d = differing[0]
        raise ConfigError(
            f"{key}: {origin.folder} is another architecture than {lead.folder}: {d.key} is {d.checkpoint!r} there and "
            f"{d.config!r} here; only checkpoints of one model can be merged"
        )
    mine, other = lead.own_tokenizer(), origin.own_tokenizer()
    if (mine is None) != (other is None) or (
        mine is not None and other is not None and not same_definition(mine.files(), other.files())
    ):
        raise ConfigError(
            f"{key}: {origin.folder} has another tokenizer than {lead.folder}, whose rows stand for other tokens; "
            "only checkpoints of one tokenizer can be merged"
        )


def _orders(model: Transformer, lead: Mapping[str, Stored], other: Mapping[str, Stored]) -> dict[int, Order]:
    names = {block.layer_id: f"layers.{block.layer_id}.mlp.experts.gate_up" for block in moe_blocks(model)}
    return {layer: order_of(lead[name], other[name]) for layer, name in names.items()}


def _told(key: str, folder: Path, orders: Mapping[int, Order], aligned: bool) -> Iterator[str]:
    for layer, order in orders.items():
        if order.differs:
            shown = ", ".join(map(str, order.experts[:16])) + (", ..." if len(order.experts) > 16 else "")
            cosines = f"cosine {order.so:.2f} so, {order.as_they_are:.2f} by their numbers"
            if aligned:
                yield f"{key}: layer {layer}: experts of {folder} are taken in the order {shown} ({cosines})"
            else:
                yield (
                    f"warning: {key}: layer {layer}: the experts of {folder} are more like the others in the order "
                    f"{shown} ({cosines}): unlike experts are merged; align_experts=true puts them in order"
                )
        elif order.as_they_are < ALIKE:
            yield (
                f"warning: {key}: layer {layer}: the experts of {folder} are like those of no other order (cosine "
                f"{order.as_they_are:.2f}): trained from unlike starts, a mean of them is neither"
            )


def _says(config: MergeConfig, lead: Origin) -> str:
    models = ", ".join(f"{one.path} x {one.weight:g}" for one in config.models)
    return f"{config.method} of {models}" + (f" on {lead.folder}" if config.base else "")


def _identity(config: MergeConfig, registry: Registry) -> dict[str, Any]:
    """What numbers hang on but the seed and the sources, as any version would have stored it."""
    tree = {key: value for key, value in asdict(config).items() if key not in (*FREE, "seed", "base")}
    tree["models"] = [{key: value for key, value in one.items() if key != "path"} for one in tree["models"]]
    return {"merge": as_ever(tree, MergeConfig, registry)}


def _rows_of(router: object) -> tuple[str, ...]:
    """Tensors of a router of which row e is expert e's; none where it can't say."""
    rows = expert_rows_of(router, list(getattr(router, "state_dict", dict)()))
    return () if isinstance(rows, str) else tuple(rows.tensors)
