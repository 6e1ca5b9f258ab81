"""DeepSeek-V2 and V3 read from their own format: logits, cached continuation, and what is left out or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelab import CheckpointError, load
from moelab.hf.config import read_config
from moelab.hf.save import save_hf
from moelab.nn.generate import generate_batch
from moelab.nn.kv_cache import KVCache
from moelab.nn.sampling import Sampling
from parity.reference import MAJOR, strengthen

pytestmark = pytest.mark.skipif(MAJOR < 5, reason="4.x writes other names, and applies no mscale_all_dim in V2")
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 0.8, "rope_theta": 10_000.0,
}  # fmt: skip
FIELDS: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 12, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 2, "n_routed_experts": 12,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16,
    "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 10, "v_head_dim": 12, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GRID: dict[str, tuple[str, dict[str, Any]]] = {
    "V3": ("V3", {}),
    "V3, yarn": ("V3", {"rope_parameters": YARN}),
    "V3, queries of full rank, halves turned": ("V3", {"q_lora_rank": None, "rope_interleave": False}),
    "V3, values wider than queries": ("V3", {"v_head_dim": 22, "norm_topk_prob": False}),
    "V3, biases": ("V3", {"attention_bias": True}),
    "V3, biases, queries of full rank": ("V3", {"attention_bias": True, "q_lora_rank": None}),
    "V3, every layer dense": ("V3", {"first_k_dense_replace": 4}),
    "V3, rms_norm_eps, which the latent vectors' norms don't have": ("V3", {"rms_norm_eps": 1e-2}),
    "V2": ("V2", {"topk_method": "greedy", "q_lora_rank": None}),
    "V2, biases, every layer dense": ("V2", {"attention_bias": True, "first_k_dense_replace": 3}),
    "V2, within groups, yarn": (
        "V2", {"topk_method": "group_limited_greedy", "rope_parameters": YARN, "routed_scaling_factor": 16.0},
    ),
}  # fmt: skip
TOKENS = torch.randint(0, 67, (2, 40), generator=torch.Generator().manual_seed(0))


def made(version: str, fields: dict[str, Any], folder: Path) -> Any:
    """A model of transformers in its folder, its selection bias large enough to move the choice."""
    config = getattr(transformers, f"Deepseek{version}Config")(**FIELDS | fields)
    config._experts_implementation = "eager"  # grouped_mm, the default, refuses float64
    model = getattr(transformers, f"Deepseek{version}ForCausalLM")(config).eval()
    strengthen(model)
    for index, (name, buffer) in enumerate(model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(index)))
    model.save_pretrained(folder)
    return model


def apart(found: Tensor, wanted: Tensor) -> float:
    """Of the logits' scale."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(("version", "fields"), GRID.values(), ids=GRID.keys())
