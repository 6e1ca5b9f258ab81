"""Held-out loss: every token counted once, by document, whatever the batch size."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import moelab
from moelab.config.model import ModelConfig
from moelab.data.batches import ValidationBatches
from moelab.data.corpus import TokenStream
from moelab.train.evaluate import Evaluation, evaluate
from moelab.train.precision import Precision

PRECISION = Precision(torch.device("cpu"), torch.float32)
MODEL = ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, initializer_range=0.3,
)  # fmt: skip


def _stream() -> TokenStream:
    tokens = np.random.default_rng(0).integers(0, 40, 161).astype(np.uint16)
    starts = np.array([0, 30, 100, 161])
    return TokenStream(tokens, starts, np.array([0, 1, 0]), ["a", "b", "c"], token_bytes=np.full(161, 2, np.uint16))


def _evaluation(batch_size: int) -> Evaluation:
    return evaluate(moelab.build(MODEL), ValidationBatches(_stream(), 10, 16, batch_size), PRECISION)


def test_the_sums_are_those_of_a_loop_over_tokens() -> None:
    found, model, stream = _evaluation(3), moelab.build(MODEL), _stream()
    nats = np.zeros(3)
    for begin in range(0, 160, 16):
        ids = torch.from_numpy(stream.tokens[begin : begin + 17].astype(np.int64))[None]
        log_probabilities = model(ids[:, :-1]).logits.double().log_softmax(-1)[0]
        for place in range(16):
            document = int(stream.document_of(np.array(begin + place + 1)))
            nats[document] -= float(log_probabilities[place, ids[0, place + 1]])
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.tokens.tolist() == [29, 70, 61]


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    assert _evaluation(batch_size).nats == pytest.approx(_evaluation(3).nats, rel=1e-6)


def test_bits_per_byte_follow_from_nats_and_bytes() -> None:
    metrics = Evaluation(np.array([2.0, 4.0]), np.array([3.0, 3.0]), np.array([4.0, 8.0])).metrics()
    assert metrics["eval/loss"] == 1.0
    assert metrics["eval/perplexity"] == pytest.approx(math.e)
    assert metrics["eval/bits_per_byte"] == pytest.approx(0.5 / math.log(2))


def test_documents_that_were_not_read_have_no_row() -> None:
    rows = Evaluation(np.array([2.0, 0.0]), np.array([3.0, 0.0]), None).document_rows((["x", "y"], ["d", "d"]))
    assert [json.loads(row) for row in rows] == [{"document": "x", "domain": "d", "nats": 2.0, "tokens": 3}]


def test_bytes_of_a_document_are_counts_or_absent() -> None:
    """Of an average number of bytes a token only the whole has bits per byte."""
    counted = Evaluation(np.array([2.0]), np.array([3.0]), np.array([4.0]))
    assert json.loads(counted.document_rows((["x"], ["d"]))[0])["bytes"] == 4
    average = Evaluation(np.array([2.0]), np.array([3.0]), np.array([10.5]), exact_bytes=False)
    assert "bytes" not in json.loads(average.document_rows((["x"], ["d"]))[0])
    assert average.metrics()["eval/bits_per_byte"] == pytest.approx(2 / 10.5 / math.log(2))


@pytest.mark.parametrize("id_bytes", [np.full(40, 3, np.uint32), np.full(40, 3.0)])
def test_an_evaluation_knows_whether_its_bytes_are_counted(id_bytes: np.ndarray) -> None:
    stream = replace(_stream(), token_bytes=None, id_bytes=id_bytes)
    found = evaluate(moelab.build(MODEL), ValidationBatches(stream, 10, 16, 3), PRECISION)
    assert found.bytes is not None
    assert found.bytes.tolist() == [3 * 29, 3 * 70, 3 * 61]
    assert found.exact_bytes == (id_bytes.dtype.kind == "u")


def test_the_bytes_of_a_document_that_windows_cut_are_those_of_its_scored_tokens() -> None:
    stream = replace(_stream(), token_bytes=np.arange(161, dtype=np.uint16))
    found = evaluate(moelab.build(MODEL), ValidationBatches(stream, 2, 16, 1), PRECISION)
    scored = np.concatenate(
        [np.arange(begin * 16 + 1, begin * 16 + 17) for begin in ValidationBatches(stream, 2, 16, 1).windows]
    )
    assert found.bytes is not None
    assert found.bytes.tolist() == [scored[stream.document_of(scored) == n].sum() for n in range(3)]
