"""The schema for editors, judged by a validator of JSON Schema: what is right passes, what is wrong does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moelab.config.run import RunConfig
from moelab.config.upcycle import UpcycleConfig
from moelab.registry import Registry
from moelab_tools.config_schema import config_schema

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: pip install jsonschema")
SECTIONS = ("train", "moe", "model")


@pytest.fixture(scope="module")
def validators() -> dict[type, Any]:
    registry = Registry(entry_points=False)
    schemas = {kind: config_schema(kind, registry, kind.__name__) for kind in (RunConfig, UpcycleConfig)}
    for schema in schemas.values():
        jsonschema.Draft7Validator.check_schema(schema)
    return {kind: jsonschema.Draft7Validator(schema) for kind, schema in schemas.items()}


def test_every_shipped_config_passes(root: Path, validators: dict[type, Any]) -> None:
    files = {path: RunConfig for section in SECTIONS for path in (root / "configs" / section).glob("*.yaml")}
    files |= dict.fromkeys((root / "configs/upcycle").glob("*.yaml"), UpcycleConfig)
    assert len(files) > 15
    for path, kind in files.items():
        errors = [error.message for error in validators[kind].iter_errors(yaml.safe_load(path.read_text()))]
        assert not errors, f"{path}: {errors}"


@pytest.mark.parametrize(
    "text",
    [
        "train: {steps: '${oc.env:STEPS}'}", "optimizer: {lr: '1_000'}", "model: {moe: null}", "name: 12",
        "base: train/tiny_moe", "model: {base: model/qwen2-7b, moe: {router: {norm_topk_prob: true}}}",
        "model: {moe: {layers: {'0': {router: {name: hash}}}}}", "train: {save_every: null, micro_batch_size: 4}",
        "model: {moe: {balance_losses: [{name: load_balance, weight: 0.01, layers: '1', schedule: {final: 0}}]}}",
        "model: {moe: {balance_losses: {'0': {weight: 0.1}}}}", "run_dir: '???'",
        "data: {source: {name: text, paths: [a]}}",
    ],
)  # fmt: skip
def test_what_moelab_takes_passes(text: str, validators: dict[type, Any]) -> None:
    assert not [error.message for error in validators[RunConfig].iter_errors(yaml.safe_load(text))]


@pytest.mark.parametrize(
    "text",
    [
        "train: {stepz: 3}", "train: {steps: many}", "optimiser: {}", "model: {moe: {router: {name: sotfmax}}}",
        "model: {moe: {router: {name: hash, capacity_factor: 1.0}}}", "evaluation: {prompts: 3}", "resume: maybe",
        "model: {moe: {layers: {'0': {rooter: {name: hash}}}}}", "data: null",
    ],
)  # fmt: skip
def test_what_moelab_refuses_does_not_pass(text: str, validators: dict[type, Any]) -> None:
    assert [error.message for error in validators[RunConfig].iter_errors(yaml.safe_load(text))]