@torch.no_grad()
def test_logits_are_transformers(
    version: str, fields: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In fp64 both compute scores, weights or (V2) rotations in fp32 in places of their own: 1e-6."""
    theirs, ours = made(version, fields, tmp_path), load(tmp_path)
    assert not caplog.records, "a field was not known"
    assert apart(ours(TOKENS).logits, theirs(TOKENS).logits) <= 1e-5
    ours, theirs = ours.double(), theirs.double()
    assert apart(ours(TOKENS).logits, theirs(TOKENS).logits) <= 3e-6


@torch.no_grad()
def test_kimi_k2_is_deepseek_v3_under_another_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With config.json's fields that V3's doesn't have, and its YaRN, whose two borders are one.

    As copies in others' repositories have it; the published file itself was not opened.
    """
    stretched = YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 5e4}
    fields = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "rope_parameters": stretched}
    theirs = made("V3", fields, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    own = {
        "model_type": "kimi_k2", "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1,
        "ep_size": 1, "seq_aux": True, "aux_loss_alpha": 0.001, "num_nextn_predict_layers": 0, "auto_map": {"A": "own"},
        "rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | own))
    assert apart(load(tmp_path)(TOKENS).logits, theirs(TOKENS).logits) <= 1e-5
    assert not caplog.records, "a field was not known"


def test_no_shared_experts_are_none(tmp_path: Path) -> None:
    """As DeepSeek's own code reads null."""
    (tmp_path / "config.json").write_text(json.dumps(FIELDS | {"model_type": "deepseek_v3", "n_shared_experts": None}))
    moe = read_config(tmp_path).moe
    assert moe is not None
    assert moe.shared_expert == {"name": "none"}


@torch.no_grad()
def test_latent_attention_in_float64_is_transformers_to_rounding(tmp_path: Path) -> None:
    """Routed experts silent, whose weights both compute in fp32: all else agrees to the last bits."""
    theirs = made("V3", {"rope_parameters": YARN}, tmp_path).double()
    ours = load(tmp_path).double()
    for layer, other in zip(ours.layers[1:], theirs.model.layers[1:], strict=True):
        layer.mlp.experts.down.zero_()
        other.mlp.experts.down_proj.zero_()
    assert apart(ours(TOKENS).logits, theirs(TOKENS).logits) <= 1e-12


@pytest.mark.parametrize("version", ["V2", "V3"])
@torch.no_grad()
def test_a_cached_continuation_is_transformers(version: str, tmp_path: Path) -> None:
    """A prompt, then one token, then five at once, then one: by keys made of the cache, and by the cache as it is."""
    theirs = made(version, {"rope_parameters": YARN}, tmp_path)
    ours, cache, past = load(tmp_path), KVCache(3), None
    for begin, end in ((0, 20), (20, 21), (21, 26), (26, 27)):
        wanted = theirs(TOKENS[:, begin:end], past_key_values=past, use_cache=True)
        past = wanted.past_key_values
        assert apart(ours(TOKENS[:, begin:end], cache=cache).logits, wanted.logits) <= 1e-5


@torch.no_grad()
def test_greedy_texts_are_transformers(tmp_path: Path) -> None:
    """Of prompts of unlike lengths, padded on the left; a near-tie may turn: each token is within 1e-4 of the best."""
    theirs, ours = made("V3", {"rope_parameters": YARN}, tmp_path), load(tmp_path)
    lengths = (5, 17)
    prompts = [TOKENS[0, :length].tolist() for length in lengths]
    found = generate_batch(ours, prompts, Sampling(max_new_tokens=12, temperature=0.0))
    for prompt, text in zip(prompts, found, strict=True):
        assert len(text.ids) == 12
        scores = theirs(torch.tensor([prompt + text.ids])).logits[0, len(prompt) - 1 : -1]
        chosen = scores.gather(1, torch.tensor(text.ids)[:, None])[:, 0]
        assert float((scores.max(1).values - chosen).max()) <= 1e-4


def test_layers_of_multi_token_prediction_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the published files have them: behind the decoder's layers, with tensors that no other layer has."""
    made("V3", {}, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    wanted = load(tmp_path)(TOKENS).logits
    extra = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in tensors.items() if "layers.2." in name}
    extra["model.layers.3.eh_proj.weight"] = torch.randn(32, 64)
    save_file(tensors | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load(tmp_path)(TOKENS).logits, wanted)
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"{len(extra)} tensors are left out" in told
    assert "multi-token prediction" in told


@torch.no_grad()
def quantised(folder: Path, rows: int, columns: int) -> dict[str, Tensor]:
    """Make a folder's matrices but embedding and head eight bits wide; -> what they stand for, by name."""
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        if weight.ndim != 2 or "embed" in name or "lm_head" in name or name.endswith("mlp.gate.weight"):
            continue
        narrow, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), []
        meant[name] = torch.empty_like(weight)
        for top in range(0, len(weight), rows):
            scales.append([])
            for left in range(0, weight.shape[1], columns):
                place = (slice(top, top + rows), slice(left, left + columns))
                scale = weight[place].abs().max() / 448
                narrow[place] = (weight[place] / scale).to(torch.float8_e4m3fn)
                meant[name][place] = narrow[place].float() * scale
                scales[-1].append(scale)
        tensors |= {name: narrow, f"{name}_scale_inv": torch.tensor(scales)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [rows, columns],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    return meant


@torch.no_grad()
def test_eight_bits_with_scales_of_blocks_are_the_weights_that_they_stand_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Blocks of 16 x 8, which divide neither the latent projection's 24 rows nor the experts' 12."""
    theirs = made("V3", {}, tmp_path)
    meant = quantised(tmp_path, 16, 8)
    assert "model.layers.1.self_attn.kv_a_proj_with_mqa.weight" in meant
    apart_before = apart(load(tmp_path)(TOKENS).logits, theirs(TOKENS).logits)
    assert apart_before > 1e-3, "eight bits change something"
    assert "weights of eight bits are read times the scales of their 16 x 8" in caplog.text
    for name, parameter in theirs.named_parameters():
        if name in meant:
            parameter.copy_(meant[name])
        for expert in range(12 if ".experts." in name else 0):
            prefix = f"{name.rpartition('.')[0]}.{expert}"
            if name.endswith("down_proj"):
                parameter[expert] = meant[f"{prefix}.down_proj.weight"]
            else:
                parameter[expert] = torch.cat([meant[f"{prefix}.{half}_proj.weight"] for half in ("gate", "up")])
    assert apart(load(tmp_path)(TOKENS).logits, theirs(TOKENS).logits) <= 1e-5


def test_eight_bits_without_their_scales_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    made("V3", {}, tmp_path)
    quantised(tmp_path, 16, 8)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    without = {key: tensor for key, tensor in tensors.items() if key != f"{name}_scale_inv"}
    save_file(without, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight_scale_inv of shape \[3, 4\], and there is none"):
        load(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"fp8"', '"awq"'))
    with pytest.raises(CheckpointError, match="moelab reads fp8"):
        load(tmp_path)


def test_an_export_says_that_there_is_no_such_layout(tmp_path: Path) -> None:
    made("V3", {}, tmp_path / "theirs")
    with pytest.raises(
        CheckpointError, match=r"model\.latent_attention: moelab reads DeepSeek's layout and writes none"
    ):
        save_hf(load(tmp_path / "theirs"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"attention_bias": "yes"}, "attention_bias: must be a bool, not 'yes'"),
        ({"scoring_func": "softmax"}, 'scoring_func: "softmax" is not supported'),
        ({"num_key_value_heads": 2}, "num_key_value_heads: must be 4 with latent_attention, not 2"),
        ({"qk_rope_head_dim": 7, "head_dim": 7}, "qk_rope_head_dim: rotary embedding needs an even one, not 7"),
        ({"head_dim": 18}, "head_dim: 18 is not supported; of latent attention it is qk_rope_head_dim, 8"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: 2 is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_compute_otherwise_is_refused(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    fields = FIELDS | {"model_type": "deepseek_v3"} | change
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=told.replace("(", r"\(")):
        read_config(tmp_path)
