"""The tokenizer of a GGUF file as tokenizer.json, where that gives the same ids; and what else its metadata says.

GGUF names a pre-tokenizer that llama.cpp has built in (tokenizer.ggml.pre). Those below are known by what they were
made from: the published tokenizer.json's of GPT-2, SmolLM, Qwen2 and Llama 3, and llama.cpp's src/llama-vocab.cpp. Of
any other the tokenizer is left out, and that is told. Free of torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from moelab.data.tokenizer_file import fast_tokenizer
from moelab.errors import DataError
from moelab.hf.gguf_file import GGUFFile

logger = logging.getLogger("moelab")

CONTROL, USER_DEFINED = 3, 4  # gguf-py constants.py: TokenType
# Splits of text (src/llama-vocab.cpp: LLAMA_VOCAB_PRE_TYPE_QWEN2 and _LLAMA3, as in their tokenizer.json's).
_WORDS = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": _WORDS % digits}
    return [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
        {**_BYTES, "trim_offsets": False, "use_regex": False},
    ]


# {tokenizer.ggml.pre: steps before the merges}
PRE_TOKENIZERS: Mapping[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "qwen2": _split(r"\p{N}"),
    "llama-bpe": _split(r"\p{N}{1,3}"),
}
_NORMALIZERS = {"qwen2": {"type": "NFC"}}  # of the published tokenizer; llama.cpp leaves it out
_WHOLE_WORDS = ("llama-bpe",)  # a word that is a token is taken without merges


def carried_by(file: GGUFFile) -> dict[str, bytes]:
    """{name: content} of the files that a folder with these weights has: tokenizer, generation settings, a card.

    Without a tokenizer where none with the same ids can be made, which is told in a warning.
    """
    found = {"README.source.md": _card(file).encode()}
    ids = {key: value for key, value in file.fields().items() if key.endswith("_token_id")}
    if ids:
        found["generation_config.json"] = _json(ids)
    reason = why_not(file)
    definition = b"" if reason else _json(_definition(file))
    try:
        if definition:
            fast_tokenizer(definition, file.path)
    except DataError as error:  # merges of tokens that aren't there, say
        reason = str(error)
    if reason is not None:
        logger.warning(
            "%s: its tokenizer is left out: %s; put the original tokenizer.json beside the result", file.path, reason
        )
        return found
    return found | {"tokenizer.json": definition, "tokenizer_config.json": _json(_settings(file))}


def why_not(file: GGUFFile) -> str | None:
    """The reason why no tokenizer.json with the same ids can be made of the metadata; None where one can."""
    model, pre = file.value("tokenizer.ggml.model"), file.value("tokenizer.ggml.pre")
    if model != "gpt2":
        return f"tokenizer.ggml.model is '{model}', and only byte-level BPE ('gpt2') is known to give the same ids"
    if pre not in PRE_TOKENIZERS:
        return f"tokenizer.ggml.pre is '{pre}', and known are {', '.join(PRE_TOKENIZERS)}"
    tokens, merges = file.value("tokenizer.ggml.tokens", []), file.value("tokenizer.ggml.merges", [])
    kinds = file.value("tokenizer.ggml.token_type", [])
    if not merges or len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        return "its merges are missing, or its tokens are not told apart"
    return None


def _definition(file: GGUFFile) -> dict[str, Any]:
    tokens, kinds = file.value("tokenizer.ggml.tokens"), file.value("tokenizer.ggml.token_type")
    pre = file.value("tokenizer.ggml.pre")
    added = [
        {
            "id": n, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": kind == CONTROL,
        }
        for n, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _NORMALIZERS.get(pre),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": _begins_with(file, tokens),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": pre in _WHOLE_WORDS,
            "vocab": {text: n for n, text in enumerate(tokens)},
            "merges": [pair.split(" ", 1) for pair in file.value("tokenizer.ggml.merges")],
        },
    }  # fmt: skip


def _begins_with(file: GGUFFile, tokens: list[str]) -> dict[str, Any] | None:
    """The step that puts the first token before a text, where the metadata says so."""
    first = file.value("tokenizer.ggml.bos_token_id")
    if not file.value("tokenizer.ggml.add_bos_token", False) or not isinstance(first, int) or first >= len(tokens):
        return None
    token = tokens[first]
    special, one = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, one],
        "pair": [special, one, {"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [first], "tokens": [token]}},
    }


def _settings(file: GGUFFile) -> dict[str, Any]:
    tokens = file.value("tokenizer.ggml.tokens")
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: file.value(f"tokenizer.ggml.{key}_token_id") for name, key in named.items()}
    found = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)},
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.of_model("context_length"),
        "chat_template": file.value("tokenizer.chat_template"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _card(file: GGUFFile) -> str:
    keys = ("name", "organization", "author", "basename", "finetune", "size_label", "license", "source.url", "url")
    said = [f"- {key}: {value}" for key in keys if (value := file.value(f"general.{key}")) is not None]
    types = ", ".join(f"{name} x {count}" for name, count in file.types().items())
    return "\n".join([f"# From {file.path.name}", "", *said, f"- tensors: {types}", ""])


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
