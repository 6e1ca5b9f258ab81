"""`moelab evaluate`: each figure with its interval over documents."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moelab.training.evaluation import Evaluation, Sums
from moelab_tools.compare.measure import BITS_PER_BYTE, NATS_PER_TOKEN
from moelab_tools.levels import level, levels, lines, measure_of

RNG = np.random.default_rng(0)


def test_with_documents_of_one_size_the_interval_is_that_of_a_mean() -> None:
    losses = RNG.normal(3.0, 0.5, 30)
    sums = Sums(losses * 10, np.full(30, 10.0), np.full(30, 12.0))
    found = level(sums, NATS_PER_TOKEN)
    half = stats.t.ppf(0.975, 29) * losses.std(ddof=1) / math.sqrt(30)
    assert (found.value, found.low, found.high) == pytest.approx(
        (losses.mean(), losses.mean() - half, losses.mean() + half)
    )
    assert (found.documents, found.tokens) == (30, 300)
    bits = level(sums, BITS_PER_BYTE)
    assert bits.value == pytest.approx(losses.mean() * 10 / 12 / math.log(2))


def test_the_interval_holds_the_truth_though_documents_differ_in_size() -> None:
    """Loss and size drawn together, 19 of 20 intervals hold the ratio of their means; here within four errors."""
    missed, tries = 0, 1500
    for _ in range(tries):
        size = np.round(np.exp(RNG.normal(5, 0.7, 60)))
        nats = size * (2.0 + 0.2 * np.log(size) + RNG.normal(0, 0.5, 60))
        found = level(Sums(nats, size, None), NATS_PER_TOKEN)
        truth = 2.0 + 0.2 * (5 + 0.7**2)  # E[size log size] / E[size] of a log-normal size
        missed += not found.low <= truth <= found.high
    assert missed / tries < 0.05 + 4 * math.sqrt(0.05 * 0.95 / tries) + 0.02  # the jackknife's own bias with 60


def test_of_one_document_nothing_is_known_of_another() -> None:
    found = level(Sums(np.array([3.0, 0.0]), np.array([2.0, 0.0]), None), NATS_PER_TOKEN)
    assert (found.value, found.low, found.high, found.documents) == (1.5, None, None, 1)
    ends = Sums(np.array([3.0, 1.0]), np.array([2.0, 1.0]), np.array([2.0, 0.0]))
    assert level(ends, BITS_PER_BYTE).low is None, "a document without bytes is no second one"


def test_a_loss_is_never_negative_and_text_without_bytes_has_none() -> None:
    assert level(Sums(np.array([9.0, 0.1]), np.array([1.0, 1.0]), None), NATS_PER_TOKEN).low == 0.0
    assert level(Sums(np.array([3.0]), np.array([1.0]), np.array([0.0])), BITS_PER_BYTE) is None
    assert level(Sums(np.array([0.0]), np.array([0.0]), None), NATS_PER_TOKEN) is None


def test_all_parts_are_in_one_unit_and_told() -> None:
    nats, tokens = np.array([2.0, 4.0, 4.0]), np.array([3.0, 4.0, 3.0])
    places = {"position": {"1": Sums(nats / 2, tokens / 2, None)}}
    counted = Evaluation(nats, tokens, 2 * tokens)
    assert measure_of(counted) is BITS_PER_BYTE
    average = Evaluation(nats, tokens, 2.5 * tokens, exact_bytes=False, places=places)
    assert measure_of(average) is NATS_PER_TOKEN
    found = levels(average, ["code", "text", "code"])
    assert {kind: sorted(part) for kind, part in found.items()} == {
        "all": ["all"], "domain": ["code", "text"], "position": ["1"],
    }  # fmt: skip
    assert found["domain"]["code"].value == found["all"]["all"].value == found["position"]["1"].value == 1.0
    told = lines(found, NATS_PER_TOKEN)
    assert told[0] == "nats per token [95 % interval over documents]"
    assert any("few documents" in line for line in told)
    assert any(" 1 document  " in line for line in told) and not any("1 documents" in line for line in told)
