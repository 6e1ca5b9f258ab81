"""Generation over the cache."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.data.tokenizer import Tokenizer
from moelab.errors import CheckpointError, ConfigError
from moelab.nn.generate import Sampling, Speech, continue_text, generate

MOE = MoEConfig(layout={"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16})
MODEL = ModelConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, moe=MOE,
)  # fmt: skip


def _tokens(**settings: float) -> list[int]:
    return list(generate(moelab.build(MODEL), [1, 2, 3], Sampling(**settings)))  # type: ignore[arg-type]


def test_greedy_takes_the_likeliest_token_of_a_full_forward_pass() -> None:
    """Within 1e-4 of logits that spread over several units: a cache and a whole pass round differently."""
    found = _tokens(max_new_tokens=10, temperature=0.0)
    logits = moelab.build(MODEL)(torch.tensor([[1, 2, 3, *found]])).logits[0, 2:-1]  # [10, V]
    assert logits.std() > 0.5
    assert (logits.amax(-1) - logits[range(10), found]).max() < 1e-4


def test_the_same_seed_gives_the_same_text_and_another_another() -> None:
    first = _tokens(max_new_tokens=20, temperature=1.0, seed=1)
    assert first == _tokens(max_new_tokens=20, temperature=1.0, seed=1)
    assert first != _tokens(max_new_tokens=20, temperature=1.0, seed=2)


def test_a_tiny_nucleus_is_greedy() -> None:
    assert _tokens(max_new_tokens=8, top_p=1e-6) == _tokens(max_new_tokens=8, temperature=0.0)


def test_it_stops_behind_the_end_token() -> None:
    free = _tokens(max_new_tokens=12, temperature=0.0)
    stopped = _tokens(max_new_tokens=12, temperature=0.0, end_token_ids=(free[4],))
    assert stopped == free[: free.index(free[4]) + 1]


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    model = moelab.build(MODEL).train()
    next(generate(model, [1], Sampling(max_new_tokens=2)))
    list(generate(model, [1], Sampling(max_new_tokens=2)))
    assert model.training


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="top_p"):
        Sampling(top_p=0.0)
    with pytest.raises(ConfigError, match="prompt"):
        next(generate(moelab.build(MODEL), [], Sampling()))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_weights_that_are_not_finite_are_named(temperature: float) -> None:
    model = moelab.build(MODEL)
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight: 1 of"):
        list(generate(model, [1, 2], Sampling(2, temperature=temperature)))


def test_a_temperature_near_zero_is_greedy() -> None:
    model = moelab.build(MODEL)
    greedy = list(generate(model, [1, 2], Sampling(5, temperature=0.0)))
    assert list(generate(model, [1, 2], Sampling(5, temperature=1e-300))) == greedy
    with pytest.raises(ConfigError):
        Sampling(temperature=float("nan"))


class Letters:
    """A tokenizer of letters whose every id decodes to something, also the one that ends a text."""

    vocab_size, eos_token_id = 50, 0

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(letter) - 97 for letter in text], np.int32)

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + number) for number in ids)


def test_a_text_ends_before_the_first_token_that_ends_it() -> None:
    model, letters = moelab.build(MODEL), cast(Tokenizer, Letters())
    found = list(generate(model, [1, 2, 3], Sampling(12, temperature=0.0)))
    end = found[5]
    text = continue_text(model, "bcd", Speech(letters, (end, 49)), Sampling(12, temperature=0.0))
    assert text == "bcd" + letters.decode(found[: found.index(end)])
    whole = continue_text(model, "bcd", Speech(letters, ()), Sampling(12, temperature=0.0))
    assert whole == "bcd" + letters.decode(found)
