"""The flight recorder: what becomes of the routing on one fixed held-out batch, from before the first step to the last.

Its numbers go to the run's log (docs/metrics.md, "Probe"), its matrices to `recorder.safetensors` in the run folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moelab import Component, component, hookimpl
from moelab.atomic import write_file
from moelab.moe.probe import Probe, served_map
from moelab.moe.routing import LayerRecord
from moelab_plugins.observers import _recorder_file as file
from moelab_plugins.observers import _recorder_measures as measure

AT_START = ("token_specialisation", "domain_specialisation", "domain_specialisation_beyond_tokens")


@dataclass
class RecorderOptions:
    matrices: bool = True  # keep recorder.safetensors: who went where, and what was counted from it


@dataclass(frozen=True)
class _Tokens:
    """Of the probe's tokens, the same at every look."""

    index: Tensor  # [T] int64, of each token's id among the V different ones
    ids: Tensor  # [V] int64
    domain: Tensor  # [T] int64
    by_domain: Tensor  # [V, n] float64, occurrences

    @classmethod
    def of(cls, probe: Probe) -> _Tokens:
        ids, index = probe.token_id.unique(return_inverse=True)
        both = torch.zeros(len(ids), len(probe.domains), dtype=torch.float64, device=ids.device)
        one = torch.ones(len(index), dtype=torch.float64, device=ids.device)
        return cls(index, ids, probe.domain_id, both.index_put_((index, probe.domain_id), one, accumulate=True))


