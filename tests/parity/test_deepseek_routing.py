"""DeepSeek-V3's experts and router, read from a model of its kin that our attention can express: dots1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moelab import CheckpointError, UserError, load
from moelab.hf.config import read_config
from moelab.hf.unexpressed import UNEXPRESSED
from parity.reference import MAJOR, strengthen

FIELDS: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 12, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "n_shared_experts": 2, "n_routed_experts": 12,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "sliding_window": None, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = torch.randint(0, 67, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.skipif(MAJOR < 5, reason="4.x writes other names")
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n_group": 4, "topk_group": 2},
        {"norm_topk_prob": False, "first_k_dense_replace": 0},
        {"attention_bias": True},
    ],
    ids=["as published", "within groups", "not normalised, all layers sparse", "biases on q, k, v and o"],
)
def test_logits_are_transformers(more: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a selection bias large enough to move the choice."""
    model = transformers.Dots1ForCausalLM(transformers.Dots1Config(**FIELDS | more)).eval()
    strengthen(model)
    for index, (name, buffer) in enumerate(model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(index)))
    model.save_pretrained(tmp_path)
    ours = load(tmp_path)
    with torch.no_grad():
        found, wanted = ours(TOKENS).logits, model(TOKENS).logits
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
        for layer in ours.layers[1:]:
            layer.mlp.router.bias.zero_()
        assert float((ours(TOKENS).logits - wanted).abs().max()) > 1e-3 * float(wanted.abs().max())
    assert not caplog.records, "a field was not known"


def test_windows_are_refused(tmp_path: Path) -> None:
    import json

    fields = FIELDS | {"model_type": "dots1", "sliding_window": 8, "max_window_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="max_window_layers: 1 is not supported"):
        read_config(tmp_path)


@pytest.mark.parametrize("model_type", UNEXPRESSED)
def test_what_our_decoder_has_no_parts_for_is_told_by_name(model_type: str, tmp_path: Path) -> None:
    assert model_type in transformers.CONFIG_MAPPING or MAJOR < 5, "transformers knows no such kind"
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    with pytest.raises(UserError) as told:
        read_config(tmp_path)
    for reason in UNEXPRESSED[model_type]:
        assert reason in str(told.value)
