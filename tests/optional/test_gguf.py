"""GGUF files made with llama.cpp's own writer: read as the folder that they were made from, or refused by name.

`make test-extras` installs the package `gguf` and runs this; where it is missing it skips.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import moelab
from dense_checkpoints import plan_for
from moelab import session
from moelab.config.upcycle import UpcycleConfig
from moelab.errors import CheckpointError, ConfigError
from moelab.hf.config import read_config
from moelab.hf.files import TensorFolder
from moelab.hf.gguf_file import TYPES, halves
from moelab.hf.load import load_hf
from moelab_tools.exporting import export
from moelab_upcycling.convert import convert
from moelab_upcycling.source import DenseSource
from parity.reference import strengthen

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None and "MOELAB_REQUIRE_EXTRAS" not in os.environ, reason="not installed: gguf"
)
SIZES = {
    "vocab_size": 64, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
KINDS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3"}
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    # Phi-3's, several matrices in one (llama.cpp keeps them so, and its ffn_up is then twice as wide).
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip


def theirs(name: str) -> str:
    """GGUF's name of a tensor (gguf-py: constants.py, TENSOR_NAMES)."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.{kind}"


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order (convert_hf_to_gguf.py: LlamaModel.permute)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def dense(kind: str, **fields: Any) -> Any:
    more = {"qwen3": {"head_dim": 16}, "phi3": {"pad_token_id": 0}}.get(kind, {})
    config = getattr(transformers, f"{KINDS[kind]}Config")(**SIZES, **more, **fields)
    model = getattr(transformers, f"{KINDS[kind]}ForCausalLM")(config).eval()
    strengthen(model)
    return model


def write(path: Path, kind: str, model: Any, type_name: str = "F32", **changes: Any) -> Path:
    """The model as a GGUF file; matrices in this type, vectors in F32."""
    import gguf

    writer = gguf.GGUFWriter(path, changes.get("architecture", kind))
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    if kind == "qwen3":
        writer.add_key_length(16)
        writer.add_value_length(16)
    for key, value in changes.get("scaling", {}).items():
        name, text = f"{changes.get('architecture', kind)}.rope.{key}", isinstance(value, str)
        (writer.add_string if text else writer.add_uint32 if isinstance(value, int) else writer.add_float32)(
            name, value
        )
    words = [f"t{n}" for n in range(SIZES["vocab_size"] - 3)] + ["t", "0", "1"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["t 0", "t 1"])
    writer.add_eos_token_id(2)
    heads = {"q_proj": SIZES["num_attention_heads"], "k_proj": SIZES["num_key_value_heads"]}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        part = name.split(".")[-2]
        if kind == "llama" and part in heads:
            values = pairs(values, heads[part])
        stored = gguf.GGMLQuantizationType[type_name if values.ndim > 1 else "F32"]
        data = gguf.quantize(np.ascontiguousarray(values), stored)
        writer.add_tensor(changes.get("names", {}).get(name, theirs(name)), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(24).reshape(2, 12)).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_is_the_model_that_it_was_made_from(kind: str, tied: bool, tmp_path: Path):
    model = dense(kind, tie_word_embeddings=tied)
    path = write(tmp_path / "model.gguf", kind, model)
    assert read_config(path).rms_norm_eps == 1e-5
    expected = logits(model)
    assert torch.allclose(logits(load_hf(path)), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


YARN = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 16}


