"""Checkpoints go from us to transformers and back without losing a bit, in every form they are stored in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moelab.hf.files import TensorFolder
from moelab.hf.load import load_hf
from moelab.hf.names import expected_tensors
from moelab.hf.save import save_hf
from parity.reference import DENSE, MOE, reference_model
from parity.roundtrip import CASES, Case, round_trip, stored_names


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_checkpoint_survives_the_way_to_transformers_and_back(case: Case, tmp_path: Path):
    """transformers reports nothing missing, unexpected or mismatched; weights are bit-equal, configs equal."""
    assert round_trip(case, tmp_path) <= 1e-5


@pytest.mark.parametrize(
    "fields",
    [DENSE, MOE | {"decoder_sparse_step": 2, "tie_word_embeddings": True}, MOE | {"mlp_only_layers": [0]}],
    ids=["dense", "moe, steps, tied", "moe, dense layer"],
)
def test_expected_tensors_are_those_that_transformers_writes(fields: dict, tmp_path: Path):
    """From the config alone, names and shapes, as upcycling plans its output."""
    reference_model(fields).save_pretrained(tmp_path / "theirs")
    ours = load_hf(tmp_path / "theirs")
    save_hf(ours, tmp_path / "ours")
    expected = expected_tensors(ours.config)
    assert set(expected) == stored_names(tmp_path / "theirs") == stored_names(tmp_path / "ours")
    assert {name: stored.shape for name, stored in TensorFolder(tmp_path / "theirs").tensors.items()} == expected


def test_config_json_keeps_what_transformers_4_reads(tmp_path: Path):
    """4.x takes theta 10000 from a file that has only `rope_parameters`, and says nothing."""
    reference_model(MOE).save_pretrained(tmp_path / "theirs")
    save_hf(load_hf(tmp_path / "theirs"), tmp_path / "ours", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["rope_theta"] == 1_000_000.0
    assert written["torch_dtype"] == "bfloat16"
    assert written["norm_topk_prob"] is False
    assert "lm_head.weight" in stored_names(tmp_path / "ours")
