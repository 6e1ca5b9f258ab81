"""What the output model is: the source's config.json, overlaid with what the recipe's `model` names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.scalars import settle
from moelab.config.typed import OPTIONS, SCHEMA
from moelab.config.upcycle import UpcycleConfig
from moelab.errors import CheckpointError, ConfigError, near
from moelab.hf.carried import check_vocabulary
from moelab.hf.checkpoint_folder import CheckpointFolder
from moelab.hf.config import read_fields
from moelab.hf.fields import ALIKE
from moelab.hf.moe_formats import MOE_FORMATS, WRITABLE, MoEFormat
from moelab.hf.positions import attention_fields, rope_fields
from moelab.layouts import build_layouts
from moelab.moe.layout import ExpertLayout
from moelab.registry import Registry

# What the weights fix: a recipe may repeat these, not change them.
_FIXED = (
    "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rope_scaling", "attention", "qkv_bias", "o_bias",
    "attention_sinks", "latent_attention", "use_qk_norm",
    "activation", "mlp_bias",
)  # fmt: skip
# Fields of a dense config.json that mean the same in a Qwen2-MoE one.
_CARRIED = (
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "use_cache",
    "sliding_window", "max_window_layers",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """The output model. Plain data: it goes to the worker processes."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int
    tie_word_embeddings: bool
    qkv_bias: bool
    use_qk_norm: bool
    initializer_range: float
    layouts: Mapping[int, ExpertLayout]  # of the sparse layers
    shared_intermediate_size: int  # 0: there is no shared expert
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]
    model_type: str
    config: Mapping[str, Any]  # the output's config.json, without its dtype


def resolve_target(config: UpcycleConfig, opened: CheckpointFolder, registry: Registry) -> tuple[ModelConfig, Target]:
    """The source's model and the output's, of a config that `scaled` has completed.

    ConfigError where the recipe's `model` does not fit the source.
    """
    folder, source = opened.stored.folder, opened.config
    fields = read_fields(folder)
    path, raw = fields.path, fields.values
    dense = replace(source)
    given = dict(config.model)
    moe = given.pop("moe", None)
    hints = get_type_hints(ModelConfig)
    for key, typed in given.items():
        if key not in hints:
            raise ConfigError(f"model.{key}: no such key{near(key, hints)} It takes: {', '.join(hints)}")
        if settle(typed) is None:
            continue
        value = SCHEMA.convert(typed, hints[key], ("model", key))
        if key == "tie_word_embeddings":
            if value != source.tie_word_embeddings:
                raise ConfigError("model.tie_word_embeddings: stays as in the source; to untie write untie=true")
            continue
        if key in _FIXED and value != getattr(dense, key):
            raise ConfigError(f"model.{key}: {value}, but the source's is {getattr(dense, key)} ({path}); leave it out")
        setattr(dense, key, value)
    if dense.vocab_size > source.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {dense.vocab_size}, but the source has only {source.vocab_size} rows; "
            f"write model.vocab_size={source.vocab_size} or fewer"
        )
    check_vocabulary(dense.vocab_size, folder)
    if not isinstance(moe, Mapping):
        raise ConfigError(
            "model.moe: names no layout; write scale=qwen2-57b-a14b, or model.moe.layout as configs/upcycle/*.yaml do"
        )
    if config.untie:
        dense.tie_word_embeddings = False
    model_type = target_kind(config, source)
    dense.qkv_bias = MOE_FORMATS[model_type].model.get("qkv_bias", True)  # zero ones where the source has none
    dense.check()
    return source, _with_experts(dense, _moe(moe), raw, registry, model_type)


def target_kind(config: UpcycleConfig, source: ModelConfig) -> str:
    """The model_type of the output. ConfigError for one whose attention is not the source's."""
    if source.moe is not None:
        raise CheckpointError(f"{config.sources[0]}: has experts already; only a dense model can be upcycled")
    normed = {model_type: kind.model.get("use_qk_norm", False) for model_type, kind in WRITABLE.items()}
    own = next(model_type for model_type, has in normed.items() if has == source.use_qk_norm)
    chosen = config.target or own
    if chosen not in WRITABLE:
        raise ConfigError(f"target: must be one of {', '.join(WRITABLE)}, not '{chosen}'")
    kind = MOE_FORMATS[chosen]
    if normed[chosen] != source.use_qk_norm:
        has = "norms on q and k, which" if source.use_qk_norm else "no norms on q and k, and"
        raise ConfigError(f"target: the source has {has} {kind.title} can't express; write target={own}")
    if source.qkv_bias and not kind.model.get("qkv_bias", True):
        raise ConfigError(f"target: the source has biases on q, k and v, and {kind.title} has none; write target={own}")
    return chosen


def _moe(node: Mapping[str, Any]) -> MoEConfig:
    legal = [field.name for field in fields(MoEConfig)]
    for key in node:
        if key not in legal:
            raise ConfigError(f"model.moe.{key}: no such key{near(key, legal)} It takes: {', '.join(legal)}")
    return SCHEMA.build(MoEConfig, node, ("model", "moe"))


