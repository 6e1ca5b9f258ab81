"""Recording: held-out batches through a model, and of every MoE layer who went where.

B windows of S tokens in a batch, T tokens, N assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moelab.checkpoint import model_tensors
from moelab.checksums import running
from moelab.data.batches import Batch
from moelab.data.corpus import TokenStream
from moelab.errors import ConfigError
from moelab.moe.block import MoEBlock
from moelab.moe.routing import Routing
from moelab.nn.transformer import TokenContext, Transformer
from moelab.routes.trace import TOKEN_ARRAYS, LayerTrace, Trace, smallest
from moelab.training.precision import Precision


@dataclass
class _Layer:
    """What the batches so far have brought for one layer."""

    num_experts: int
    top_k: int | None
    expert: list[np.ndarray] = field(default_factory=list)
    weight: list[np.ndarray] = field(default_factory=list)
    counts: list[np.ndarray] = field(default_factory=list)
    dropped: int = 0
    other_choices: int = 0

    def add(self, routing: Routing) -> None:
        token, expert, weight = (t.cpu() for t in (routing.token, routing.expert, routing.weight))
        if bool(
            (token.diff() < 0).any()
        ):  # an expert's tokens together, say; stable: a token's experts keep their order
            order = torch.argsort(token, stable=True)
            token, expert, weight = token[order], expert[order], weight[order]
        self.expert.append(expert.numpy().astype(np.min_scalar_type(self.num_experts - 1)))
        self.weight.append(weight.float().numpy())
        self.counts.append(np.bincount(token.numpy(), minlength=routing.num_tokens))
        self.top_k = self.top_k if routing.top_k == self.top_k else None
        self.dropped += 0 if routing.dropped is None else int(routing.dropped)
        self.other_choices = 0 if routing.choices is None else routing.choices.shape[1] - self.num_experts

    def trace(self, layer_id: int, router: str) -> LayerTrace:
        counts = np.concatenate(self.counts)
        return LayerTrace(
            layer_id, self.num_experts, router, self.top_k, np.concatenate(self.expert), np.concatenate(self.weight),
            None if self.top_k is not None else smallest(counts), self.dropped, self.other_choices,
        )  # fmt: skip


@torch.no_grad()
def record_routes(
    model: Transformer,
    batches: Iterable[Batch],
    stream: TokenStream,
    domains: list[str],
    precision: Precision,
    facts: dict[str, Any],
    *,
    seen: Callable[[], None] = lambda: None,
) -> Trace:
    """The routes of held-out `batches` of `stream` in evaluation; `seen` is called after each batch.

    All is held in memory: K (1 to 2 bytes of expert + 4 of weight) for each token and layer. Raises ConfigError for a
    model without MoE layers.
    """
    blocks = {b.layer_id: b for b in model.modules() if isinstance(b, MoEBlock)}
    if not blocks:
        raise ConfigError("the model has no MoE layer, so no token is routed; trace a model with `model.moe`")
    was_training = model.training
    model.eval()
    layers: dict[int, _Layer] = {}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in TOKEN_ARRAYS}
    for batch in batches:
        part = batch.to(precision.device)
        with precision.autocast():
            records = model.hidden_states(
                part.input_ids,
                part.attention_mask,
                tokens=TokenContext(part.document_id, part.domain_id, attention_id=part.attention_id),
            )[1]
        for record in records:
            routing = record.routing.compact()
            layers.setdefault(record.layer_id, _Layer(routing.num_experts, routing.top_k)).add(routing)
        _add_tokens(columns, batch)
        seen()
    model.train(was_training)
    tokens = {name: np.concatenate(parts) for name, parts in columns.items()}
    documents = _renumber(tokens)
    return Trace(
        **{name: smallest(values) for name, values in tokens.items()},
        documents=[(stream.document_names[i], domains[stream.document_domain[i]]) for i in documents.tolist()],
        layers=[layers[i].trace(i, type(blocks[i].router).__name__) for i in sorted(layers)],
        facts=facts,
    )


def weights_fingerprint(model: Transformer) -> str:
    """xxh3-128 over all tensors of a model in order of their names, each as name, dtype, shape and bytes."""
    digest = running()
    for name, tensor in sorted(model_tensors(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _add_tokens(columns: dict[str, list[np.ndarray]], batch: Batch) -> None:
    assert batch.target_document_id is not None, "held-out batches know their targets' documents"
    position = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    values = (batch.input_ids, batch.targets, position, batch.document_id, batch.target_document_id)
    for name, value in zip(TOKEN_ARRAYS, values, strict=True):
        columns[name].append(value.numpy())


def _renumber(tokens: dict[str, np.ndarray]) -> np.ndarray:
    """Count the documents that occur from 0, in place; -> their old numbers."""
    pair = ("document_id", "target_document_id")
    documents = np.unique(np.concatenate([tokens[name].ravel() for name in pair]))
    for name in pair:
        tokens[name] = np.searchsorted(documents, tokens[name])
    return documents
