"""Small folders of every kind that moelab reads, made by moelab itself: what the fuzzer then damages."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_gguf import write_gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moelab.builder import build_model
from moelab.config.model import ModelConfig
from moelab.hf.save import save_hf
from moelab_tools.cli import run

CONFIG = """\
name: small
run_dir: out
plugins: []
entry_points: false
model:
  vocab_size: 257
  hidden_size: 16
  intermediate_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  num_key_value_heads: 1
  max_position_embeddings: 64
  tie_word_embeddings: true
  moe:
    layout: {name: uniform, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 8}
    router: {name: softmax_topk, norm_topk_prob: false}
    shared_expert: {name: gated, intermediate_size: 16}
    backend: {name: loop}
    balance_losses: [{name: load_balance, weight: 0.01}]
    layers: {"0": {router: {name: softmax_topk}}}
data:
  source: {name: text, paths: [text], deduplicate: false}
train: {steps: 3, batch_size: 2, sequence_length: 16, log_every: 1, save_every: 2, threads: 1, device: cpu}
optimizer: {lr: 3.0e-3}
schedule: {name: cosine, warmup_steps: 1}
evaluation: {sequences: 4, sample_tokens: 0}
observers: []
"""
RECIPE = """\
source: dense
output: up
model:
  moe:
    layout: {name: uniform, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 8}
    router: {name: softmax_topk, norm_topk_prob: false}
    shared_expert: {name: gated, intermediate_size: 32}
recipe: {experts: {name: qwen2}, shared: {name: copy}, router: {name: normal}}
seed: 3
workers: 1
max_shard_size: 20KB
"""
PRINCIPLES = """\
principles:
  - {name: kind, follow: Be kind., avoid: Be rude.}
  - {follow: Be short., critique: What was long?, revision: Say it in fewer words.}
method: revise
revisions: 1
"""
WORDS = [f"word{number} and {number * 7 % 13} others" for number in range(400)]


def make_world(folder: Path) -> None:
    """Fill `folder` with configs, corpora, a tokenizer, two runs, an export, a dense model and what became of it."""
    (folder / "mine.yaml").write_text(CONFIG)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "text").mkdir()
    for number in range(12):
        (folder / "text" / f"{number}.txt").write_text("\n".join(WORDS[number * 30 : number * 30 + 40]))
    lines = [json.dumps({"text": " ".join(WORDS[at : at + 20]), "domain": "d"}) for at in range(0, 380, 20)]
    (folder / "docs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "docs.jsonl.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))
    (folder / "chats.jsonl").write_text("".join(json.dumps(_chat(number)) + "\n" for number in range(20)))
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "said.jsonl").write_text("".join(json.dumps(_said(number)) + "\n" for number in range(20)))
    (folder / "asked.jsonl").write_text("".join(json.dumps(_asked(number)) + "\n" for number in range(12)))
    (folder / "principles.yaml").write_text(PRINCIPLES)
    ids = np.array([[*b"some text of a document", 256] for _ in range(100)]).reshape(-1)
    ids[::7] = np.arange(len(ids[::7])) % 250
    ids[23::24] = 256
    np.save(folder / "ids.npy", ids.astype(np.int32))
    ids.astype("<u2").tofile(folder / "ids.bin")
    _write_indexed(folder, ids.astype("<u2"))
    _tokenizer(folder / "tok")
    write_gguf(folder / "dense.gguf")
    for name, seed in (("run", 0), ("run2", 1)):
        _do("train", str(folder / "mine.yaml"), f"run_dir={folder / name}", f"seed={seed}")
    _do("evaluate", str(folder / "run"), "--length", "1x,2x", "--tokens", "64")
    _do("trace", str(folder / "run"), "--out", str(folder / "trace"), "--tokens", "100")
    _do("export", str(folder / "run"), str(folder / "hf"))
    dense = ModelConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    files = {path.name: path.read_bytes() for path in sorted((folder / "tok").iterdir())}
    save_hf(build_model(dense), folder / "dense", max_shard_size="12KB", extra_files=files)
    _do("upcycle", str(folder / "recipe.yaml"), f"source={folder / 'dense'}", f"output={folder / 'up'}", "--no-receipt")


FUNCTIONS = '''def twice(x):
    """Two times x.

    >>> twice(2)
    4
    """
    return 2 * x
'''


def _asked(number: int) -> dict[str, Any]:
    text = f"What is {number} and {number}?"
    turns = [{"role": "system", "content": "Count."}, {"role": "user", "content": text}]
    return [{"prompt": text, "answer": 2 * number}, {"messages": turns}, {"prompt": turns[1:], "n": number}][number % 3]


def _said(number: int) -> dict[str, object]:
    """An answer as `moelab generate --out` writes it."""
    prompt = f"{number // 2}+1="
    return {
        "answer": number // 2 + 1, "checkpoint": "run", "prompt": prompt, "text": f"{prompt}{number}",
        "ended": "ended at <|endoftext|> (256), as the tokenizer says", "sample": number % 2, "tokens": 2,
    }  # fmt: skip


def _chat(number: int) -> dict[str, Any]:
    """A line that every stage of `moelab align` can learn from."""
    ask = [{"role": "user", "content": WORDS[number]}]
    said = [[{"role": "assistant", "content": WORDS[number + shift]}] for shift in (1, 2)]
    plain = {"messages": [*ask, *said[0]], "chosen": said[0], "rejected": said[1]}
    return (
        {"prompt": ask} | plain
        if number % 2
        else {"messages": plain["messages"], "prompt": "a", "chosen": "b", "rejected": "c"}
    )


def _tokenizer(folder: Path) -> None:
    """A byte-level BPE of 300 tokens."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "model_max_length": 64}))


def _do(*arguments: str) -> None:
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = run(list(arguments))
    assert code == 0, told.getvalue()


def _write_indexed(folder: Path, ids: np.ndarray) -> None:
    """The same tokens as Megatron-LM and as datatrove keep them."""
    ends = np.flatnonzero(ids == 256) + 1
    lengths = np.diff([0, *ends.tolist()]).astype("<i4")
    ids = ids[: ends[-1]]
    for name in ("meg.bin", "tok.ds"):
        ids.tofile(folder / name)
    ends.astype("<u8").tofile(folder / "tok.ds.index")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
    pointers = (2 * np.array([0, *ends[:-1].tolist()])).astype("<i8")
    first = np.arange(len(lengths) + 1).astype("<i8")
    (folder / "meg.idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + first.tobytes())
