"""Two models on the same text, layer beside layer: of neither is more than one layer in memory.

What stands between two layers is kept for both (T tokens x D float32 each), so that every layer is read once, and the
difference after it is known. The head follows in pieces of tokens, so that no table of T x V stands anywhere.
T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from moelab.checkpoint import is_moelab
from moelab.hf.load import HFWeights
from moelab.loading import open_model
from moelab.nn.transformer import LayerState, Transformer
from moelab.registry import Registry
from moelab.stored_weights import StoredWeights

_PIECE = 128  # tokens whose logits stand at once
LOOKED_AT = 16  # every so many tokens a layer's own prediction is read off


@dataclass
class LayerDifference:
    """After one layer."""

    relative: float  # |x' - x| / |x| of what stands behind it, over all tokens
    kl: float  # nats: the next token as the final norm and the head read it off here, at every 16th token (logit lens)
    mass: float | None = None  # of a sparse layer: weight of the chosen experts, mean over tokens
    busiest: float | None = None  # its most loaded expert's load over the mean load


@dataclass
class SideBySide:
    """What was found: of each target [T] float64, and of each layer."""

    nats_first: Tensor
    nats_second: Tensor
    kl: Tensor  # from the first model's distribution to the second's
    same_choice: Tensor  # bool
    furthest: float  # difference of a log probability
    vocab_size: int  # of both
    layers: list[LayerDifference] = field(default_factory=list)


class _Streamed:
    """A model of which embedding, norm and head stay, and each layer comes when it is its turn."""

    def __init__(self, folder: Path, registry: Registry | None) -> None:
        self.model, self.weights = _opened(folder, registry)
        self.model.float().eval()
        for name in ("embed_tokens", "norm"):
            self._bring(name)
        self.model.tie_weights()
        self.state: LayerState | None = None

    def _bring(self, name: str) -> nn.Module:
        module = self.model.get_submodule(name)
        module._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)  # what a plugin decided stays
        for key, tensor in module.state_dict().items():
            self.weights.read_into(f"{name}.{key}", tensor)
        return module

    def begin(self, ids: Tensor) -> None:
        self.state = self.model.embed(ids)
        if not self.model.config.tie_word_embeddings:
            self.model.embed_tokens.to("meta")
            self._bring("lm_head")

    def step(self, layer_id: int) -> Tensor:
        """One layer on what stands before it: -> [B, S, D]."""
        assert self.state is not None
        name = f"layers.{layer_id}"
        self._bring(name)
        self.state = self.model.run_layers(self.state, layer_id, layer_id + 1)
        self.model.get_submodule(name).to("meta")
        return self.state.x

    def log_probabilities(self, x: Tensor, vocabulary: int) -> Tensor:
        """x [n, D], before the final norm -> [n, V] float32."""
        return self.model.lm_head(self.model.norm(x))[:, :vocabulary].log_softmax(-1)

    def load(self) -> tuple[float, float]:
        """(mass, busiest) of the last layer, which is sparse; the routing is let go."""
        assert self.state is not None
        routing = self.state.records[-1].routing
        counts = torch.bincount(routing.expert, minlength=routing.num_experts).double()
        found = float(routing.weight.sum()) / routing.num_tokens, float(counts.max() / counts.mean())
        self.state = replace(self.state, records=[])
        return found


@torch.inference_mode()
def side_by_side(
    first: Path,
    second: Path,
    ids: Tensor,
    targets: Tensor,
    *,
    registry: Registry | None = None,
    progress: Callable[[], None] = lambda: None,
) -> SideBySide:
    """Two folders that `verified` gave, of as many layers, in float32; ids and targets [B, S], -100 where none is.

    The vocabularies may differ in rows beyond the smaller one, which are left out. `progress` is called after a layer.
    """
    models = (_Streamed(first, registry), _Streamed(second, registry))
    vocabulary = min(model.model.config.vocab_size for model in models)
    for model in models:
        model.begin(ids)
    _share_head(*models)
    layers = []
    for layer_id in range(models[0].model.config.num_hidden_layers):
        x, y = (model.step(layer_id).flatten(0, 1) for model in models)
        a, b = (m.log_probabilities(z[::LOOKED_AT], vocabulary) for m, z in zip(models, (x, y), strict=True))
        found = LayerDifference(float((y - x).norm() / x.norm()), _kl(a, b).mean().item())
        if models[1].state is not None and models[1].state.records:
            found.mass, found.busiest = models[1].load()
        layers.append(found)
        progress()
    rows = list(_compared(models, targets.flatten(), vocabulary))
    nats_first, nats_second, kl, same = (torch.cat(column) for column in list(zip(*rows, strict=True))[:4])
    return SideBySide(nats_first, nats_second, kl, same, max(row[4] for row in rows), vocabulary, layers)


def _opened(folder: Path, registry: Registry | None) -> tuple[Transformer, StoredWeights]:
    if is_moelab(folder):
        return open_model(folder, registry=registry)
    weights = HFWeights(folder, registry)
    return weights.model, weights


def _share_head(first: _Streamed, second: _Streamed) -> None:
    """Hold it once where both have the same."""
    a, b = first.model.lm_head.weight, second.model.lm_head.weight
    if torch.equal(a, b):
        second.model.lm_head.weight = a


def _compared(
    models: tuple[_Streamed, _Streamed], targets: Tensor, vocabulary: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    """(nats of both, KL, whether the likeliest token is the same, the furthest log probability) of pieces of tokens."""
    asked = (targets >= 0).nonzero().squeeze(-1)
    hidden = []
    for model in models:
        assert model.state is not None
        hidden.append(model.state.x.flatten(0, 1))
    for rows in asked.split(_PIECE):
        a, b = (m.log_probabilities(x[rows], vocabulary) for m, x in zip(models, hidden, strict=True))
        wanted = targets[rows, None]
        yield (
            -a.gather(1, wanted).squeeze(1).double(),
            -b.gather(1, wanted).squeeze(1).double(),
            _kl(a, b),
            a.argmax(-1) == b.argmax(-1),
            float((a - b).abs().max()),
        )


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """Of log probabilities [n, V] each -> [n] float64.

    sum p (q / p - 1 - ln(q / p)): no term is negative, so that the roundings of an equal function add up to nothing.
    """
    gap = (b - a).double()
    return (a.exp() * (gap.expm1() - gap)).sum(-1)
