"""Runs llama.cpp on a checkpoint folder, in a process of its own: its assertions abort.

    python llama_cpp_program.py convert BUILD CHECKPOINT GGUF [PRE_TOKENIZER]
    python llama_cpp_program.py logits BUILD GGUF TOKENS.npy LOGITS.npy

BUILD is what setup_llama_cpp.sh made. A toy tokenizer's hash is unknown to the converter, so PRE_TOKENIZER names it.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import numpy as np


def convert(build: Path, checkpoint: str, gguf: str, pre_tokenizer: str | None = None) -> None:
    """By llama.cpp's own converter, in float32."""
    vendor = build / "source/vendor/llama.cpp"
    sys.path[:0] = [str(vendor), str(vendor / "gguf-py"), str(build / "packages")]
    from conversion.base import TextModel

    if pre_tokenizer is not None:
        TextModel.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
    program = vendor / "convert_hf_to_gguf.py"
    sys.argv = [str(program), checkpoint, "--outfile", gguf, "--outtype", "f32"]
    runpy.run_path(str(program), run_name="__main__")


def logits(build: Path, gguf: str, tokens_file: str, logits_file: str) -> None:
    """tokens [S] -> logits [S, V], with a float32 KV cache: the default f16 costs three digits."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(build / "build/bin")
    sys.path[:0] = [str(build / "source"), str(build / "packages")]
    from llama_cpp import llama_cpp as library

    tokens = np.load(tokens_file)
    library.llama_backend_init()
    model = library.llama_model_load_from_file(gguf.encode(), library.llama_model_default_params())
    assert model, f"{gguf} does not load"
    settings = library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(64, len(tokens))
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
    settings.flash_attn_type = 0  # off
    context = library.llama_init_from_model(model, settings)
    batch = library.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position] = int(token)
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = 1
    status = library.llama_decode(context, batch)
    assert status == 0, f"llama_decode returned {status}"
    width = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    rows = np.ctypeslib.as_array(library.llama_get_logits(context), shape=(len(tokens), width))
    np.save(logits_file, rows.copy())


if __name__ == "__main__":
    {"convert": convert, "logits": logits}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
