"""What trainers ask of an adapted model: layers without a head, records, heads of other kinds, a folder for others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.nn.transformer import Transformer

transformers = pytest.importorskip("transformers")
from parity.reference import MOE, reference_model  # noqa: E402 (it imports transformers)

UNIFORM = {"name": "uniform", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def built(router: str = "softmax_topk") -> Transformer:
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return moelab.build(
        ModelConfig(**sizes | heads, moe=MoEConfig(layout=dict(UNIFORM), router={"name": router}))
    ).eval()


def some_ids(batch: int = 2, seq: int = 9) -> Tensor:
    return torch.randint(0, 61, (batch, seq), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_its_base_model_is_the_layers_without_the_head_and_tells_its_records() -> None:
    """As TRL's trainers ask: through `base_model`, then the head on what they need."""
    adapted = moelab.as_transformers(built())
    told: list[Any] = []
    adapted.on_records = told.extend
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    hidden = adapted.base_model(some_ids(), attention_mask=mask, use_cache=False).last_hidden_state
    assert [record.layer_id for record in told] == [0, 1]
    assert all(int(record.counts.sum()) == 2 * 15 for record in told)  # padding is counted nowhere
    assert torch.equal(adapted.get_output_embeddings()(hidden), adapted(some_ids(), attention_mask=mask).logits)
    assert adapted.base_model.embed_tokens is adapted.model.embed_tokens


def test_it_goes_by_the_folder_that_it_was_read_from_and_that_is_written_nowhere(tmp_path: Path) -> None:
    """In which TRL looks for a reference and PEFT for what it adapts: by the config's name and architecture."""
    reference_model(MOE).save_pretrained(tmp_path / "reference")
    adapted = moelab.as_transformers(moelab.load(tmp_path / "reference"))
    assert adapted.config.name_or_path == str(tmp_path / "reference")
    assert adapted.config.architectures == ["MoelabForCausalLM"] and not adapted.config.auto_map
    adapted.save_pretrained(tmp_path / "own")
    assert str(tmp_path) not in (tmp_path / "own" / "config.json").read_text()
    assert moelab.as_transformers(built()).config.name_or_path == ""


def test_exported_it_is_read_by_transformers_own_class_where_that_can_say_the_model(tmp_path: Path) -> None:
    reference_model(MOE).save_pretrained(tmp_path / "reference")
    adapted = moelab.as_transformers(moelab.load(tmp_path / "reference"))
    adapted.save_pretrained(tmp_path / "exported", export=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert type(theirs).__name__ == "Qwen2MoeForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(adapted(some_ids()).logits, theirs(some_ids()).logits, atol=2e-5, rtol=1e-4)


def test_what_that_format_cant_say_is_written_as_ours_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapted = moelab.as_transformers(built("sigmoid_topk"))
    with caplog.at_level(logging.WARNING, "moelab"):
        adapted.save_pretrained(tmp_path / "model", export=True)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "moelab"]
    assert "written as model_type moelab" in line and "sigmoids" in line
    moelab.register_with_transformers()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(some_ids()).logits, adapted(some_ids()).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_classifier_reads_the_last_real_token_whatever_padding_holds(side: str) -> None:
    model = moelab.as_classifier(built(), num_labels=3)
    ids = some_ids(1, 5)
    alone = model(ids).logits
    for filler in (0, 7):  # token 7 may be a real one elsewhere
        pad = torch.full((1, 4), filler)
        padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
        mask = torch.cat([pad * 0, ids * 0 + 1] if side == "left" else [ids * 0 + 1, pad * 0], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        found = model(padded, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(found, alone, atol=2e-6, rtol=1e-5)
    assert alone.shape == (1, 3)


def test_a_batch_without_a_mask_needs_to_know_its_padding() -> None:
    with pytest.raises(ValueError, match=r"attention_mask: give one, or set config\.pad_token_id"):
        moelab.as_classifier(built())(some_ids())
    assert moelab.as_classifier(built(), pad_token_id=60)(some_ids()).logits.shape == (2, 1)


def test_a_new_head_is_put_on_what_save_pretrained_wrote(tmp_path: Path) -> None:
    model = built()
    moelab.as_transformers(model).save_pretrained(tmp_path / "model")
    moelab.register_with_transformers()
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    assert found.score.weight.shape == (1, 32)
    assert torch.equal(found.model.embed_tokens.weight, model.embed_tokens.weight)
