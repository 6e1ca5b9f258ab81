"""What config.json says of positions: how the rotary embedding is stretched, and which keys a query sees. Both ways.

After transformers 5.23: modeling_rope_utils.py and models/{qwen2,qwen2_moe,qwen3,qwen3_moe,mistral,mixtral,phi3,
gpt_oss}/configuration_*.py; `dual_chunk_attention_config`, which transformers doesn't know, after vLLM's
dual_chunk_flash_attn.py. Free of torch. What is not known is refused by its name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from moelab.config.model import ModelConfig
from moelab.config.rope_scaling import PLAIN, as_part
from moelab.errors import CheckpointError, ConfigError
from moelab.hf.fields import Fields
from moelab.hookspecs import ROPE_SCALINGS
from moelab.moe.per_layer import match_layers
from moelab.registry import Registry

logger = logging.getLogger("moelab")

ROPE_KEYS, DUAL_CHUNK = ("rope_scaling", "rope_parameters"), "dual_chunk_attention_config"
TRAINED = "original_max_position_embeddings"
# Rope types by where transformers 5 has the trained length: at the top before the rope scaling's own, the longest
# sequence where there is none (yarn's plugin does that), and the longest sequence alone.
TOP_FIRST, LONGEST_STANDS_IN, LONGEST_ALONE = ("yarn", "llama3"), ("llama3",), ("dynamic",)
_NOT_SCALING = ("rope_theta", "partial_rotary_factor")
WRITABLE = ("linear", "dynamic", "yarn", "llama3")  # rope types of transformers whose numbers are all ours
# {window_rule: (layer, max_window_layers) -> whether it has the window}
WINDOW_RULES: Mapping[str, Callable[[int, int], bool]] = {
    "late": lambda layer, first: layer >= first,  # Qwen2, Qwen3
    "alternate": lambda layer, last: layer % 2 == 0 and layer < last,  # Qwen2-MoE
    "every": lambda layer, _: True,  # Qwen3-MoE
    "even": lambda layer, _: layer % 2 == 0,  # gpt-oss
    "plain": lambda layer, _: True,  # Mistral, Mixtral, Phi-3
}
BY_LAYER = ("late", "alternate", "even")  # the kinds that read layer_types
ALWAYS = ("plain", "even")  # those without use_sliding_window
FULL, SLIDING = "full_attention", "sliding_attention"


def read_rope_scaling(fields: Fields, registry: Registry | None) -> dict[str, Any] | None:
    """The rope scaling that all places agree on, None for plain; its numbers are checked by the plugin of its name."""
    said: dict[str, dict[str, Any] | None] = {}
    for key, rope in ropes(fields).items():
        part = as_part({k: v for k, v in rope.items() if k not in _NOT_SCALING and v is not None})
        said[key] = None if part.get("name", PLAIN) == PLAIN else part
        if part.get("name", PLAIN) == PLAIN and set(part) - {"name"}:
            fields.refuse(key, f'plain rotary embedding has no {min(set(part) - {"name"})}; say its "rope_type"')
    if len(said) > 1 and said["rope_scaling"] != said["rope_parameters"]:
        raise CheckpointError(
            f"{fields.path}: rope_scaling and rope_parameters contradict each other; transformers 4.x takes the first "
            "and 5.x the last: remove the wrong one"
        )
    found = next(iter(said.values()), None)
    if found is None:
        return None
    if registry is None or not registry.components(ROPE_SCALINGS):
        registry = Registry(points=(ROPE_SCALINGS,))
    key = next(iter(said))
    _trained_length(fields, found, key)
    if found["name"] == "yarn" and "factor" not in found:  # transformers: the quotient of the lengths
        original = found.get(TRAINED)
        if isinstance(original, int) and original > 0:
            found["factor"] = fields.number("max_position_embeddings", int) / original
    try:
        registry.select(ROPE_SCALINGS, found, key)
    except ConfigError as error:
        raise CheckpointError(f"{fields.path}: {error}") from error
    return found


def _trained_length(fields: Fields, found: dict[str, Any], key: str) -> None:
    """Complete a rope scaling by what the rest of config.json says of it, in place, as transformers 5 does."""
    top, own, kind = fields.get(TRAINED), found.get(TRAINED), found["name"]
    if kind in TOP_FIRST and top is not None:  # Phi-3's place for it
        if own is not None and own != top:
            raise CheckpointError(
                f"{fields.path}: {TRAINED} {top} and {key}.{TRAINED} {own} contradict each other; transformers 5.x "
                "takes the first and 4.x the last: remove the wrong one"
            )
        found[TRAINED] = fields.number(TRAINED, int)
    elif kind in LONGEST_STANDS_IN and own is None:
        found[TRAINED] = fields.number("max_position_embeddings", int)
    elif kind in LONGEST_ALONE and own not in (None, fields.get("max_position_embeddings")):
        raise CheckpointError(
            f"{fields.path}: {key}.{TRAINED}: {own} is not max_position_embeddings, which transformers takes for "
            "dynamic scaling; make them the same, or remove it"
        )


def ropes(fields: Fields) -> dict[str, Mapping[str, Any]]:
    """{field: object} of the places that speak of the rotary embedding beside `rope_theta`."""
    found: dict[str, Mapping[str, Any]] = {}
    for key in ROPE_KEYS:
        rope = fields.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            fields.refuse(key, "it must be an object or null")
        if rope.get("partial_rotary_factor", 1.0) != 1.0 or any(isinstance(v, dict) for v in rope.values()):
            fields.refuse(key, "rotary embedding is of whole heads, and the same in all layers")
        if rope.get("rope_type", rope.get("type")) != rope.get("type", rope.get("rope_type")):
            fields.refuse(key, "rope_type and type contradict each other: remove the wrong one")
        if not isinstance(rope.get("rope_type", rope.get("type")), str | None):
            fields.refuse(key, "its rope_type must be a name")
        found[key] = rope
    return found


def read_attention(fields: Fields, rule: str | None, default_window: int | None) -> dict[str, Any] | None:
    """The attention that config.json describes, None for full.

    `rule`: how its kind says which layers have a window, in WINDOW_RULES; None: it has none. `default_window`: where
    `sliding_window` is left out.
    """
    windows = _windows(fields, rule, default_window)
    chunks = fields.get(DUAL_CHUNK)
    if chunks is None:
        return windows
    if windows is not None:
        fields.refuse(DUAL_CHUNK, "a layer has a sliding window too; only one of them can be")
    if not isinstance(chunks, dict):
        fields.refuse(DUAL_CHUNK, "it must be an object or null")
    inner = Fields(fields.path, {f"{DUAL_CHUNK}.{key}": value for key, value in chunks.items()})
    known = {"chunk_size", "local_size", "original_max_position_embeddings"}
    for key in sorted(chunks.keys() - known):
        if chunks[key] not in (None, False):
            inner.refuse(f"{DUAL_CHUNK}.{key}", "moelab attends to all keys, not to chosen ones: remove the key")
    size = inner.number(f"{DUAL_CHUNK}.chunk_size", int, 8192)  # vLLM's defaults
    local = inner.number(f"{DUAL_CHUNK}.local_size", int, 1024)
    trained = inner.number(f"{DUAL_CHUNK}.original_max_position_embeddings", int, 0)
    if not 1 <= local < size or trained < 0:
        fields.refuse(DUAL_CHUNK, "chunk_size must exceed local_size, and none be negative")
    found: dict[str, Any] = {
        "name": "dual_chunk", "preset": "qwen_1m", "original_max_position_embeddings": size, "local": local,
    }  # fmt: skip
    if trained:
        found |= {"temperature": "per_query", "temperature_from": trained}
        logger.warning(
            "%s: %s.original_max_position_embeddings: beyond %d tokens scores are multiplied by the square of "
            "0.1 ln(n / %d) + 1, n being what a query sees; vLLM multiplies by it once, n being the whole text",
            fields.path, DUAL_CHUNK, trained, trained,
        )  # fmt: skip
    return found


def _windows(fields: Fields, rule: str | None, default: int | None) -> dict[str, Any] | None:
    """`sliding_window` alone is harmless where a flag says whether it is used: published configs have it unused."""
    layers, types = fields.number("num_hidden_layers", int), fields.get("layer_types")
    if types is not None and not (isinstance(types, list) and all(kind in (FULL, SLIDING) for kind in types)):
        fields.refuse("layer_types", f'it must be a list of "{FULL}" and "{SLIDING}"')
    used = rule in ALWAYS or fields.get("use_sliding_window", False)
    if used is not False and used is not True:
        fields.refuse("use_sliding_window", "it must be true or false")
    window = None if fields.is_null("sliding_window") else fields.number("sliding_window", int, default or 0)
    if used and rule is None:
        fields.refuse("use_sliding_window", "this kind of model has no sliding windows; set it to false")
    sliding = [layer for layer, kind in enumerate(types or ()) if kind == SLIDING]
    if sliding and (not used or not window or rule not in BY_LAYER):
        fields.refuse("layer_types", f'no window is in use (use_sliding_window), so every layer must be "{FULL}"')
    if not used or not window:
        return None
    if window < 0:
        fields.refuse("sliding_window", "it must be positive, or null")
    assert rule is not None
    if types is None or rule not in BY_LAYER:
        border = fields.number("max_window_layers", int, 28)
        sliding = [layer for layer in range(layers) if WINDOW_RULES[rule](layer, border)]
    elif len(types) != layers:
        fields.refuse("layer_types", f"it must name {layers} layers")
    if not sliding:
        return None
    some = {} if len(sliding) == layers else {"layers": ",".join(map(str, sliding))}
    return {"name": "sliding_window", "window": window, **some}


def rope_fields(config: ModelConfig) -> dict[str, Any]:
    """`rope_scaling` in the style of transformers 4, {} for plain. CheckpointError where there is no such type."""
    said = config.rope_scaling
    if said is None or said["name"] == PLAIN:
        return {}
    numbers = {key: value for key, value in said.items() if key != "name" and value is not None}
    if said["name"] not in WRITABLE:
        raise CheckpointError(
            f"model.rope_scaling: '{said['name']}' can't be said in config.json; {', '.join(WRITABLE)} can. "
            "Keep it as a moelab checkpoint"
        )
    if said["name"] == "dynamic":  # transformers takes the longest sequence for the trained one, and no other key
        original = numbers.pop("original_max_position_embeddings", config.max_position_embeddings)
        if original != config.max_position_embeddings:
            raise CheckpointError(
                f"model.rope_scaling.original_max_position_embeddings: {original}: config.json's dynamic scaling has "
                f"max_position_embeddings in its place, {config.max_position_embeddings}; make them the same"
            )
    if said["name"] == "yarn":
        numbers.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    return {"rope_scaling": {"rope_type": said["name"], **numbers}}


def attention_fields(config: ModelConfig, rule: str | None) -> dict[str, Any]:
    """What says the attention, {} for full; `rule` as in `read_attention`. CheckpointError where nothing does."""
    said = config.attention
    if said is None or said["name"] == "full":
        return {}
    if said["name"] == "dual_chunk":
        return _dual_chunk_fields(said, config.max_position_embeddings)
    if said["name"] != "sliding_window":
        raise CheckpointError(
            f"model.attention: '{said['name']}' can't be said in config.json; keep it as a moelab checkpoint"
        )
    layers, pattern = config.num_hidden_layers, said.get("layers")
    chosen = range(layers) if pattern is None else match_layers(pattern, layers, "model.attention.layers")
    if rule is None or (rule not in BY_LAYER and len(chosen) < layers):
        missing = "no sliding windows" if rule is None else "a window in all layers or in none"
        raise CheckpointError(f"model.attention: this kind of model has {missing}; keep it as a moelab checkpoint")
    if rule == "plain":
        return {"sliding_window": said["window"]}
    types = [SLIDING if layer in chosen else FULL for layer in range(layers)]
    return {
        "use_sliding_window": True,
        "sliding_window": said["window"],
        # For readers before layer_types, as far as this number can say it.
        "max_window_layers": min(chosen) if rule == "late" else layers,
        **({"layer_types": types} if rule in BY_LAYER else {}),
    }


def _dual_chunk_fields(said: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Of the preset qwen_1m: chunk_size is chunk + local, and the largest position."""
    size = said.get("original_max_position_embeddings") or longest
    local = said.get("local") or max(1, (size - said["chunk"]) if said.get("chunk") else size // 32)
    same = said.get("chunk") in (None, size - local) and said.get("max_position") in (None, size)
    temperature = said.get("temperature", "none")
    if said.get("preset", "paper") != "qwen_1m" or not same or temperature == "static":
        raise CheckpointError(
            "model.attention: of dual_chunk, config.json can say preset qwen_1m with temperature none or per_query "
            f"({DUAL_CHUNK}); keep it as a moelab checkpoint"
        )
    trained = (said.get("temperature_from") or size) if temperature == "per_query" else 0
    return {DUAL_CHUNK: {"chunk_size": size, "local_size": local, "original_max_position_embeddings": trained}}
