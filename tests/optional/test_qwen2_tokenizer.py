"""The real Qwen2 tokenizer, from the ranks in the dashscope wheel. Only with MOELAB_QWEN_TIKTOKEN=FILE: README.md."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moelab.data.tokenizer import load_tokenizer
from moelab_tools.qwen2_tokenizer import write_tokenizer
from parity.reference import DENSE, reference_model

RANKS = os.environ.get("MOELAB_QWEN_TIKTOKEN", "")
BUILD = os.environ.get("MOELAB_LLAMA_CPP", "")
pytestmark = pytest.mark.skipif(
    not RANKS, reason="needs MOELAB_QWEN_TIKTOKEN=FILE, dashscope/resources/qwen.tiktoken of the dashscope wheel"
)
PUBLISHED_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert hashlib.sha256(Path(RANKS).read_bytes()).hexdigest() == PUBLISHED_SHA256
    folder = tmp_path_factory.mktemp("qwen2") / "tokenizer"
    write_tokenizer(Path(RANKS), folder)
    return folder


def test_it_has_the_published_tokens_and_merges(folder: Path):
    """Qwen2 report, section 2.1: 151,643 regular tokens, of which 256 are bytes, and 3 control tokens."""
    definition = json.loads((folder / "tokenizer.json").read_text())
    assert len(definition["model"]["vocab"]) == 151_643
    assert len(definition["model"]["merges"]) == 151_643 - 256 == 151_387
    assert [(token["id"], token["content"]) for token in definition["added_tokens"]] == [
        (151_643, "<|endoftext|>"),
        (151_644, "<|im_start|>"),
        (151_645, "<|im_end|>"),
    ]


def test_moelab_and_transformers_encode_as_qwen2_does(folder: Path):
    transformers = pytest.importorskip("transformers")
    ours, theirs = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.vocab_size, ours.eos_token_id) == (151_646, 151_643)
    assert ours.encode("Hello, world!").tolist() == theirs("Hello, world!").input_ids == [9707, 11, 1879, 0]
    for text in ("I'Ve 12345 caf\u00e9 cafe\u0301 \t\n\n  中文，🚀\u200d  x", " leading", "trailing  \n", "مرحبا 3.14"):
        ids = ours.encode(text).tolist()
        assert ids == theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.slow
@pytest.mark.skipif(not BUILD, reason="needs a build of llama.cpp: tests/optional/setup_llama_cpp.sh")
def test_llama_cpps_converter_knows_it_as_qwen2(folder: Path, tmp_path: Path):
    """By its own fingerprint of the official tokenizer, nothing forced: an unknown one is an error there."""
    model = tmp_path / "model"
    reference_model(DENSE | {"vocab_size": 151_646, "hidden_size": 32}).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((folder / name).read_bytes())
    program = Path(__file__).with_name("llama_cpp_program.py")
    done = subprocess.run(
        [sys.executable, str(program), "convert", BUILD, str(model), str(tmp_path / "model.gguf")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    sys.path.insert(0, str(Path(BUILD) / "source/vendor/llama.cpp/gguf-py"))
    try:
        from gguf import GGUFReader
    finally:
        sys.path.pop(0)
    field = GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"]
    assert bytes(field.parts[field.data[0]]).decode() == "qwen2"
