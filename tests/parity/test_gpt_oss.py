"""gpt-oss from its own folders: transformers' logits, gradients and texts, windows, YaRN, sinks and packed experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelab import load
from moelab.errors import CheckpointError
from moelab.hf.config import read_config
from moelab.nn.generate import generate_batch
from moelab.nn.sampling import Sampling
from parity.reference import MAJOR, strengthen

pytestmark = pytest.mark.skipif(MAJOR < 5, reason="4.x has no limit and alpha in gpt-oss's config")

YARN = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 16, "rope_theta": 100.0,
}  # fmt: skip
FIELDS: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "num_local_experts": 12, "num_experts_per_tok": 3, "sliding_window": 7,
    "max_position_embeddings": 64, "rope_parameters": YARN, "swiglu_limit": 0.7, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
TOKENS = torch.randint(3, 67, (2, 30), generator=torch.Generator().manual_seed(0))
LAYER = "model.layers.1.mlp.experts"


def made(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A model of transformers, strong in every bias and sink, in float32; and its folder, in `dtype`."""
    config = transformers.GptOssConfig(**FIELDS | fields)
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    model = transformers.GptOssForCausalLM(config).eval()
    strengthen(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.mul_(10)
    model.to(dtype).save_pretrained(folder)
    if dtype == torch.float32:
        return model
    return transformers.GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def away(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def test_an_attention_without_biases_is_transformers(tmp_path: Path) -> None:
    theirs = made(tmp_path, attention_bias=False)
    assert away(logits(load(tmp_path)), logits(theirs)) < 1e-5


def test_logits_and_gradients_are_transformers(tmp_path: Path) -> None:
    theirs = made(tmp_path)
    ours = load(tmp_path)
    assert away(logits(ours), logits(theirs)) < 1e-5
    for model in (ours, theirs):
        scores = model(TOKENS).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(scores, TOKENS[:, 1:].flatten()).backward()
    ours_by_name = dict(ours.named_parameters())
    for number, layer in enumerate(theirs.model.layers):
        mine = f"layers.{number}"
        for ours_name, wanted in (
            ("self_attn.sinks", layer.self_attn.sinks),
            ("self_attn.o_proj.bias", layer.self_attn.o_proj.bias),
            ("self_attn.q_proj.weight", layer.self_attn.q_proj.weight),
            ("mlp.router.gate_bias", layer.mlp.router.bias),
            ("mlp.experts.down", layer.mlp.experts.down_proj),
            ("input_layernorm.weight", layer.input_layernorm.weight),
        ):
            gradient = ours_by_name[f"{mine}.{ours_name}"].grad
            assert gradient is not None
            assert away(gradient, wanted.grad) < 1e-4, ours_name


def test_in_float64_they_are_transformers_to_ten_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both norms narrow to float32; told not to, they leave the tables of the rotary embedding, the same in both."""

    def wide(self: Any, x: Tensor) -> Tensor:
        eps = getattr(self, "eps", None) or self.variance_epsilon
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))

    theirs = made(tmp_path).double()
    ours = load(tmp_path, dtype=torch.float64)
    for kind in (type(theirs.model.norm), type(ours.norm)):
        monkeypatch.setattr(kind, "forward", wide)
    assert away(logits(ours), logits(theirs)) < 1e-10


def test_texts_over_a_cache_are_transformers(tmp_path: Path) -> None:
    """Ragged prompts in one batch, beyond the window: each greedy token is the best of transformers' whole pass."""
    theirs = made(tmp_path)
    prompts = [TOKENS[0, :5].tolist(), TOKENS[1, :11].tolist(), TOKENS[0, 7:8].tolist()]
    for one in generate_batch(load(tmp_path), prompts, Sampling(12, temperature=0.0)):
        scores = logits(theirs, torch.tensor([[*prompts[one.prompt], *one.ids]]))[0, len(prompts[one.prompt]) - 1 : -1]
        chosen = scores[range(len(one.ids)), one.ids]
        assert len(one.ids) == 12 or one.ids[-1] == 2
        assert float((scores.amax(-1) - chosen).max()) < 1e-4 * float(scores.std())


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        {"tie_word_embeddings": True},
        {"rope_parameters": None, "swiglu_alpha": 1.1},
    ],
    ids=str,
)
def test_other_layers_and_defaults_are_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = made(tmp_path, **fields)
    if fields.get("rope_parameters", 0) is None:
        config = json.loads((tmp_path / "config.json").read_text())
        del config["rope_parameters"], config["layer_types"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert away(logits(load(tmp_path)), logits(theirs)) < 1e-5


def test_a_folder_in_bfloat16_is_read_as_it_is(tmp_path: Path) -> None:
    theirs = made(tmp_path, torch.bfloat16)
    assert away(logits(load(tmp_path)), logits(theirs)) < 1e-5


def test_experts_packed_as_mxfp4_are_what_transformers_unpacks(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made(tmp_path, torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    stream = torch.Generator().manual_seed(3)
    shapes = {"gate_up_proj": (12, 128, 1, 16), "down_proj": (12, 32, 2, 16)}
    packed: dict[str, Tensor] = {}
    for layer in range(3):
        for name, shape in shapes.items():
            blocks = torch.randint(0, 256, shape, generator=stream, dtype=torch.uint8)
            scales = torch.randint(120, 126, shape[:3], generator=stream, dtype=torch.uint8)
            prefix = f"model.layers.{layer}.mlp.experts.{name}"
            unpacked = convert_moe_packed_tensors(blocks, scales)
            assert unpacked.shape == tensors[prefix].shape
            tensors[prefix] = unpacked.contiguous()
            packed |= {f"{prefix}_blocks": blocks, f"{prefix}_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wanted = load(tmp_path)
    rest = {name: tensor for name, tensor in tensors.items() if f"{name}_blocks" not in packed}
    save_file(rest | packed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load(tmp_path)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    save_file(rest | packed | {f"{LAYER}.down_proj": tensors[f"{LAYER}.down_proj"]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="stands there beside"):
        load(tmp_path)
    del packed[f"{LAYER}.down_proj_scales"]
    save_file(rest | packed, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="stands there without"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quantization_config", {"quant_method": "gptq"}, "moelab reads mxfp4"),
        ("attention_bias", 0, "must be a bool"),
        ("hidden_act", "gelu", "must be"),
        ("layer_types", ["chunked_attention"] * 3, "must be a list"),
    ],
)
def test_what_is_no_gpt_oss_is_refused_by_name(key: str, value: Any, message: str, tmp_path: Path) -> None:
    made(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=f"{key}: .*{message}"):
        read_config(tmp_path)
