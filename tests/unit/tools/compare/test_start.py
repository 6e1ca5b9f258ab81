"""Where an upcycled model starts: the word, and the interval it rests on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moelab_tools.compare.start import judge_start

TOKENS = np.array([100.0, 200.0, 100.0, 100.0])
DENSE = np.array([2.0, 2.5, 3.0, 2.2]) * TOKENS
VOCABULARY = 49152


def test_a_shift_of_every_document_is_told_exactly() -> None:
    """All documents alike: nothing varies, so the interval is a point, and the difference the closed form."""
    start = judge_start(DENSE, DENSE + 0.003 * TOKENS, TOKENS, 5e-3, VOCABULARY, text=True)
    assert start.kind == "near"
    assert start.difference == pytest.approx(0.003, abs=1e-12)
    assert (start.low, start.high) == (pytest.approx(0.003), pytest.approx(0.003))
    assert start.sentence.startswith("starts 0.0030 nats away from the dense model")


def test_the_interval_is_that_of_a_mean_where_documents_are_alike_in_size() -> None:
    tokens = np.full(5, 64.0)
    gaps = np.array([0.01, -0.02, 0.03, 0.0, 0.01])
    start = judge_start(3 * tokens, (3 + gaps) * tokens, tokens, 1e-2, VOCABULARY, text=True)
    half = 2.7764451052 * gaps.std(ddof=1) / math.sqrt(5)  # Student's t, 4 degrees of freedom, 0.975
    assert start.high - start.difference == pytest.approx(half, rel=1e-6)
    assert "does not tell the losses apart" in start.sentence


def test_an_equal_function_is_the_dense_one_whatever_the_loss() -> None:
    start = judge_start(DENSE, DENSE * (1 + 1e-9), TOKENS, 2e-9, VOCABULARY, text=True)
    assert (start.kind, start.sentence[:35]) == ("dense", "starts at the dense function (KL 2.")


def test_worse_than_uniform_is_broken() -> None:
    start = judge_start(DENSE, 12.2 * TOKENS, TOKENS, 9.7, VOCABULARY, text=True)
    assert start.kind == "broken"
    assert start.sentence == "starts broken: 12.2 nats, where dense has 2.44 and uniform is 10.8"


def test_what_never_learnt_cannot_be_broken_and_ids_have_no_loss() -> None:
    flat = math.log(VOCABULARY) * TOKENS
    assert judge_start(flat, flat + TOKENS, TOKENS, 0.5, VOCABULARY, text=True).kind == "unknown"
    assert judge_start(DENSE, 12 * TOKENS, TOKENS, 0.5, VOCABULARY, text=False).kind == "unknown"
