"""The kit catches attention whose `on_turned` is another than its call, or takes values of the keys' width alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from torch import Tensor

from moelab import component, testing
from moelab.nn.attention_inputs import AttentionContext, AttentionInputs
from moelab.nn.full_attention import FullAttention


@dataclass
class NoOptions:
    pass


class Sound(FullAttention):
    def __init__(self, options: Any, context: AttentionContext) -> None:
        super().__init__(context.layer_id)


class Louder(Sound):
    def on_turned(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        return super().on_turned(1.01 * query, key, value, inputs)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        return FullAttention(self.layer_id)(query, key, value, inputs)


class DeafToDocuments(Louder):
    def on_turned(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        return FullAttention.on_turned(self, query, key, value, replace(inputs, documents=None, shared={}))


class OneWidth(Louder):
    def on_turned(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        return FullAttention.on_turned(self, query, key, value[..., : key.shape[-1]], inputs)


class AppendsAgain(Louder):
    def on_turned(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        out = FullAttention.on_turned(self, query, key, value, inputs)
        if inputs.cache is not None:
            inputs.cache.append(self.layer_id, key[:, :, :1], value[:, :, :1])
        return out


@pytest.mark.parametrize("kind", [Louder, DeafToDocuments, OneWidth, AppendsAgain])
def test_a_planted_fault_of_an_attention_is_named(kind: type[Sound]) -> None:
    with pytest.raises(testing.ConformanceError) as error:
        testing.check_attention(component("planted", NoOptions, kind))
    assert "what_is_turned_already_gives_the_same" in str(error.value)


def test_the_sound_one_passes() -> None:
    testing.check_attention(component("sound", NoOptions, Sound))
