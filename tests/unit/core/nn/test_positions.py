"""Attentions and rope scalings in a model: what is exact, what is refused, and what is told."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moelab
from moelab.builder import reposition
from moelab.config.model import ModelConfig
from moelab.config.rope_scaling import RopeContext
from moelab.errors import ConfigError
from moelab.hookspecs import ROPE_SCALINGS
from moelab.nn.kv_cache import KVCache
from moelab.nn.rope import Rope
from moelab.paths import Places
from moelab.plugin_faults import plugins_told

REGISTRY = moelab.Registry(entry_points=False)
CONFIG = ModelConfig(
    vocab_size=50, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16, rope_theta=100.0, initializer_range=0.3,
)  # fmt: skip
DUAL, YARN = {"name": "dual_chunk"}, {"name": "yarn", "factor": 4.0}
IDS = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(1))


def built(**changes: Any) -> Any:
    return moelab.build_model(dataclasses.replace(CONFIG, **changes), REGISTRY, seed=1).eval()


@torch.no_grad()
def test_dual_chunks_are_plain_up_to_chunk_and_local() -> None:
    """s = 12 and w = 4: every distance is as it is for 16 tokens; the 17th is the first that one is cut for."""
    plain, dual = built()(IDS).logits, built(attention=DUAL)(IDS).logits
    torch.testing.assert_close(dual[:, :16], plain[:, :16])
    assert (dual[:, 16:] - plain[:, 16:]).abs().amax((0, 2)).min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("attention", [None, {"name": "sliding_window", "window": 5, "layers": "1"}, DUAL])
def test_a_model_is_repositioned_with_its_weights_as_they_are(attention: Any) -> None:
    model = built()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reposition(model, REGISTRY, attention=attention, rope_scaling=YARN)
    torch.testing.assert_close(model(IDS).logits, built(attention=attention, rope_scaling=YARN)(IDS).logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.rope_scaling == YARN
    with pytest.raises(ConfigError, match=r"model.attention.name: no attention 'dual_chunks', did you mean"):
        reposition(model, REGISTRY, attention={"name": "dual_chunks"})


@torch.no_grad()
def test_a_cache_of_another_mode_is_refused() -> None:
    cache = KVCache(2)
    built()(IDS, cache=cache)
    for other in ({"attention": DUAL}, {"rope_scaling": YARN}):
        with pytest.raises(ConfigError, match=r"cache: holds keys turned by their own positions, and .*new KVCache"):
            built(**other)(IDS[:, :1], cache=cache)
    built()(IDS[:, :1], cache=cache)


@torch.no_grad()
def test_a_text_beyond_the_reach_is_told_once_with_the_cure(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "moelab")
    for reaching in ({"attention": DUAL}, {"rope_scaling": YARN}, {"rope_scaling": {"name": "dynamic", "factor": 2.0}}):
        built(**reaching)(IDS)
    built()(IDS[:, :16])
    assert not caplog.records
    model = built()
    model(IDS)
    model(IDS)
    assert [record.getMessage() for record in caplog.records][1:] == []
    assert "40 tokens: the model reaches 16" in caplog.text
    assert "--attention" in caplog.text


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"rope_scaling": {"name": "yarn", "factor": 0.5}}, "model.rope_scaling: 'yarn' .*factor must be at least 1"),
        ({"rope_scaling": {"name": "linear", "factor": float("nan")}}, "factor: .*must be a finite number"),
        ({"rope_scaling": {"name": "linear", "factor": float("inf")}}, "factor: .* must be a finite number"),
        ({"rope_scaling": {"name": "dynamic", "factor": float("inf")}}, "factor: .* must be a finite number"),
        ({"rope_scaling": {**YARN, "beta_fast": float("inf")}}, "beta_fast: .* must be a finite number"),
        ({"rope_scaling": {**YARN, "mscale": -40.0, "mscale_all_dim": 1.0}}, "mscale must not be negative, not -40"),
        ({"rope_scaling": {"name": "yarn"}}, "model.rope_scaling.factor: .*has no value yet"),
        ({"rope_scaling": {"factor": 2.0}}, "model.rope_scaling: no `name`"),
        ({"attention": {**DUAL, "chunk": 20}}, r"chunk 20, local -4: both must be at least 1"),
        ({"attention": {**DUAL, "chunk": 4}}, r"local: 12 exceeds chunk 4"),
        ({"attention": {"name": "dual_chunk", "preset": None, "chunk": 8, "local": 4, "max_position": 10}},
         r"max_position: 10 is less than chunk 8 \+ local 4 - 1"),
        ({"attention": {"name": "dual_chunk", "preset": None, "chunk": 8}}, "preset null needs chunk, local and"),
        ({"attention": {**DUAL, "temperature": "static"}}, "factor goes with temperature static"),
        ({"attention": {**DUAL, "temperature": "warm"}}, "temperature must be one of none, static, per_query"),
        ({"attention": {"name": "sliding_window", "window": 0}}, "window must be at least 1, not 0"),
        ({"attention": {"name": "sliding_window", "window": 4, "layers": "7"}}, "layers: the model has layers 0 .. 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(**part)


def test_the_words_of_config_json_are_taken_too() -> None:
    assert built(rope_scaling={"rope_type": "yarn", "factor": 4.0}).config.rope_scaling == YARN
    with torch.no_grad():
        plain = built(rope_scaling={"rope_type": "default"})(IDS).logits
        torch.testing.assert_close(plain, built()(IDS).logits, atol=0, rtol=0)


def test_yarn_of_qwen2_keeps_24_frequencies_and_divides_24() -> None:
    """Head size 128, base 1e6, 32,768 tokens times 4: low 23 and high 40 of 64, m = 1.138629."""
    scaling = REGISTRY.build(ROPE_SCALINGS, YARN, RopeContext(128, 1e6, 32768), "rope")
    plain, _ = Rope(128, 1e6).frequencies(torch.device("cpu"))
    found, factor = Rope(128, 1e6, scaling).frequencies(torch.device("cpu"))
    assert int((found == plain).sum()) == 24
    assert int(torch.isclose(found, plain / 4, rtol=1e-6, atol=0).sum()) == 24
    assert factor == pytest.approx(1.138629, abs=1e-6)


def test_rope_scalings_are_known_without_torch() -> None:
    """`moelab upcycle` reads them from config.json in processes that don't import it."""
    code = (
        "import sys; from moelab.registry import Registry; from moelab.hookspecs import ROPE_SCALINGS;"
        "Registry(entry_points=False, points=(ROPE_SCALINGS,)).components(ROPE_SCALINGS);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class _Attends:
    """An attention of somebody else."""

    cache_mode, reach = "theirs", None

    def __init__(self, gives: Any) -> None:
        self.gives = gives

    def __call__(self, query: Any, key: Any, value: Any, inputs: Any) -> Any:
        return self.gives(query)


def _fails(query: Any) -> Any:
    raise RuntimeError("out of ideas")


@pytest.mark.parametrize(
    ("gives", "told"),
    [
        (lambda query: None, "returned None; it must return a tensor \\(2, 4, 40, 8\\)"),
        (lambda query: query.transpose(1, 2), "returned \\(2, 40, 4, 8\\) float32; it must be \\(2, 4, 40, 8\\)"),
        (lambda query: query.long(), "returned .* int64; it must be"),
        (_fails, "raised RuntimeError: out of ideas \\("),
    ],
)
def test_what_an_attention_does_wrong_is_told_as_its_own(gives: Any, told: str) -> None:
    model = built()
    model.layers[1].self_attn.kernel = _Attends(gives)
    with (
        pytest.raises(ConfigError, match=f"model.attention: attention '_Attends' of .*, layer 1: {told}"),
        plugins_told(),
    ):
        model(IDS)


THEIRS = """
from dataclasses import dataclass
import moelab

@dataclass
class Options:
    gives: str = ""

class Scaling:
    length_matters, reach = False, None
    def __init__(self, options, context): self.gives = options.gives
    def __call__(self, f, length): return eval(self.gives)

@moelab.hookimpl
def moelab_rope_scalings(): return [moelab.component("theirs", Options, Scaling)]
"""


def test_what_a_rope_scaling_does_wrong_is_told_before_the_model_is_made(tmp_path: Path) -> None:
    (tmp_path / "their_scaling.py").write_text(THEIRS)
    registry = moelab.Registry(["their_scaling"], entry_points=False, places=Places(search=(tmp_path,)))
    for gives, told in (
        ("f", r"returned a Tensor; it must return \(frequencies \[4\], factor on cos and sin\)"),
        ("(f[1:], 1.0)", r"returned a Tensor \(3,\) of frequencies"),
        ("(f, '1')", "returned a str as the factor"),
        ("(f * float('nan'), 1.0)", "returned frequencies up to nan and factor 1; all must be finite"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
    ):
        config = dataclasses.replace(CONFIG, rope_scaling={"name": "theirs", "gives": gives})
        with pytest.raises(ConfigError, match=f"model.rope_scaling: rope scaling 'theirs' of their_scaling: {told}"):
            moelab.build_model(config, registry)


def test_a_window_within_the_trained_length_reaches_any(caplog: pytest.LogCaptureFixture) -> None:
    """It shows no distance that is new; a wider one does, and so does a layer without one."""
    caplog.set_level(logging.WARNING, "moelab")
    window = {"name": "sliding_window", "window": 16}
    built(attention=window)(IDS)
    assert not caplog.records
    for other in ({**window, "window": 17}, {**window, "layers": "1"}):
        built(attention=other)(IDS)
    assert caplog.text.count("40 tokens: the model reaches 16") == 2
