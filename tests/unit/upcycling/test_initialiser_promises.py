"""What a stranger's initialiser returns or raises is told: axis, name, owner, layer, what is right, file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dense_checkpoints import Tiny, recipe_config, upcycle, write_dense
from moelab.errors import ConfigError

PLUGIN = """
from dataclasses import dataclass
import numpy as np
import moelab
from moelab.initialisers import NeuronPlan


@dataclass
class Options:
    pass


class Experts:
    def __init__(self, options, context):
        self.n = context.layout.moe_intermediate_size

    def plan(self, expert):
        plan = NeuronPlan(np.arange(self.n), dict.fromkeys(("gate", "up", "down"), np.zeros(self.n, bool)))
        return {plan}

    def materialise(self, plan, expert, matrix, dense):
        rows = dense.float32(plan.source)
        return {rows}

    {redrawn}


class Router:
    std = {std}

    def __init__(self, options, context):
        self.shape = (context.layout.num_experts, context.hidden_size)

    def weight(self):
        return {weight}


class Scaling:
    share = 1.0

    def __init__(self, options, context):
        pass

    def factors(self, context, logit_std):
        return {factors}


@moelab.hookimpl
def moelab_expert_initialisers():
    return [moelab.component("bad", Options, {experts})]


@moelab.hookimpl
def moelab_router_initialisers():
    return [moelab.component("bad", Options, Router)]


@moelab.hookimpl
def moelab_output_scalings():
    return [moelab.component("bad", Options, Scaling)]
"""
SOUND = {
    "plan": "plan", "rows": "rows", "std": "0.02", "weight": "np.zeros(self.shape, np.float32)", "factors": "{}",
    "experts": "Experts", "redrawn": "",
}  # fmt: skip
FAULTS = {
    "a plan that is a tuple": ("experts", {"plan": "(plan,)"}, "plan() returned a tuple; it must return a NeuronPlan"),
    "a neuron too far": ("experts", {"plan": "NeuronPlan(plan.source + 580, plan.redrawn)"}, "neurons are 0 .. 591"),
    "sources as floats": ("experts", {"plan": "NeuronPlan(plan.source * 1.0, plan.redrawn)"}, "source as float64 [80]"),
    "redrawn for one matrix": ("experts", {"plan": "NeuronPlan(plan.source, {'gate': 0})"}, "['gate'] as an int"),
    "another checkpoint": ("experts", {"plan": "NeuronPlan(plan.source, plan.redrawn, 3)"}, "planned the checkpoint 3"),
    "rows turned": ("experts", {"rows": "rows.T"}, "made float32 [32, 80]; it must be [80, 32]"),
    "rows as whole numbers": ("experts", {"rows": "rows.astype(int)"}, "made int64 [80, 32]; it must be float32"),
    "a list": ("experts", {"rows": "rows.tolist()"}, "made a list; it must be [80, 32]"),
    "too few rows redrawn": (
        "experts",
        {"redrawn": "def redrawn(self, plan, expert, matrix, dense): return dense.float32(plan.source[:0])",
         "plan": "NeuronPlan(plan.source, {m: ~r for m, r in plan.redrawn.items()})"},
        "made float32 [0, 32]; it must be [80, 32]",
    ),
    "NaN": ("experts", {"rows": "rows * np.nan"}, "made values that are NaN or Inf"),
    "an error": ("experts", {"rows": "rows.missing"}, "raised AttributeError: 'numpy.ndarray' object has no"),
    "no method": ("experts", {"experts": "lambda options, context: object()"}, "without a method plan()"),
    "a router turned": ("router", {"weight": "np.zeros(self.shape).T"}, "made float64 [32, 64]; it must be [64, 32]"),
    "a router of NaN": ("router", {"weight": "np.full(self.shape, np.nan)"}, "made values that are NaN or Inf"),
    "a router without std": ("router", {"std": "None"}, "has std None; it must be a finite number"),
    "factors in a list": ("scaling", {"factors": "[1.0]"}, "factors() returned a list"),
    "a factor of no matrix": ("scaling", {"factors": "{'side': 1.0}"}, "factors() returned one for 'side'"),
    "an endless factor": ("scaling", {"factors": "{'down': float('inf')}"}, "factors() returned inf for down"),
}  # fmt: skip
KINDS = {"experts": "expert initialiser", "router": "router initialiser", "scaling": "output scaling"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("promises") / "dense", Tiny(layers=1))


@pytest.mark.parametrize(("axis", "changed", "words"), FAULTS.values(), ids=FAULTS)
def test_what_an_initialiser_does_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axis: str, changed: dict[str, str], words: str
):
    name = "lab_of_" + "".join(c for c in tmp_path.name if c.isalnum())
    text = PLUGIN
    for key, value in (SOUND | changed).items():
        text = text.replace("{" + key + "}", value)
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    config = recipe_config(source, recipe={axis: {"name": "bad"}}, plugins=[name])
    with pytest.raises(ConfigError) as caught:
        upcycle(config, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"recipe.{axis}: {KINDS[axis]} 'bad' of {name}, layer 0: ")
    assert words in message
    assert (
        f"({name}.py:" in message or "built an object" in words or (axis == "experts" and "without a method" in words)
    )
