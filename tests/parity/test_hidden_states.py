"""The hidden states that a router is made from are those of transformers, for every kind of dense source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moelab.errors import ConfigError
from moelab_upcycling.dense_states import DenseStates
from moelab_upcycling.source import DenseSource
from parity.test_sources import SOURCES, made

TEXTS = ([5, 9, 31, 2], [7], [63, 0, 11, 12, 13, 8, 8])


@pytest.mark.parametrize(("kind", "fields"), SOURCES.values(), ids=SOURCES.keys())
def test_states_are_transformers_hidden_states(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    model = made(kind, fields, tmp_path).double()
    with DenseSource(tmp_path) as source, torch.no_grad():
        states = DenseStates(source)
        for layer_id in (0, 1, 2, 1):  # the last goes back
            for text, found in zip(TEXTS, states.entering(layer_id, TEXTS), strict=True):
                theirs = model(torch.tensor([text]), output_hidden_states=True).hidden_states[layer_id][0].numpy()
                # transformers computes angles and norms in float32, whatever the weights are
                assert np.abs(found - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_a_prompt_longer_than_the_source_sees_at_once_is_refused(tmp_path: Path) -> None:
    made("Mistral", {"sliding_window": 16}, tmp_path)
    with DenseSource(tmp_path) as source:
        with pytest.raises(ConfigError, match="17 tokens, and the source sees 16 of them at once"):
            DenseStates(source).entering(1, [[3] * 17])
        with pytest.raises(ConfigError, match=r"token ids must be in 0 \.\. 66"):
            DenseStates(source).entering(1, [[3], [67]])
