"""An export keeps what the model was: ids, generation settings, chat template, licence, and its tokenizer's ids."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.tokenizer import load_tokenizer
from moelab.errors import ConfigError
from moelab.hf.save import save_hf
from moelab.hf.tokenizer_config import QWEN2_WORDS, as_it_is, is_qwen2_pipeline, llama_cpp_remark
from moelab_tools.cli import run
from moelab_tools.exporting import export
from moelab_tools.tokenizer_check import PROBES, check_auto_tokenizer

TEXT = ["def f(x): return x + 1", "It's the 2nd of 1234 tokens, isn't it?", "漢字 é ñ  naïve\n\n\tfoo"] * 40
PIPELINES = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "words": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    ),
}
BUILT_IN = {"gpt2": "'gpt-2'", "digits": "'smollm'", "qwen2": "'qwen2'", "words": "the built-in one"}


def write_tokenizer(folder: Path, kind: str, end: str = "<|endoftext|>", **config: Any) -> Path:
    """A byte-level BPE of 400 tokens with some pre-tokenizer; "bytes" is moelab's own."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "bytes":
        for name, content in ByteTokenizer().files().items():
            (folder / name).write_bytes(content)
        return folder
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = PIPELINES[kind]()
    made.decoder = decoders.ByteLevel()
    made.normalizer = normalizers.NFC() if kind == "qwen2" else None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = [end, "<|im_end|>", "<|pad|>", "<s>"]
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=tokens, initial_alphabet=alphabet)
    )
    made.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def model_config(sparse: bool, vocab_size: int = 400) -> ModelConfig:
    moe = MoEConfig(
        layout={"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        shared_expert={"name": "gated", "intermediate_size": 16},
    )
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, moe=moe if sparse else None,
    )  # fmt: skip


def write_checkpoint(folder: Path, kind: str, *, sparse: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    write_tokenizer(folder.with_name(f"{folder.name}_tokenizer"), kind)
    files = {path.name: path.read_bytes() for path in folder.with_name(f"{folder.name}_tokenizer").iterdir()}
    save_hf(moelab.build(model_config(sparse), seed=1), folder, dtype=dtype, extra_files=files)
    return folder


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", [*PIPELINES, "bytes"])
def test_auto_tokenizer_gives_the_ids_trained_on(tmp_path: Path, kind: str, sparse: bool):
    transformers = pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path / "a", kind, sparse=sparse)
    lines = export(folder, tmp_path / "out")
    ours = load_tokenizer(str(tmp_path / "a_tokenizer"))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*PROBES, *TEXT[:3]]:
        assert auto(text, add_special_tokens=False).input_ids == ours.encode(text).tolist(), text
    assert len(auto) == ours.vocab_size
    assert any("AutoTokenizer gives the ids trained on" in line for line in lines)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_tokenizer_without_endoftext_gets_no_token_without_a_row(tmp_path: Path, sparse: bool):
    """Qwen2Tokenizer adds <|endoftext|> to any vocabulary, behind its last id."""
    transformers = pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path / "a", "gpt2", sparse=sparse)
    write_tokenizer(folder, "gpt2", end="</s>")
    lines = export(folder, tmp_path / "out")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(auto), auto.eos_token, auto.pad_token) == (load_tokenizer(str(folder)).vocab_size, "</s>", None)
    assert any("gives the ids trained on" in line for line in lines)


def test_other_ids_are_told_with_a_text_and_the_cure(tmp_path: Path):
    """A dense folder as it was written before: transformers puts Qwen2's own pre-tokenizer around the vocabulary."""
    pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path / "a", "gpt2")
    ours = load_tokenizer(str(folder))
    verdict = check_auto_tokenizer(folder, ours, ours.vocab_size)
    assert verdict is not None
    if int(verdict.version.split(".")[0]) >= 5:
        assert not verdict.right
        assert "PreTrainedTokenizerFast.from_pretrained" in verdict.line(folder)
    rows = ours.vocab_size - 1
    cut = check_auto_tokenizer(folder, ours, rows)
    assert cut is not None and f"an id {rows} for {rows} rows" in cut.line(folder)
    (folder / "tokenizer.json").write_text("{}")
    broken = check_auto_tokenizer(folder, ByteTokenizer(), 400)
    assert broken is not None and "can't read" in broken.line(folder)


def test_without_transformers_it_is_said_that_nothing_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_checkpoint(tmp_path / "a", "digits")
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert any("was not checked" in line for line in export(folder, tmp_path / "out"))


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_name_under_which_llama_cpp_splits_alike_is_said(tmp_path: Path, kind: str):
    definition = json.loads((write_tokenizer(tmp_path, kind) / "tokenizer.json").read_text())
    assert is_qwen2_pipeline(definition) == (kind == "qwen2")
    assert BUILT_IN[kind] in llama_cpp_remark(definition)
    assert "without merges" in llama_cpp_remark(json.loads(ByteTokenizer().files()["tokenizer.json"]))


def test_qwen2s_own_tokenizer_config_stays_as_it_is(tmp_path: Path):
    folder = write_tokenizer(tmp_path, "qwen2", tokenizer_class="Qwen2Tokenizer")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    kept = json.loads(as_it_is(files, dense=True)["tokenizer_config.json"])
    assert kept == json.loads(files["tokenizer_config.json"])
    files["tokenizer_config.json"] = b'{"auto_map": {"AutoTokenizer": ["x.Y", null]}, "eos_token": "<|endoftext|>"}'
    assert "auto_map" not in json.loads(as_it_is(files, dense=True)["tokenizer_config.json"])


