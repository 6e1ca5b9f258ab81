"""Held-out loss: every token counted once, by document, whatever the batch size."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import EvaluationConfig, RunConfig, TrainConfig
from moelab.data.batches import ValidationBatches
from moelab.data.corpus import TokenStream
from moelab.hookspecs import ROUTERS
from moelab.registry import Registry
from moelab.training.evaluate import TOKENS_AT_ONCE, evaluate, evaluation_batch_size
from moelab.training.evaluation import MOST_DOMAINS, Evaluation, Sums, bin_names, bin_of, tokens_before
from moelab.training.precision import Precision

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
    found, reference = _evaluation(batch_size), _evaluation(3)
    assert found.nats == pytest.approx(reference.nats, rel=1e-6)
    for axis, bins in reference.places.items():
        assert list(found.places[axis]) == list(bins)
        for name, sums in bins.items():
            assert found.places[axis][name].nats == pytest.approx(sums.nats, rel=1e-6)
            assert found.places[axis][name].tokens.tolist() == sums.tokens.tolist()


@pytest.mark.parametrize("router", sorted(Registry(entry_points=False).components(ROUTERS)))
def test_sequences_of_a_batch_do_not_touch_each_other_whatever_the_router(router: str) -> None:
    """In float64, where rounding turns no near-tie of a router."""
    top_k = 1 if router in ("switch", "base", "mixture_of_depths") else 2
    moe = MoEConfig(
        layout={"name": "uniform", "num_experts": 4, "num_experts_per_tok": top_k, "moe_intermediate_size": 8},
        router={"name": router}, allow_noncausal=True,
    )  # fmt: skip
    model = moelab.build(replace(MODEL, moe=moe)).double()
    nats = [evaluate(model, ValidationBatches(_stream(), 10, 16, size), PRECISION).nats for size in (1, 7)]
    assert nats[0] == pytest.approx(nats[1], rel=1e-9)


def test_places_are_those_of_a_loop_over_tokens() -> None:
    """Ten windows of 16 targets; documents begin at tokens 0, 30 and 100."""
    found, stream = _evaluation(3), _stream()
    position, context = Counter[str](), Counter[str]()
    names = bin_names(16)
    for window in range(10):
        for place in range(1, 17):
            target = window * 16 + place
            document = int(stream.document_of(np.array(target)))
            own = min(place, target - int(stream.document_starts[document]))
            position[names[place.bit_length()]] += 1
            context[names[own.bit_length()]] += 1
    for axis, counts in (("position", position), ("context", context)):
        sums = found.places[axis]
        assert {name: one.tokens.sum() for name, one in sums.items()} == dict(counts)
        assert sum(one.nats.sum() for one in sums.values()) == pytest.approx(found.nats.sum(), rel=1e-12)
        assert sum(one.bytes.sum() for one in sums.values()) == found.bytes.sum()
        assert {one.nats.shape for one in sums.values()} == {(3,)}


def test_bins_are_powers_of_two_whose_names_sort_as_numbers() -> None:
    assert bin_names(16) == ["00", "01", "02-03", "04-07", "08-15", "16"]
    assert bin_names(9) == ["0", "1", "2-3", "4-7", "8-9"]
    counts = np.arange(600)
    assert bin_of(counts).tolist() == [int(count).bit_length() for count in counts]


def test_a_target_counts_what_stands_before_it_in_its_window_and_its_document() -> None:
    position, context = tokens_before(np.array([[4, 4, 4, 5, 5, 7], [1, 1, 1, 1, 1, 1]]))
    assert position.tolist() == [[1, 2, 3, 4, 5]] * 2
    assert context.tolist() == [[1, 2, 0, 1, 0], [1, 2, 3, 4, 5]]


def test_detail_is_bits_per_byte_where_bytes_are_counted_and_else_nats() -> None:
    documents = (["x", "y", "z"], ["code", "text", "code"])
    nats, tokens = np.array([2.0, 4.0, 4.0]), np.array([3.0, 4.0, 3.0])
    first = {"position": {"1": Sums(np.array([1.0]), np.array([2.0]), np.array([4.0]))}}
    counted = Evaluation(nats, tokens, np.array([4.0, 8.0, 2.0]), places=first).detail(documents)
    assert counted == {
        "eval_domain/bits_per_byte/code": pytest.approx(1 / math.log(2)),
        "eval_domain/bits_per_byte/text": pytest.approx(0.5 / math.log(2)),
        "eval_position/bits_per_byte/1": pytest.approx(0.25 / math.log(2)),
    }
    average = Evaluation(nats, tokens, 3 * tokens, exact_bytes=False, places=first).detail(documents)
    assert average == {
        "eval_domain/loss/code": 1.0, "eval_domain/loss/text": 1.0, "eval_position/loss/1": 0.5,
    }  # fmt: skip


def test_of_many_domains_the_largest_are_logged() -> None:
    count = MOST_DOMAINS + 5
    tokens = np.arange(1.0, count + 1)
    found = Evaluation(tokens, tokens, None).detail(([str(n) for n in range(count)], [f"d{n}" for n in range(count)]))
    assert len(found) == MOST_DOMAINS
    assert f"eval_domain/loss/d{count - 1}" in found
    assert "eval_domain/loss/d0" not in found


def test_an_evaluation_reads_as_many_sequences_at_once_as_are_not_slower_and_at_least_a_micro_batch() -> None:
    def of(**keys: int) -> int:
        sizes = {"batch_size": 8, "sequence_length": 128} | keys
        evaluation = EvaluationConfig(batch_size=sizes.pop("evaluation", None))
        return evaluation_batch_size(RunConfig(train=TrainConfig(**sizes), evaluation=evaluation))

    assert of() == TOKENS_AT_ONCE / 128
    assert of(micro_batch_size=2) == of()
    assert of(batch_size=4096) == 4096
    assert of(batch_size=4096, micro_batch_size=512) == 512
    assert of(sequence_length=2 * TOKENS_AT_ONCE, micro_batch_size=1) == 1
    assert of(evaluation=3) == 3


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
