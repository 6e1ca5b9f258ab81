"""A GGUF file read as a checkpoint of Hugging Face's layout: its metadata as config.json, its tensors by their names.

The `gguf` package of llama.cpp (extra `gguf`) reads headers; what its names mean and a block holds is known here.
Names of metadata and tensors after llama.cpp's gguf-py (constants.py: Keys, TENSOR_NAMES) and convert_hf_to_gguf.py.
Free of torch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from moelab.errors import CheckpointError
from moelab.safe_files import Reading, check_regular

READING = Reading(CheckpointError)
SUFFIX = ".gguf"
# {GGUF's type: how its decoded values are stored, as safetensors calls it}. Blocks of 32 become float32, exactly.
TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "F32", "Q4_0": "F32", "Q4_1": "F32"}
PLAIN = ("F32", "F16", "BF16")
BLOCK = 32  # numbers
_BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
_AT_A_TIME = 4096  # blocks, whose numbers stay in the cache
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}  # fmt: skip
_IN_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_qkv": "self_attn.qkv_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"
# Of Llama 3.1 to 3.3, whose config.json's differ in `factor` alone: GGUF keeps what follows from them, not the numbers.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA3_FACTORS = (8.0, 32.0)
# {config.json's name: GGUF's below rope.scaling} of yarn's numbers but the factor.
_YARN = {
    "original_max_position_embeddings": "original_context_length", "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor",
}  # fmt: skip
# {name below rope.scaling: where it does nothing}: Phi-3's longrope, Hunyuan's alpha, DeepSeek-V2's mscale_all_dim.
_ROPE_PLAIN = {"attn_factor": 1.0, "alpha": 0.0, "yarn_log_multiplier": 0.0, "yarn_ext_factor": 1.0}


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that `path` means: itself, or the only one in a folder without config.json; else None."""
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX)
    if len(found) > 1:
        raise CheckpointError(f"{path}: holds {len(found)} GGUF files; name one of them: {found[0]}")
    return found[0] if found else None


def library() -> Any:
    """The `gguf` package. CheckpointError saying how to get it."""
    try:
        import gguf  # noqa: PLC0415  (an extra)
    except ModuleNotFoundError as error:
        raise CheckpointError(
            "GGUF files are read with the package `gguf`, which is not installed: pip install 'moelab[gguf]'"
        ) from error
    return gguf