def _with_experts(
    dense: ModelConfig, moe: MoEConfig, raw: Mapping[str, Any], registry: Registry, model_type: str
) -> Target:
    kind = MOE_FORMATS[model_type]
    if moe.layers:
        raise ConfigError(f"model.moe.layers: a {kind.title} checkpoint has no parts by layer; leave it out")
    if moe.moe_latent_size is not None:
        raise ConfigError(
            "model.moe.moe_latent_size: experts made of a dense FFN's neurons read and write the full hidden size; "
            "leave it out"
        )
    layouts = _layouts(dense, moe, registry)
    router, shared = dict(moe.router), dict(moe.shared_expert)
    if router.get("name") != "softmax_topk":
        raise ConfigError(
            f"model.moe.router.name: '{router.get('name')}' can't be stored as {kind.title}, softmax_topk can; "
            "a training config may put another router on the upcycled weights"
        )
    where = ("model", "moe")
    width = _shared_width(shared, kind)
    norm_topk_prob = OPTIONS.convert(router.get("norm_topk_prob", False), bool, (*where, "router", "norm_topk_prob"))
    step, dense_layers = _sparse_pattern(layouts, dense.num_hidden_layers)
    misfits = kind.misfits(norm_topk_prob=norm_topk_prob, some_dense=len(layouts) < dense.num_hidden_layers)
    if misfits:
        raise ConfigError(f"model.moe: {misfits[0]}; change it, or take another target=")
    layout = layouts[min(layouts)]
    moe_fields = {
        "num_experts": layout.num_experts,
        "num_experts_per_tok": layout.num_experts_per_tok,
        "moe_intermediate_size": layout.moe_intermediate_size,
        "shared_expert_intermediate_size": width,
        "norm_topk_prob": norm_topk_prob,
        "decoder_sparse_step": step,
        "mlp_only_layers": list(dense_layers),
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    return Target(
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        num_hidden_layers=dense.num_hidden_layers,
        vocab_size=dense.vocab_size,
        tie_word_embeddings=dense.tie_word_embeddings,
        qkv_bias=dense.qkv_bias,
        use_qk_norm=dense.use_qk_norm,
        initializer_range=dense.initializer_range,
        layouts=layouts,
        shared_intermediate_size=width,
        norm_topk_prob=norm_topk_prob,
        decoder_sparse_step=step,
        mlp_only_layers=dense_layers,
        model_type=model_type,
        config=_config_json(dense, raw, moe_fields, model_type),
    )


def _shared_width(shared: Mapping[str, Any], kind: MoEFormat) -> int:
    """Of the shared expert; 0 where the target has none."""
    name, key = shared.get("name"), "intermediate_size"
    if not kind.has_shared:
        if name != "none":
            raise ConfigError(
                f"model.moe.shared_expert.name: '{name}', but {kind.title} has no shared expert; write {{name: none}}"
            )
        return 0
    if name != "gated":
        raise ConfigError(
            f"model.moe.shared_expert.name: '{name}' can't be stored as {kind.title}, which always has a "
            "gated one; write {name: gated, intermediate_size: ...}, with recipe.shared.name=zero to add nothing"
        )
    width = OPTIONS.convert(shared.get(key), int, ("model", "moe", "shared_expert", key))
    if width < 1:
        raise ConfigError(f"model.moe.shared_expert.{key}: must be at least 1, not {width}")
    return width


def _layouts(dense: ModelConfig, moe: MoEConfig, registry: Registry) -> dict[int, ExpertLayout]:
    found = build_layouts(replace(dense, moe=moe), registry)
    if not found:
        raise ConfigError("model.moe.layout: no layer is sparse, so there is nothing to upcycle")
    if len(set(found.values())) > 1:
        raise ConfigError("model.moe.layout: a checkpoint stores one layout for all sparse layers, this one varies")
    return found


def _sparse_pattern(layouts: Mapping[int, ExpertLayout], layers: int) -> tuple[int, tuple[int, ...]]:
    """(decoder_sparse_step, mlp_only_layers) that say which layers are sparse, the first with the fewest exceptions."""
    sparse = set(layouts)
    for step in range(1, layers + 1):
        stepped = {i for i in range(layers) if (i + 1) % step == 0}
        if stepped == sparse:
            return step, ()
    return 1, tuple(i for i in range(layers) if i not in sparse)


def _config_json(
    dense: ModelConfig, raw: Mapping[str, Any], moe_fields: Mapping[str, Any], model_type: str
) -> dict[str, Any]:
    """In the style of transformers 4: 4.57 reads theta 10,000 from a config that has only `rope_parameters`."""
    carried = {key: raw[key] for key in _CARRIED if raw.get(key) is not None}
    sizes = {key: getattr(dense, key) for key in (*ALIKE, "qkv_bias")}
    if dense.head_dim is not None:
        sizes["head_dim"] = dense.head_dim
    kind = MOE_FORMATS[model_type]
    said = {
        "architectures": [kind.class_name],
        "model_type": model_type,
        "use_sliding_window": False,
        **carried,
        **sizes,
        **rope_fields(dense),
        **attention_fields(dense, kind.window_rule),
        **moe_fields,
    }
    return kind.written(said)
