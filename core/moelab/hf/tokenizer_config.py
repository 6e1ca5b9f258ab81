"""tokenizer_config.json so that transformers reads a tokenizer.json as it is, and under what name llama.cpp knows it.

transformers 5.23 (models/auto/tokenization_auto.py: MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS) takes Qwen2Tokenizer for
every folder of model_type qwen2, whatever tokenizer_class says, and that class puts Qwen2's own normaliser and regular
expression around the vocabulary: other ids for any other tokenizer, 3 to 10 % off in bits per byte. One switch makes it
keep the file: `trust_remote_code`, read from tokenizer_config.json as from_pretrained's argument of that name
(tokenization_utils_tokenizers.py: TokenizersBackend.convert_to_native_format). It grants nothing here: no code lies in
the folder. 4.57 reads tokenizer_class and needs no switch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moelab.hf.carried import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from moelab.hf.files import READING
from moelab.safe_files import an_object, parse_json

# Digits one by one, contractions apart, and a blank belongs to the word after it.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_TOKENS = 151_643  # regular ones (Qwen2 technical report, section 2.1)
_END = "<|endoftext|>"  # Qwen2Tokenizer adds it where it is missing


def as_it_is(files: Mapping[str, bytes], *, dense: bool) -> dict[str, bytes]:
    """`files` (tokenizer.json, tokenizer_config.json, ...) with a tokenizer_config.json that changes no id.

    `dense`: the folder's model_type is qwen2. Qwen2's own tokenizer stays as it was given.
    """
    definition, config = _object(files, TOKENIZER_FILE), _object(files, TOKENIZER_CONFIG_FILE)
    config.pop("auto_map", None)  # its code stays behind
    if not is_qwen2_pipeline(definition):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for token in ("bos_token", "unk_token", "pad_token"):  # else Qwen2Tokenizer adds its own, with new ids
            config.setdefault(token, None)
        if dense:
            config["trust_remote_code"] = True
    return {**files, TOKENIZER_CONFIG_FILE: (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode()}


def named_token_ids(files: Mapping[str, bytes]) -> dict[str, int]:
    """{"pad_token_id": ..., "bos_token_id": ...} of the tokens that tokenizer_config.json names, where they exist."""
    definition, config = _object(files, TOKENIZER_FILE), _object(files, TOKENIZER_CONFIG_FILE)
    vocabulary = definition.get("model", {}).get("vocab", {})
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= {token["content"]: token["id"] for token in definition.get("added_tokens", [])}
    found = {}
    for name in ("bos", "pad"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token  # older files write the whole added token
        if isinstance(token, str) and token in ids:
            found[f"{name}_token_id"] = int(ids[token])
    return found


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return an_object(parse_json(files[name], name, READING), name, READING)


def is_qwen2_pipeline(definition: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json splits text as Qwen2Tokenizer does, around whatever vocabulary."""
    model = definition.get("model", {})
    added = {token.get("content") for token in definition.get("added_tokens", [])}
    plain = not any(model.get(key) for key in ("dropout", "byte_fallback", "ignore_merges", "fuse_unk"))
    affixes = any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    return (
        model.get("type") == "BPE"
        and plain
        and not affixes
        and (_END in added or _END in model.get("vocab", {}))
        and (definition.get("normalizer") or {}).get("type") == "NFC"
        and _splits_as_qwen2(definition.get("pre_tokenizer") or {})
    )


def _splits_as_qwen2(node: Mapping[str, Any]) -> bool:
    steps = node.get("pretokenizers", [])
    if node.get("type") != "Sequence" or [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return False
    split, byte_level = steps
    return (
        split.get("pattern") == {"Regex": QWEN2_WORDS}
        and split.get("behavior") == "Isolated"
        and not split.get("invert")
        and not byte_level.get("add_prefix_space")
        and not byte_level.get("use_regex", True)
    )


def llama_cpp_remark(definition: Mapping[str, Any]) -> str:
    """Whether llama.cpp's converter will know this tokenizer, and what to do where it will not.

    It hashes the ids of a fixed text and looks the hash up among published tokenizers (convert_hf_to_gguf.py:
    get_vocab_base_pre); GGUF then names a pre-tokenizer that llama.cpp has built in.
    """
    vocabulary = definition.get("model", {}).get("vocab", {})
    if is_qwen2_pipeline(definition) and len(vocabulary) == QWEN2_TOKENS:
        return "llama.cpp: its converter knows this tokenizer, Qwen2's (but leaves NFC out: decomposed accents)"
    if definition.get("model", {}).get("type") == "BPE" and not definition["model"].get("merges"):
        return (
            "llama.cpp: loads no tokenizer without merges, as this one is; its converter would need one that has some"
        )
    name = _built_in(definition)
    cure = (
        f"let its get_vocab_base_pre() return '{name}', which splits text as this one does"
        if name
        else "let its get_vocab_base_pre() return the built-in one that splits text as tokenizer.json does, "
        "and compare ids: llama.cpp may have none"
    )
    return (
        "llama.cpp: its converter knows published tokenizers alone, by a hash of their ids; this one is not Qwen2's. "
        f"If it says 'BPE pre-tokenizer was not recognized', {cure}"
    )


def _built_in(definition: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of a pre-tokenizer that gives the same ids (src/llama-vocab.cpp), where one is known to."""
    node, normalizer = definition.get("pre_tokenizer") or {}, definition.get("normalizer")
    steps = node.get("pretokenizers", [node])
    kinds = [step.get("type") for step in steps]
    if normalizer is None and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
            return "smollm"
    return "qwen2" if is_qwen2_pipeline(definition) else None