class GGUFFile:
    """Metadata and the table of tensors; no weight is read. `GGUFFile.of(path)` keeps the last few."""

    def __init__(self, path: Path) -> None:
        """CheckpointError for what is no whole GGUF file."""
        check_regular(path, READING)
        self.path = path
        try:
            self._reader = library().GGUFReader(path)
            self.entries = list(self._reader.tensors)
            self.architecture = str(self._value("general.architecture"))
        except CheckpointError:
            raise
        except Exception as error:  # the library's own: anything that a damaged header leads to
            READING.refuse(path, f"is no whole GGUF file ({type(error).__name__}: {error})", error)

    @staticmethod
    def of(path: Path) -> GGUFFile:
        """The file, parsed once as long as it stays as it is: a vocabulary takes seconds."""
        check_regular(path, READING)
        status = os.stat(path)
        return _parsed(path, status.st_size, status.st_mtime_ns)

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value, `default` where there is none."""
        try:
            found = self._value(key)
        except Exception as error:  # bytes that are no text
            READING.refuse(self.path, f"{key}: can't be read ({type(error).__name__}: {error})", error)
        return default if found is None else found

    def _value(self, key: str) -> Any:
        found = self._reader.get_field(key)
        return None if found is None else found.contents()

    def of_model(self, key: str, default: Any = None) -> Any:
        """`llama.context_length` and the like."""
        return self.value(f"{self.architecture}.{key}", default)

    @cached_property
    def names(self) -> dict[str, str]:
        """{GGUF's name: Hugging Face's} of every tensor but the rotary factors; a name that is unknown stays."""
        stored = {entry.name for entry in self.entries}
        found = {}
        for name in stored - {ROPE_FACTORS}:
            layer = _LAYER.fullmatch(name)
            found[name] = _WHOLE.get(name, name)
            if layer is not None and layer[2] in _IN_LAYER:
                part = _IN_LAYER[layer[2]]
                if layer[2] == "ffn_up" and f"blk.{layer[1]}.ffn_gate.weight" not in stored:  # Phi-3's
                    part = "mlp.gate_up_proj"
                found[name] = f"model.layers.{layer[1]}.{part}.{layer[3]}"
        return found

    def types(self) -> dict[str, int]:
        """{type: how many tensors}, most frequent first. CheckpointError for one that is not read."""
        counts: dict[str, int] = {}
        for entry in self.entries:
            name = entry.tensor_type.name
            if name not in TYPES:
                raise CheckpointError(
                    f"{self.path}: {entry.name}: is stored as {name}; moelab reads {', '.join(TYPES)}: convert the "
                    "original weights to one of them (llama.cpp: convert_hf_to_gguf.py --outtype bf16 or q8_0), or "
                    "take the safetensors that it was made from"
                )
            counts[name] = counts.get(name, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def fields(self) -> dict[str, Any]:
        """What config.json would say. CheckpointError where the metadata says what none can."""
        shapes = {entry.name: [int(size) for size in reversed(entry.shape)] for entry in self.entries}
        if self.of_model("expert_count", 0):
            raise CheckpointError(f"{self.path}: holds a model with experts; moelab reads dense ones from GGUF")
        if "token_embd.weight" not in shapes:
            READING.refuse(self.path, "holds no token_embd.weight, so it is no whole model")
        hidden, heads = self.of_model("embedding_length"), self.of_model("attention.head_count")
        found = {
            "model_type": self.architecture,
            "vocab_size": shapes["token_embd.weight"][0],
            "hidden_size": hidden,
            "intermediate_size": self.of_model("feed_forward_length"),
            "num_hidden_layers": self.of_model("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.of_model("attention.head_count_kv", heads),
            "max_position_embeddings": self.of_model("context_length"),
            "rms_norm_eps": _shortest(self.of_model("attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(self.of_model("rope.freq_base", 10_000.0)),
            "sliding_window": self.of_model("attention.sliding_window"),
            "tie_word_embeddings": "output.weight" not in shapes,
            "head_dim": self._head_dim(hidden, heads),
            "rope_scaling": self._rope_scaling(),
        }
        ids = {f"{token}_token_id": self.value(f"tokenizer.ggml.{name}_token_id") for token, name in _IDS.items()}
        return {key: value for key, value in (found | ids).items() if value is not None}

    def _head_dim(self, hidden: Any, heads: Any) -> int | None:
        whole = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
        size = self.of_model("attention.key_length", hidden // heads if whole else None)
        if self.of_model("attention.value_length", size) != size:
            raise CheckpointError(f"{self.path}: keys and values of different sizes, which moelab's attention hasn't")
        if self.of_model("rope.dimension_count", size) != size:
            raise CheckpointError(
                f"{self.path}: {self.architecture}.rope.dimension_count: "
                f"{self.of_model('rope.dimension_count')} of {size}: only rotary embedding of whole heads is supported"
            )
        return size if isinstance(size, int) else None  # said, since some kinds take another size where it is not

    def _rope_scaling(self) -> dict[str, Any] | None:
        """As llama.cpp reads it (llama-model.cpp: load_hparams): no type is linear, no factor plain.

        A departure: it takes yarn's beta_fast, beta_slow and attention factor for some architectures only, whatever the
        file says. Here they count as its converter writes them (conversion/base.py), from the model's config.json.
        """
        stored = self._llama3_factors()
        kind = str(self.of_model("rope.scaling.type", "linear"))
        factor = _shortest(self.of_model("rope.scaling.factor", self.of_model("rope.scale_linear")))  # the old name
        for key, plain in _ROPE_PLAIN.items():
            if self.of_model(f"rope.scaling.{key}", plain) != plain:
                self._refuse_scaling(key, "moelab's rotary embedding has no such number")
        if kind == "none" or (kind == "linear" and factor in (None, 0, 1)):
            return stored
        if stored is not None:
            self._refuse_scaling("type", f"'{kind}' beside {ROPE_FACTORS}: only one of them can be")
        found = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            found |= {ours: _shortest(self.of_model(f"rope.scaling.{key}")) for ours, key in _YARN.items()}
            if found["original_max_position_embeddings"] is None:
                self._refuse_scaling(_YARN["original_max_position_embeddings"], "is missing: yarn's trained length")
        return {key: value for key, value in found.items() if value is not None}

    def _refuse_scaling(self, key: str, why: str) -> NoReturn:
        name = f"{self.path}: {self.architecture}.rope.scaling.{key}"
        raise CheckpointError(f"{name}: {why}; take the safetensors that it was made from")

    def _llama3_factors(self) -> dict[str, Any] | None:
        """What config.json would say for the rotary factors that are stored as a tensor; None where there are none."""
        stored = [entry for entry in self.entries if entry.name == ROPE_FACTORS]
        if not stored:
            return None
        factors = np.asarray(stored[0].data, dtype=np.float64).reshape(-1)
        theta = float(self.of_model("rope.freq_base", 10_000.0))
        for factor in _LLAMA3_FACTORS:
            expected = _llama3_factors(theta, len(factors), factor)
            if np.allclose(factors, expected, rtol=1e-5, atol=0):
                return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
        raise CheckpointError(
            f"{self.path}: {ROPE_FACTORS}: its rotary factors are not those of Llama 3.1, 3.2 or 3.3, and GGUF doesn't "
            "say what they follow from; take the safetensors that it was made from"
        )


_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}


@lru_cache(maxsize=4)
def _parsed(path: Path, size: int, changed: int) -> GGUFFile:
    return GGUFFile(path)


def _llama3_factors(theta: float, count: int, factor: float) -> npt.NDArray[np.float64]:
    """What llama.cpp's converter stores (LlamaModel.generate_extra_tensors): inv_freq over the stretched one."""
    wavelength = 2 * math.pi * theta ** (np.arange(count) / count)
    turns = _LLAMA3["original_max_position_embeddings"] / wavelength
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - kept) / factor + kept), dtype=np.float64)