class Recorder:
    """Saturation, churn, co-activation, specialisation, similarity of experts, and what the routed output weighs.

    Looks at one batch of held-out text before the first step, every `train.probe_every` steps and after the last, with
    one forward pass (benchmarks/recorder.py says what it costs); at the steps between, it does nothing.
    Source: OLMoE (2409.02060) 5.1 to 5.4, equations 5 to 8, whose text and scripts were read; departures stand at the
    formulas.
    """

    def __init__(self, options: RecorderOptions, run_dir: Path) -> None:
        self.options, self.run_dir = options, run_dir
        self.looks = file.Looks()
        self._packed: bytes | None = None  # the looks, as they go into a checkpoint
        self._tokens: _Tokens | None = None

    def on_train_begin(self, run_dir: Path, checkpoint: Path | None) -> None:
        self.run_dir = run_dir
        if checkpoint is not None:  # the run folder's own file may have been thinned since
            self.looks, self._packed = file.read(checkpoint)

    def on_probe(self, step: int, probe: Probe) -> dict[str, float]:
        """Numbers by tag; those of the first look are kept for the looks that follow."""
        tokens = self._tokens = self._tokens or _Tokens.of(probe)
        self._same_text(probe)
        maps = {record.layer_id: served_map(record.routing) for record in probe.records}
        matrices: dict[str, NDArray[np.generic]] = {}
        layers: dict[int, dict[str, float]] = {}
        for record in probe.records:
            now = maps[record.layer_id]
            found = self._layer(record, now, tokens, matrices) | self._since(record.layer_id, now, step)
            layers[record.layer_id] = {key: float(value) for key, value in found.items() if value is not None}
        at_start = self._at_start(tokens)
        self.looks.add(step, {layer: now.cpu().numpy() for layer, now in maps.items()})
        if self.options.matrices:
            for layer in maps:
                matrices[f"layer_{layer:02d}/saturation"] = self._saturation(layer)
        self._packed = file.pack(self.looks, list(probe.domains), matrices if self.options.matrices else {})
        if self.options.matrices:
            write_file(self.run_dir / file.FILE, self._packed)
        return _tagged(layers) | at_start

    def on_checkpoint(self, step: int) -> dict[str, bytes]:
        """So that a resumed run counts churn and saturation from the same looks."""
        return {file.FILE: self._packed} if self._packed is not None else {}

    def _layer(
        self, record: LayerRecord, now: Tensor, tokens: _Tokens, matrices: dict[str, NDArray[np.generic]]
    ) -> dict[str, Any]:
        """What one look tells of a layer, scalars; its matrices are added to `matrices`."""
        pairs = measure.co_activation_counts(now)
        found: dict[str, Any] = {"co_activation": measure.co_activation(pairs)}
        found |= _specialisation(now, tokens, matrices, f"layer_{record.layer_id:02d}")
        found["top_k_margin"] = measure.top_k_margin(record.routing, now)
        matrices[f"layer_{record.layer_id:02d}/co_activation"] = _int32(pairs)
        if record.gate_up is not None and record.down is not None:
            similarity = measure.expert_similarity(record.gate_up, record.down)
            found["expert_similarity"] = measure.mean_off_diagonal(similarity)
            matrices[f"layer_{record.layer_id:02d}/expert_similarity"] = similarity.cpu().numpy()
        if record.routed_norm is not None and record.shared_norm is not None:
            found["routed_to_shared"] = record.routed_norm.double().sum() / record.shared_norm.double().sum()
        return found

    def _since(self, layer: int, now: Tensor, step: int) -> dict[str, Any]:
        """Saturation against the look at half as many steps, churn against the one before."""
        if not self.looks.steps or layer not in self.looks.maps:
            return {}
        half = max((i for i, known in enumerate(self.looks.steps) if 2 * known <= step), default=0)
        then, last = (torch.from_numpy(self.looks.map(layer, i)).to(now.device) for i in (half, -1))
        return {"saturation": measure.saturation(now, then), "churn": measure.churn(now, last)}

    def _at_start(self, tokens: _Tokens) -> dict[str, float]:
        """The specialisations of the first look, which training has not touched; means over layers."""
        if not self.looks.steps or self.looks.steps[0] != 0:
            return {}
        values = [
            _specialisation(torch.from_numpy(self.looks.map(layer, 0)).to(tokens.index.device), tokens, {}, "")
            for layer in self.looks.maps
        ]
        means = _means([{key: float(value) for key, value in one.items()} for one in values])
        return {f"moe/mean/{key}_at_start": means[key] for key in AT_START if key in means}

    def _saturation(self, layer: int) -> NDArray[np.float32]:
        """[looks]: OLMoE's saturation of each kept look against the newest."""
        newest = torch.from_numpy(self.looks.map(layer, -1))
        looks = [torch.from_numpy(self.looks.map(layer, i)) for i in range(len(self.looks.steps))]
        return np.array([float(measure.saturation(newest, one)) for one in looks], np.float32)

    def _same_text(self, probe: Probe) -> None:
        """What a resumed run looked at before counts only if it was the same text and the same layers."""
        token_id, domain_id = probe.token_id.cpu().numpy(), probe.domain_id.cpu().numpy()
        experts = {record.layer_id: record.routing.num_experts for record in probe.records}
        known = self.looks.token_id is not None and np.array_equal(self.looks.token_id, token_id)
        fits = all(-(-e // 8) == -(-self.looks.experts.get(layer, 0) // 8) for layer, e in experts.items())
        if not (known and fits):
            self.looks = file.Looks()
        self.looks.token_id, self.looks.domain_id, self.looks.experts = token_id, domain_id, experts


def _specialisation(
    now: Tensor, tokens: _Tokens, matrices: dict[str, NDArray[np.generic]], name: str
) -> dict[str, Tensor]:
    """By token id, by domain, and by domain beyond what the ids explain; the last two need two domains."""
    by_token = measure.count_by(now, tokens.index, len(tokens.ids))
    by_domain = measure.count_by(now, tokens.domain, tokens.by_domain.shape[-1])
    expected = measure.expected_by_tokens(by_token, tokens.by_domain)
    matrices[f"{name}/token_expert"], matrices[f"{name}/domain_expert"] = _int32(by_token), _int32(by_domain)
    matrices[f"{name}/domain_expert_expected"] = expected.float().cpu().numpy()
    found = {"token_specialisation": measure.token_specialisation(by_token, tokens.by_domain.sum(-1))}
    if bool((tokens.by_domain.sum(0) > 0).sum() > 1):
        found["domain_specialisation"] = measure.domain_specialisation(by_domain)
        found["domain_specialisation_beyond_tokens"] = measure.domain_specialisation(by_domain, expected)
    return found


def _int32(counts: Tensor) -> NDArray[np.generic]:
    return counts.to(torch.int32).cpu().numpy()


def _tagged(layers: dict[int, dict[str, float]]) -> dict[str, float]:
    tags = {f"moe/layer_{layer:02d}/{key}": value for layer, found in layers.items() for key, value in found.items()}
    kept = {tag: value for tag, value in tags.items() if math.isfinite(value)}
    return kept | {f"moe/mean/{key}": value for key, value in _means(list(layers.values())).items()}


def _means(layers: list[dict[str, float]]) -> dict[str, float]:
    """Over the layers that have a number."""
    keys = dict.fromkeys(key for found in layers for key in found)
    known = {key: [found[key] for found in layers if math.isfinite(found.get(key, math.nan))] for key in keys}
    return {key: sum(values) / len(values) for key, values in known.items() if values}


@hookimpl
def moelab_observers() -> list[Component[Path, object]]:
    return [component("recorder", RecorderOptions, Recorder)]
