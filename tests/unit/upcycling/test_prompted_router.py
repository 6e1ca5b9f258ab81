"""A router from hidden states: mergekit's definition, and the rows of a checkpoint that was mixed from two models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dense_checkpoints import Tiny, plan_for, read_all, recipe_config, write_dense
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.errors import ConfigError
from moelab.hookspecs import ROUTER_INITIALISERS
from moelab.initialisers import PromptReader, UpcycleContext
from moelab.moe.layout import ExpertLayout
from moelab.registry import Registry
from moelab_upcycling.convert import convert
from moelab_upcycling.dense_states import DenseStates
from moelab_upcycling.source import DenseSource
from moelab_upcycling.verify import verify

PROMPTS = {"positive": [["a sum", "2 + 2"], ["def f(x):"]], "negative": [["a poem"], []]}
STATES = np.random.default_rng(0).normal(size=(3, 128, 32))  # [layer, token id, D]
CONTEXT = UpcycleContext(32, 100, 1, 3, ExpertLayout(2, 1, 13), 0, True, 0.02, 0)
READER = PromptReader(
    encode=lambda text: [ord(character) for character in text],
    embed=lambda ids: STATES[0, list(ids)].astype(np.float32),
    hidden=lambda layer, texts: [STATES[layer, list(ids)] for ids in texts],
)


def hidden(prompts: dict[str, Any], **options: Any) -> Any:
    node = {"name": "hidden", **prompts, **options}
    part: Any = Registry(entry_points=False).build(ROUTER_INITIALISERS, node, CONTEXT, "recipe.router")
    part.prepare(READER)
    return part


@pytest.mark.parametrize("tokens", ["last", "mean"])
def test_a_row_is_mergekits_positive_less_negative_at_unit_norm(tokens: str) -> None:
    def state(text: str) -> np.ndarray:
        found = STATES[1, [ord(character) for character in text]]
        return found[-1] if tokens == "last" else found.mean(0)

    rows = hidden(PROMPTS, tokens=tokens, scale=0.5).weight()
    first = (state("a sum") + state("2 + 2")) / 2 - state("a poem")
    for row, wanted in zip(rows, (first, state("def f(x):")), strict=True):
        assert row == pytest.approx(0.5 * wanted / np.linalg.norm(wanted), abs=1e-6)


def test_rows_that_are_nearly_alike_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moelab"):
        hidden(PROMPTS)
        assert not caplog.records
        hidden({"positive": [["ask me"], ["ask him or me"]]}, tokens="last")  # the same last token
    assert "the rows of layer 1 are nearly alike" in caplog.text


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        ({"positive": [["a"]]}, "each of the 2 experts, has 1"),
        ({"positive": [["a"], []]}, "every expert needs at least one prompt"),
        ({"positive": [["a"], ["b"]], "tokens": "first"}, "tokens must be one of last, mean"),
        ({"positive": [["a"], ["b"]], "negative": [["a"], []]}, "the prompts of expert 0 cancel each other"),
    ],
)
def test_prompts_that_say_nothing_are_refused(prompts: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        hidden(prompts)


def test_experts_of_two_models_are_chosen_by_the_states_of_the_first(tmp_path: Path) -> None:
    """Each layer's rows, whichever worker made it, and verified byte for byte."""
    sources = [write_dense(tmp_path / str(seed), Tiny(vocab=300, layers=3, seed=seed)) for seed in (0, 1)]
    for name, content in ByteTokenizer().files().items():
        (sources[0] / name).write_bytes(content)
    layout = {"name": "uniform", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 592}
    recipe = {"experts": {"name": "mix"}, "router": {"name": "hidden", **PROMPTS}}
    config = recipe_config(sources, moe={"layout": layout}, recipe=recipe, max_shard_size="100KB")
    plan = plan_for(config)
    assert convert(plan, tmp_path / "out", workers=2).complete
    made = read_all(tmp_path / "out")
    encode = ByteTokenizer().encode
    with DenseSource(sources[0]) as source:
        states = DenseStates(source)
        for layer in range(3):
            plus, also, code, minus = (
                state[-1]
                for state in states.entering(layer, [encode(t) for t in ("a sum", "2 + 2", "def f(x):", "a poem")])
            )
            rows = made[f"model.layers.{layer}.mlp.gate.weight"].float().numpy()
            for row, wanted in zip(rows, ((plus + also) / 2 - minus, code), strict=True):
                assert row == pytest.approx(wanted / np.linalg.norm(wanted), abs=2**-9)  # bfloat16
    assert not verify(tmp_path / "out", plan, full=True).differences