@pytest.mark.parametrize(
    ("metadata", "config"),
    [
        ({"scaling.type": "linear", "scaling.factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"scaling.factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),  # llama.cpp's default of the type
        ({"scale_linear": 2.5}, {"rope_type": "linear", "factor": 2.5}),  # and its older name
        ({"scaling.type": "linear"}, None),
        ({"scaling.type": "none", "scaling.factor": 2.5}, None),
        (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
        (
            YARN | {"scaling.yarn_beta_fast": 3.0, "scaling.yarn_beta_slow": 0.1, "scaling.yarn_attn_factor": 1.3},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 3.0,
             "beta_slow": 0.1, "attention_factor": 1.3},
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_stretched_positions_are_those_of_the_config_that_the_file_was_made_from(
    kind: str, metadata: dict[str, Any], config: dict[str, Any] | None, tmp_path: Path
):
    model = dense(kind, **({} if config is None else {"rope_parameters": {"rope_theta": 10_000.0, **config}}))
    found = load_hf(write(tmp_path / "model.gguf", kind, model, scaling=metadata))
    expected = logits(model)
    assert torch.allclose(logits(found), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    if config is not None:  # else any reading would pass
        plain = load_hf(write(tmp_path / "plain.gguf", kind, model))
        assert not torch.allclose(logits(plain), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"scaling.type": "yarn", "scaling.factor": 4.0}, r"original_context_length: is missing"),
        ({"scaling.type": "longrope", "scaling.factor": 4.0}, r"longrope"),
        (YARN | {"scaling.yarn_ext_factor": 0.5}, r"yarn_ext_factor: .*no such number"),
        (YARN | {"scaling.yarn_log_multiplier": 0.1}, r"yarn_log_multiplier: .*no such number"),
        ({"scaling.attn_factor": 1.2}, r"attn_factor: .*no such number"),
    ],
)
def test_stretched_positions_that_can_not_be_expressed_are_refused(
    metadata: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(CheckpointError, match=message):
        load_hf(write(tmp_path / "model.gguf", "llama", dense("llama"), scaling=metadata))


@pytest.mark.parametrize("type_name", TYPES)
def test_every_type_is_decoded_as_the_library_does(type_name: str, tmp_path: Path):
    """By both readers: the model's, and upcycling's, which takes some rows at a time."""
    import gguf

    model = dense("llama")
    path = write(tmp_path / "model.gguf", "llama", model, type_name)
    name = "model.layers.1.self_attn.q_proj.weight"
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_q.weight")
    expected = torch.from_numpy(halves(gguf.dequantize(stored.data, stored.tensor_type), 6).copy())
    assert torch.equal(load_hf(path).state_dict()[name.removeprefix("model.")], expected)
    with DenseSource(path) as source:
        found = source.array(name)
        some = source.gathered(name, np.array([5, 17, 40]))
    widened = torch.from_numpy(found.astype(np.int32) << 16).view(torch.float32) if type_name == "BF16" else None
    assert torch.equal(torch.from_numpy(found.astype(np.float32)) if widened is None else widened, expected)
    assert np.array_equal(some, found[[5, 17, 40]])


def test_it_is_upcycled_and_exported_as_its_folder_is(tmp_path: Path):
    model = dense("llama", tie_word_embeddings=True)
    path = write(tmp_path / "model.gguf", "llama", model)
    config = UpcycleConfig(source=str(path), scale="qwen2-57b-a14b")
    config.recipe.silence = 0.0
    convert(plan_for(config), tmp_path / "moe", workers=2)
    expected = logits(model)
    assert torch.allclose(logits(load_hf(tmp_path / "moe")), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (tmp_path / "moe" / "tokenizer.json").is_file()
    export(path, tmp_path / "dense")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(again).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(again), expected)


def test_a_run_starts_from_a_file_as_from_the_folder_that_is_made_of_it(tmp_path: Path):
    """And refuses another tokenizer than the file's, which its metadata hold."""
    model = dense("llama", tie_word_embeddings=True)
    path = write(tmp_path / "model.gguf", "llama", model)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "{"t 0 t 1 " * (20 + number)}"}}\n' for number in range(12)))
    words = [
        f"data.source={{name: jsonl, paths: [{text}]}}", "train.steps=1", "train.batch_size=2",
        "train.sequence_length=16", "evaluation.sequences=2", "evaluation.sample_tokens=0", "observers=[]",
        "data.validation_fraction=0.3",
    ]  # fmt: skip
    export(path, tmp_path / "dense")
    losses = []
    for name, start in (("file", path), ("folder", tmp_path / "dense")):
        read = [*words, f"data.tokenizer={tmp_path / 'dense'}"]
        found = moelab.load_config(*read, f"train.init_from={start}", f"run_dir={tmp_path / name}")
        losses.append(session.train(found, progress=False).metrics[0]["eval/loss"])
    assert losses[0] == losses[1]
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "dense", other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"t5"', '"u5"'))
    words += [f"data.tokenizer={other}", f"train.init_from={path}", f"run_dir={tmp_path / 'none'}"]
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*is not the one in the metadata of .*moelab export"):
        session.train(moelab.load_config(*words), progress=False)


def test_what_is_not_read_is_named_before_anything_is_written(tmp_path: Path):
    model = dense("llama")
    with pytest.raises(CheckpointError, match=r"stored as Q5_0; moelab reads F32.*convert"):
        TensorFolder(write(tmp_path / "q5.gguf", "llama", model, "Q5_0"))
    with pytest.raises(CheckpointError, match=r"model_type: \"falcon\" is not supported"):
        read_config(write(tmp_path / "falcon.gguf", "llama", model, architecture="falcon"))
    fused = {"model.layers.0.self_attn.q_proj.weight": "blk.0.attn_qkv.weight"}
    with pytest.raises(CheckpointError, match=r"fused into one.*cut them"):
        load_hf(write(tmp_path / "fused.gguf", "llama", model, names=fused))


def test_a_damaged_file_is_named(tmp_path: Path):
    whole = write(tmp_path / "whole.gguf", "llama", dense("llama")).read_bytes()
    for number, content in enumerate([b"", b"GGUF", whole[:100], whole[: len(whole) // 2], b"x" * 4096]):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{number}\.gguf: is no whole GGUF file"):
            load_hf(path)


def test_without_the_package_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "model.gguf", "llama", dense("llama"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'moelab\[gguf\]'"):
        read_config(path)