def test_what_the_model_was_is_kept_through_training(tmp_path: Path):
    """Ids, lists among them, sampling, chat template, licence: from the folder through two runs into the export."""
    folder = write_checkpoint(tmp_path / "chat", "gpt2")
    write_tokenizer(folder, "gpt2", bos_token="<s>", pad_token="<|pad|>", eos_token="<|im_end|>")
    generation = {"eos_token_id": [1, 0], "pad_token_id": 2, "bos_token_id": 3, "temperature": 0.7, "do_sample": True}
    texts = {
        "generation_config.json": json.dumps(generation), "chat_template.jinja": "{{ messages }}", "LICENSE": "terms",
        "README.md": "card", "special_tokens_map.json": '{"eos_token": "<|im_end|>"}', "NOTICE": "who",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    ids = {"eos_token_id": 1, "pad_token_id": 2, "bos_token_id": 3}
    (folder / "config.json").write_text(json.dumps(config | ids))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{text} {n}" * 9}) + "\n" for n, text in enumerate(TEXT))
    )
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "data": {"source": {"name": "jsonl", "paths": [str(tmp_path / "a.jsonl")], "deduplicate": False}},
                "train": {"steps": 1, "batch_size": 2, "sequence_length": 16}, "observers": [],
                "evaluation": {"sequences": 2, "sample_tokens": 0},
            }
        )
    )  # fmt: skip
    start = folder
    for name in ("one", "two"):
        arguments = [str(tmp_path / "run.yaml"), f"run_dir={tmp_path / name}", f"train.init_from={start}"]
        assert run(["train", *arguments]) == 0
        start = tmp_path / name
    out = tmp_path / "out"
    lines = export(start, out)
    written = json.loads((out / "config.json").read_text())
    assert {key: written[key] for key in ids} == ids
    for name, text in texts.items():
        assert (out / {"README.md": "README.source.md"}.get(name, name)).read_text() == text
    assert lines[1].startswith("dtype: float32, as the run stores its parameters")
    assert "ends at 1, 0 (generation_config.json)" in lines[2]
    transformers = pytest.importorskip("transformers")
    read = transformers.GenerationConfig.from_pretrained(out)
    assert (read.eos_token_id, read.pad_token_id, read.bos_token_id, read.temperature) == ([1, 0], 2, 3, 0.7)
    auto = transformers.AutoTokenizer.from_pretrained(out)
    assert (auto.eos_token, auto.pad_token, auto.bos_token, auto.chat_template) == (
        "<|im_end|>", "<|pad|>", "<s>", "{{ messages }}",
    )  # fmt: skip


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_the_dtype_is_the_checkpoints_unless_another_is_asked_for(tmp_path: Path, stored: torch.dtype):
    from safetensors.torch import load_file

    folder = write_checkpoint(tmp_path / "a", "bytes", dtype=stored)
    assert f"as {folder} stores its matrices" in export(folder, tmp_path / "out")[1]
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {stored}
    assert export(folder, tmp_path / "half", dtype="float16")[1].startswith("dtype: float16, as asked; ")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}


def test_weights_may_be_read_by_whoever_may_read_the_rest(tmp_path: Path):
    export(write_checkpoint(tmp_path / "a", "bytes"), tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_a_folder_without_a_tokenizer_is_exported_and_that_is_said(tmp_path: Path):
    save_hf(moelab.build(model_config(False), seed=1), tmp_path / "bare")
    assert any("holds none" in line for line in export(tmp_path / "bare", tmp_path / "out"))


def test_a_tokenizer_beyond_the_models_rows_is_refused_before_anything_is_written(tmp_path: Path):
    files = {path.name: path.read_bytes() for path in write_tokenizer(tmp_path / "t", "gpt2").iterdir()}
    rows = load_tokenizer(str(tmp_path / "t")).vocab_size - 1
    save_hf(moelab.build(model_config(False, vocab_size=rows), seed=1), tmp_path / "a", extra_files=files)
    with pytest.raises(ConfigError, match=rf"model\.vocab_size: {rows} is less than the {rows + 1} tokens"):
        export(tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run(["generate", str(tmp_path / "a")]) == 2


def test_what_llama_cpp_computes_otherwise_is_said(tmp_path: Path):
    config = model_config(True)
    assert config.moe is not None
    config.moe.router = {"name": "softmax_topk", "norm_topk_prob": True}
    config.tie_word_embeddings = True
    save_hf(moelab.build(config, seed=1), tmp_path / "a", extra_files=ByteTokenizer().files())
    assert "tied embeddings; leaves norm_topk_prob out" in export(tmp_path / "a", tmp_path / "out")[-1]


def test_generate_ends_at_any_end_token_and_says_at_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Whatever greedy decoding says fifth is made an end token: the text ends before it."""
    folder = write_checkpoint(tmp_path / "a", "bytes")
    from moelab.nn.generate import generate
    from moelab.nn.sampling import Sampling

    prompt = load_tokenizer("bytes").encode("def ").tolist()
    said = list(generate(moelab.load(folder), prompt, Sampling(12, temperature=0.0)))
    end = said[4]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [399, end]}))
    arguments = ["generate", str(folder), "--temperature", "0", "--tokens", "12"]
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert out == "def " + load_tokenizer("bytes").decode(said[: said.index(end)]) + "\n"
    assert f"({end}), as generation_config.json says" in err
    (folder / "generation_config.json").unlink()
    assert run([*arguments[:-1], "2"]) == 0
    assert "2 tokens without" in capsys.readouterr().err
