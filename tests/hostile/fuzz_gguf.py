"""A small Llama as a GGUF file, byte by byte: no package is asked, so every environment has one to damage.

The format: ggml-org/ggml, docs/gguf.md (version 3, little-endian).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

HIDDEN, FFN, HEADS, VOCABULARY, LAYERS, ALIGNMENT = 32, 64, 4, 20, 2, 32
F32, Q4_0 = 0, 2
UINT32, FLOAT32, STRING, ARRAY, INT32 = 4, 6, 8, 9, 5


def write_gguf(path: Path) -> None:
    """Tied, its down projections as Q4_0, with a tokenizer of letters."""
    letters = [chr(ord("a") + number) for number in range(VOCABULARY - 2)] + ["ab", "<|endoftext|>"]
    metadata = {
        "general.architecture": _text("llama"), "llama.context_length": _number(64),
        "llama.embedding_length": _number(HIDDEN), "llama.block_count": _number(LAYERS),
        "llama.feed_forward_length": _number(FFN), "llama.attention.head_count": _number(HEADS),
        "llama.attention.head_count_kv": _number(HEADS // 2), "llama.rope.freq_base": _real(1e4),
        "llama.attention.layer_norm_rms_epsilon": _real(1e-5), "tokenizer.ggml.model": _text("gpt2"),
        "tokenizer.ggml.pre": _text("gpt-2"), "tokenizer.ggml.tokens": _list(STRING, [_string(x) for x in letters]),
        "tokenizer.ggml.token_type": _list(INT32, [struct.pack("<i", 1) for _ in letters]),
        "tokenizer.ggml.merges": _list(STRING, [_string("a b")]),
        "tokenizer.ggml.eos_token_id": _number(VOCABULARY - 1),
    }  # fmt: skip
    entries, data = b"", b""
    tensors = _tensors()
    for name, (shape, kind, content) in tensors.items():
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        entries += _string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, len(data))
        data += _padded(content)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_string(key) + value for key, value in metadata.items()) + entries
    path.write_bytes(_padded(head) + data)


def _tensors() -> dict[str, tuple[tuple[int, ...], int, bytes]]:
    """{name: (shape, type, bytes)}."""
    chance = np.random.default_rng(0)
    shapes = {
        "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN),
        "attn_v": (HIDDEN // 2, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN),
    }  # fmt: skip
    named: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    named |= {f"blk.{layer}.{part}.weight": shape for layer in range(LAYERS) for part, shape in shapes.items()}
    found: dict[str, tuple[tuple[int, ...], int, bytes]] = {}
    for name, shape in named.items():
        if "ffn_down" in name:  # blocks of 32: a scale in half precision and 16 bytes of two numbers each
            block = np.float16(0.01).tobytes() + bytes(range(16))
            found[name] = (shape, Q4_0, block * (shape[0] * shape[1] // 32))
        else:
            found[name] = (shape, F32, chance.normal(0, 0.1, shape).astype("<f4").tobytes())
    return found


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _text(text: str) -> bytes:
    return struct.pack("<I", STRING) + _string(text)


def _number(value: int) -> bytes:
    return struct.pack("<II", UINT32, value)


def _real(value: float) -> bytes:
    return struct.pack("<If", FLOAT32, value)


def _list(kind: int, values: list[bytes]) -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, len(values)) + b"".join(values)


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % ALIGNMENT)
