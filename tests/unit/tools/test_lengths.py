"""Evaluation at length: what is asked for, what is filled in, and what is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moelab
from moelab.config.model import ModelConfig
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.corpus import TokenStream
from moelab.errors import ConfigError, DataError
from moelab_tools.lengths.asked import parse_lengths
from moelab_tools.lengths.measure import moved
from moelab_tools.passkey import make_trials, passkey_accuracy
from moelab_tools.positions import Positions

REGISTRY = moelab.Registry(entry_points=False)
TOKENIZER = ByteTokenizer()


def model() -> moelab.nn.transformer.Transformer:  # type: ignore[name-defined]
    config = ModelConfig(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096,
    )  # fmt: skip
    return moelab.build_model(config)


def test_lengths_are_multiples_or_tokens() -> None:
    assert parse_lengths("1x, 2x,0.5x,300", 64) == [64, 128, 32, 300]
    for wrong in ("x", "2y", "", "0x", "-1"):
        with pytest.raises(ConfigError, match=r"--length: '.*' is no length"):
            parse_lengths(wrong, 64)


def test_what_an_option_leaves_out_is_filled_in_and_told() -> None:
    """From the length that the run was trained on, not from max_position_embeddings."""
    net = model()
    told = Positions("dual_chunk", "yarn").apply(net, REGISTRY, 300, 128)
    assert told == [
        "--attention dual_chunk: original_max_position_embeddings 128",
        "--rope-scaling yarn: original_max_position_embeddings 128, factor 3",
    ]
    assert net.config.rope_scaling == {"name": "yarn", "original_max_position_embeddings": 128, "factor": 3}
    assert (
        Positions(None, "{name: yarn, factor: 8, original_max_position_embeddings: 64}").apply(net, REGISTRY, 300, 128)
        == []
    )
    with pytest.raises(ConfigError, match="no rope scaling 'yarm', did you mean 'yarn'"):
        Positions(None, "yarm").apply(net, REGISTRY, 300, 128)


def test_a_key_lies_at_its_depth_in_a_text_of_the_length() -> None:
    tokens = np.full(5000, ord("x"))
    stream = TokenStream(tokens, np.array([0, 5000]), np.zeros(1, np.int64), ["d"])
    trials = make_trials(stream, TOKENIZER, 400, 2)
    assert [trial.depth for trial in trials] == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
    assert len({trial.key for trial in trials}) > 5
    for trial in trials:
        text = TOKENIZER.decode(trial.prompt)
        assert len(trial.prompt) + len(trial.key) == 400
        assert text.count(trial.key) == 2
        assert text.endswith("The pass key is ")
        fillers = text.split("\n")[0].count("x"), text.count("x")
        assert fillers[0] == round(trial.depth * fillers[1])
    assert make_trials(stream, TOKENIZER, 400, 2) == trials
    with pytest.raises(DataError, match="--passkey: 60 tokens leave"):
        make_trials(stream, TOKENIZER, 60, 1)
    assert passkey_accuracy(model(), TOKENIZER, trials[:4]) == {"0": 0.0, "0.25": 0.0}


def test_what_moves_is_half_the_difference_of_shares() -> None:
    assert moved(torch.tensor([2, 2]), torch.tensor([7, 7])) == 0
    assert moved(torch.tensor([4, 0]), torch.tensor([0, 1])) == 1
    assert moved(torch.tensor([3, 1]), torch.tensor([1, 3])) == 0.5
