"""A small model with any router, held-out text of three documents in two domains, and a trace of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.data.batches import ValidationBatches
from moelab.data.corpus import TokenStream
from moelab.nn.transformer import Transformer
from moelab.routes.record import record_routes, weights_fingerprint
from moelab.routes.trace import Trace
from moelab.training.precision import Precision

PRECISION = Precision(torch.device("cpu"), torch.float32)
VOCABULARY = 40


def make_model(router: dict[str, Any], layers: int = 2, **changed: Any) -> Transformer:
    shape = {"num_experts": 8, "num_experts_per_tok": 1 if router["name"] == "switch" else 2}
    moe = MoEConfig(
        layout={"name": "uniform", "moe_intermediate_size": 12, **shape}, router=router, allow_noncausal=True
    )
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, max_position_embeddings=64, moe=moe,
    )  # fmt: skip
    return moelab.build(config, **changed).eval()


def make_stream() -> TokenStream:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 181).astype(np.uint16)
    starts = np.array([0, 30, 100, 181])
    return TokenStream(tokens, starts, np.array([0, 1, 0]), ["a", "b", "c"])


def make_trace(model: Transformer, batch_size: int = 4, precision: Precision = PRECISION) -> Trace:
    stream = make_stream()
    facts = {
        "moelab": "0", "source": "test", "weights": weights_fingerprint(model), "tokenizer": "t",
        "vocab_size": VOCABULARY, "batch_size": batch_size, "precision": {}, "data": {},
    }  # fmt: skip
    batches = ValidationBatches(stream, 11, 16, batch_size)
    return record_routes(model, batches, stream, ["x", "y"], precision, facts)


def traced(router: dict[str, Any], **changed: Any) -> tuple[Transformer, Trace]:
    """A model and the trace of its own routes."""
    model = make_model(router, **changed)
    return model, make_trace(model)
