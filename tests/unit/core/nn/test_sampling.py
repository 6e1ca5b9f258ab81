"""Which tokens may be drawn, by transformers' own processors, and how often they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moelab.errors import ConfigError
from moelab.nn.sampling import DRAWN_AT_ONCE, Draws, Sampling, choose, largest, limited

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 0.4, "top_p": 0.99, "min_p": 0.3},
    {"top_k": 1000, "top_p": 1e-9},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_may_be_drawn_is_what_transformers_leaves(settings: dict[str, Any]) -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(7, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float() * 3
    scores -= scores.amax(-1, keepdim=True)
    expected: Any = scores
    for name, processor in (
        ("temperature", TemperatureLogitsWarper), ("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):  # fmt: skip
        if name in settings:
            expected = processor(settings[name])(torch.zeros(7, 1).long(), expected)
    found = limited(scores, Sampling(**{"temperature": 1.0, **settings}))
    torch.testing.assert_close(found, expected)


def test_the_penalty_is_transformers_and_comes_first() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    scores = torch.randn(200, 12, generator=torch.Generator().manual_seed(1)) * 2
    ids = torch.randint(0, 12, (200, 5), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(200, 12, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, scores.clone()).argmax(-1)
    assert torch.equal(choose(scores, Sampling(temperature=0.0, repetition_penalty=1.7), seen, [], 0), expected)
    assert not torch.equal(scores.argmax(-1), expected)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """20,000 rows of one distribution: shares within five standard deviations."""
    rows, likely = 20_000, torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = [Draws(0, prompt, 0) for prompt in range(rows)]
    token = choose(likely.log().expand(rows, -1), Sampling(temperature=1.0), None, draws, 3)
    shares = torch.bincount(token, minlength=4) / rows
    assert ((shares - likely).abs() < 5 * (likely * (1 - likely) / rows).sqrt()).all()


def test_a_rows_numbers_are_its_own_in_any_order() -> None:
    numbers = [Draws(1, 2, 3).number(position) for position in range(3 * DRAWN_AT_ONCE)]
    again = Draws(1, 2, 3)
    assert [again.number(position) for position in reversed(range(3 * DRAWN_AT_ONCE))] == numbers[::-1]
    assert len({Draws(*key).number(0) for key in ((1, 2, 3), (1, 3, 2), (2, 2, 3), (1, 2, 4))}) == 4


def test_scores_that_are_not_finite_choose_nothing() -> None:
    scores = torch.tensor([[1.0, torch.nan], [-torch.inf, -torch.inf], [2.0, -torch.inf]])
    for temperature in (0.0, 1.0):
        chosen = choose(scores, Sampling(temperature=temperature), None, [Draws(0, 0, 0)] * 3, 0)
        assert chosen.tolist() == [-1, -1, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.0}, r"top_p must be in 0 \.\. 1, 0 excluded, not 0\.0"),
        ({"temperature": -0.5}, r"temperature must be 0 \(greedy\) or more, not -0\.5"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"min_p": 1.5}, "min_p must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be more than 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be"),
        ({"max_new_tokens": 10**20}, "less than 2"),
        ({"stop": ("",)}, "at least one character"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("tokens", [7, 4096, 12287])
def test_the_largest_score_is_found_wherever_it_stands_and_nan_is_the_largest(tokens: int):
    scores = torch.randn(6, tokens)
    for row, place in enumerate((0, tokens - 1, tokens // 2)):
        scores[row, place] = 9.0
    scores[3, tokens - 2], scores[4], scores[5, tokens // 3] = float("nan"), -torch.inf, torch.inf
    values, places = largest(scores)
    torch.testing.assert_close(values, scores.max(-1).values, equal_nan=True)
    torch.testing.assert_close(scores[torch.arange(6), places], values, equal_nan=True)
    assert places[:3].tolist() == [0, tokens - 1, tokens // 2]
