"""Recipes have the published models' parameters: counted beside transformers' own layers, on no memory at all.

Where our attention can't express the rest of a model (the recipe says so), its experts are what is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moelab import build_model
from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.nn.count import count_parameters, layer_parameters, moe_blocks
from parity.reference import MAJOR

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
pytestmark = pytest.mark.skipif(MAJOR < 5, reason="4.x does not know all of these models")


def _parts(model_type: str, names: list[str], **fields: Any) -> list[int]:
    """Parameters of layers of transformers, made from the defaults of a config class that `fields` change."""
    kind = transformers.AutoConfig.for_model(model_type, **fields)
    module = __import__(f"transformers.models.{model_type}.modeling_{model_type}", fromlist=names)
    with torch.device("meta"):
        made = [getattr(module, name)(*((kind, 0) if name == "NemotronHMoE" else (kind,))) for name in names]
    return [sum(parameter.numel() for parameter in layer.parameters()) for layer in made]


def _nemotron(**fields: int) -> Callable[[], int]:
    same = {"mlp_hidden_act": "relu2", "n_group": 1, "topk_group": 1}
    return lambda: _parts("nemotron_h", ["NemotronHMoE"], **same, **fields)[0]


# recipe -> (hidden size, transformers' parameters of a sparse layer's experts, router and shared expert)
LAYERS: dict[str, tuple[int, Callable[[], int]]] = {
    "qwen3_moe": (2048, lambda: _parts("qwen3_moe", ["Qwen3MoeSparseMoeBlock"])[0]),
    "qwen3_next": (2048, lambda: _parts("qwen3_next", ["Qwen3NextSparseMoeBlock"])[0]),
    "gpt_oss": (2880, lambda: _parts("gpt_oss", ["GptOssMLP"], num_local_experts=32)[0]),
    "olmoe": (2048, lambda: _parts("olmoe", ["OlmoeSparseMoeBlock"], intermediate_size=1024)[0]),
    "deepseek_v3": (7168, lambda: _parts("deepseek_v3", ["DeepseekV3MoE"])[0]),
    "nemotron3_nano": (2688, _nemotron(
        hidden_size=2688, n_routed_experts=128, num_experts_per_tok=6, moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712)),
    "nemotron3_super": (4096, _nemotron(
        hidden_size=4096, n_routed_experts=512, num_experts_per_tok=22, moe_intermediate_size=2688,
        moe_shared_expert_intermediate_size=5376, moe_latent_size=1024)),
}  # fmt: skip


def built(recipe: str, hidden: int, layers: int = 1) -> Any:
    """On the meta device, with attention of no interest and layers that all have experts, but for K3's first."""
    first = ["model.moe.layout.first_k_dense_replace=0"] if recipe == "deepseek_v3" else []
    shape = [
        f"model.hidden_size={hidden}", f"model.num_hidden_layers={layers}", "model.num_attention_heads=16",
        "model.num_key_value_heads=16", "model.intermediate_size=33792",
    ]  # fmt: skip
    files = [str(CONFIGS / "train/tiny_moe.yaml"), str(CONFIGS / f"moe/{recipe}.yaml")]
    config = load_config([*files, *shape, *first, "run_dir=unused"], RunConfig).config
    return build_model(config.model, device="meta", seed=None)


@pytest.mark.parametrize("recipe", LAYERS)
def test_a_sparse_layer_has_transformers_parameters(recipe: str) -> None:
    hidden, wanted = LAYERS[recipe]
    (block,) = moe_blocks(built(recipe, hidden))
    assert sum(parameter.numel() for parameter in block.parameters()) == wanted()


WHOLE = {"qwen3-30b-a3b": "qwen3_moe", "mixtral-8x7b": "mixtral", "gpt-oss-20b": "gpt_oss"}


@pytest.mark.parametrize(("name", "kind"), WHOLE.items())
def test_a_whole_model_has_transformers_parameters(name: str, kind: str) -> None:
    config = load_config([str(CONFIGS / f"model/{name}.yaml"), "run_dir=unused", "train.steps=1"], RunConfig).config
    model = config.model
    fields = {
        key: getattr(model, key)
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim",
        )
    }  # fmt: skip
    if kind == "gpt_oss":
        fields["num_local_experts"] = 32
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **fields))
    assert count_parameters(build_model(model, device="meta", seed=None)).total == theirs.num_parameters()


@pytest.mark.parametrize(
    ("layers", "experts", "total", "active"), [(24, 32, 20.91, 3.61), (36, 128, 116.83, 5.13)], ids=["20b", "120b"]
)
def test_gpt_oss_has_the_published_billions(layers: int, experts: int, total: float, active: float) -> None:
    """2508.10925, table 1, read as others quote it; active are all that serve a token but for the input's table."""
    words = [f"model.num_hidden_layers={layers}", f"model.moe.layout.num_experts={experts}", "run_dir=unused"]
    config = load_config([str(CONFIGS / "model/gpt-oss-20b.yaml"), *words, "train.steps=1"], RunConfig).config
    counted = count_parameters(build_model(config.model, device="meta", seed=None))
    assert round(counted.total / 1e9, 2) == total
    assert round((counted.active - config.model.vocab_size * config.model.hidden_size) / 1e9, 2) == active


def test_deepseek_v3_has_transformers_parameters() -> None:
    config = load_config([str(CONFIGS / "model/deepseek-v3.yaml"), "run_dir=unused", "train.steps=1"], RunConfig).config
    with torch.device("meta"):
        theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config())
    assert count_parameters(build_model(config.model, device="meta", seed=None)).total == theirs.num_parameters()


def test_kimi_k3_has_the_published_billions() -> None:
    """2607.24653, abstract: 2.8T parameters, 104B activated. 92 sparse layers and a dense one, without attention."""
    model = built("kimi_k3", 7168, layers=2)
    (block,) = moe_blocks(model)
    routed = 896 * 3 * 3584 * 3072
    rest = 896 * 7168 + 2 * 7168 * 3584 + 3584 + 2 * 3 * 7168 * 3072
    assert sum(parameter.numel() for parameter in block.parameters()) == routed + rest
    attention = [sum(p.numel() for p in layer.self_attn.parameters()) + 2 * 7168 for layer in model.layers]
    (dense, _), (sparse, active) = (layer_parameters(layer) for layer in model.layers)
    assert dense - attention[0] == 3 * 7168 * 33792
    assert sparse - active == routed * (896 - 16) // 896
    total, used = 92 * (sparse - attention[1]), 92 * (active - attention[1])
    assert 0.97 < total / 2.8e12 < 1.0
    assert 0.5 < used / 104e9 < 0.8  # the others are its attention, embeddings and dense layer
