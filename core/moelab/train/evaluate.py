"""Held-out loss, summed over tokens and kept by document, so that runs can be paired over documents."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moelab.config.run import EvaluationConfig
from moelab.data.batches import ValidationBatches
from moelab.data.tokenizer import Tokenizer
from moelab.generate import Sampling, generate
from moelab.nn.transformer import TokenContext, Transformer
from moelab.train.precision import Precision


@dataclass(frozen=True)
class Evaluation:
    """Sums over the held-out tokens, by document: all [n] float64."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray | None  # None where the tokenizer's bytes are not known
    exact_bytes: bool = True  # False: tokens times an average, which holds for all documents together only

    def metrics(self) -> dict[str, float]:
        """`eval/loss` in nats a token, `eval/perplexity`, and `eval/bits_per_byte`, which any tokenizers share."""
        loss = float(self.nats.sum() / self.tokens.sum())
        found = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
        if self.bytes is not None and self.bytes.sum() > 0:
            found["eval/bits_per_byte"] = float(self.nats.sum() / self.bytes.sum() / math.log(2))
        return found

    def document_rows(self, documents: tuple[Sequence[str], Sequence[str]]) -> list[str]:
        """One line of JSON for each document that was read; `documents`: names, and the domain of each.

        `bytes` are those of the tokens that were scored: a count, or absent where they are not known to the byte.
        """
        rows = []
        for index in np.flatnonzero(self.tokens).tolist():
            row = {"document": documents[0][index], "domain": documents[1][index], "nats": float(self.nats[index])}
            row["tokens"] = int(self.tokens[index])
            if self.bytes is not None and self.exact_bytes:
                row["bytes"] = int(self.bytes[index])
            rows.append(json.dumps(row))
        return rows


@torch.no_grad()
def evaluate(model: Transformer, batches: ValidationBatches, precision: Precision) -> Evaluation:
    """The loss of every held-out token, each counted once whatever the batch size."""
    was_training = model.training
    model.eval()
    count = len(batches.stream.document_names)
    nats, tokens = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    sizes: torch.Tensor | None = None
    for batch in batches:
        part = batch.to(precision.device)
        with precision.autocast():
            context = TokenContext(part.document_id, part.domain_id)
            output = model(part.input_ids, part.attention_mask, targets=part.targets, tokens=context)
        assert output.token_loss is not None
        assert batch.target_document_id is not None
        document = batch.target_document_id.reshape(-1)
        nats.index_add_(0, document, output.token_loss.reshape(-1).double().cpu())
        tokens.index_add_(0, document, (batch.targets >= 0).reshape(-1).double())
        if batch.target_bytes is not None:
            sizes = torch.zeros_like(nats) if sizes is None else sizes
            sizes.index_add_(0, document, batch.target_bytes.reshape(-1))
    model.train(was_training)
    exact = batches.stream.exact_bytes
    return Evaluation(nats.numpy(), tokens.numpy(), None if sizes is None else sizes.numpy(), exact)


def sample_texts(model: Transformer, tokenizer: Tokenizer, config: EvaluationConfig, seed: int) -> list[str]:
    """Each prompt with its continuation; the same seed draws the same numbers for every model."""
    if config.sample_tokens == 0:
        return []
    sampling = Sampling(config.sample_tokens, config.temperature, seed=seed, end_token_ids=(tokenizer.eos_token_id,))
    texts = []
    for prompt in config.prompts:
        ids = tokenizer.encode(prompt).tolist() or [tokenizer.eos_token_id]
        texts.append(prompt + tokenizer.decode(list(generate(model, ids, sampling))))
    return texts