def _shortest(value: Any) -> Any:
    """A float32 as the decimal that was meant: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def decode(raw: npt.NDArray[np.uint8], kind: str) -> npt.NDArray[Any]:
    """Rows as stored [n, bytes of a row] -> [n, columns]: bfloat16 as its bits, blocks as float32."""
    if kind in PLAIN:
        return raw.view({"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[kind])
    blocks = raw.reshape(-1, _BLOCK_BYTES[kind])
    out = np.empty((len(blocks), BLOCK), np.float32)
    for begin in range(0, len(blocks), _AT_A_TIME):
        _decode_blocks(blocks[begin : begin + _AT_A_TIME], kind, out[begin : begin + _AT_A_TIME])
    return out.reshape(len(raw), -1)


def _decode_blocks(blocks: npt.NDArray[np.uint8], kind: str, out: npt.NDArray[np.float32]) -> None:
    """blocks [n, bytes] -> out [n, 32]: a scale in half precision, in Q4_1 a least value too, then the numbers.

    Of Q4 a byte holds two: the lower halves are the first 16 numbers. After ggml-quants.c, dequantize_row_q8_0, _q4_0
    and _q4_1; gguf's own decoding gives the same bits and takes four times as long, 16 rows at a time.
    """
    scales = 4 if kind == "Q4_1" else 2  # bytes
    wide = np.ascontiguousarray(blocks[:, :scales]).view("<f2").astype(np.float32)
    numbers = blocks[:, scales:]
    if kind == "Q8_0":
        out[...] = numbers.view(np.int8)
    else:
        np.bitwise_and(numbers, 15, out=out[:, : BLOCK // 2], casting="unsafe")
        np.right_shift(numbers, 4, out=out[:, BLOCK // 2 :], casting="unsafe")
    if kind == "Q4_0":
        out -= 8
    out *= wide[:, :1]
    if kind == "Q4_1":
        out += wide[:, 1:]


def halves(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of whole heads from llama.cpp's order, rotated neighbours side by side, to Hugging Face's: two halves.

    rows [heads * d, columns]; the inverse of convert_hf_to_gguf.py: LlamaModel.permute.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def describe_types(path: Path) -> str:
    """A line for whoever made something of the file: "Q4_1 (210 tensors) and Q8_0 (1): decoded exactly to ..."."""
    counts: Mapping[str, int] = GGUFFile.of(path).types()
    listed = ", ".join(f"{name} x {count}" for name, count in counts.items())
    blocks = [name for name in counts if name not in PLAIN]
    said = f"; {', '.join(blocks)} decoded to float32, with no rounding but the file's own" if blocks else ""
    return f"{path.name}: {listed}{said}"
