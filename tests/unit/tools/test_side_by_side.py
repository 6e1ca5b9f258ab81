"""Two models layer beside layer: the numbers of two whole models, though neither is ever whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.hf.save import save_hf
from moelab_tools.side_by_side import side_by_side

DENSE = ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
SPARSE = dataclasses.replace(
    DENSE,
    moe=MoEConfig(
        layout={"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        router={"name": "softmax_topk", "norm_topk_prob": False},
        shared_expert={"name": "gated", "intermediate_size": 24},
    ),
)


@pytest.mark.parametrize("tied", [True, False])
def test_it_finds_what_two_whole_models_say(tmp_path: Path, tied: bool) -> None:
    models = []
    for name, config in {"dense": DENSE, "sparse": SPARSE}.items():
        models.append(moelab.build(dataclasses.replace(config, tie_word_embeddings=tied), seed=len(name)).eval())
        save_hf(models[-1], tmp_path / name, dtype=torch.float32)
    ids = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1).clone()
    targets[:, -1] = -100
    seen: list[int] = []
    found = side_by_side(tmp_path / "dense", tmp_path / "sparse", ids, targets, progress=lambda: seen.append(1))
    with torch.inference_mode():
        answers = [model(ids) for model in models]
        a, b = (answer.logits.double().log_softmax(-1)[:, :-1].flatten(0, 1) for answer in answers)
    wanted = targets[:, :-1].flatten()[:, None]
    torch.testing.assert_close(found.nats_first, -a.gather(1, wanted)[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.nats_second, -b.gather(1, wanted)[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.kl, (a.exp() * (a - b)).sum(-1), atol=1e-5, rtol=1e-4)
    assert len(found.layers) == len(seen) == 3
    routing = answers[1].records[2].routing
    assert found.layers[2].mass == pytest.approx(float(routing.weight.sum()) / 60, rel=1e-5)
    with torch.no_grad():
        states = [model.run_layers(model.embed(ids), 0, 2).x for model in models]
    assert found.layers[1].relative == pytest.approx(float((states[1] - states[0]).norm() / states[0].norm()), rel=1e-5)


def test_a_model_beside_itself_is_the_same_to_the_bit(tmp_path: Path) -> None:
    save_hf(moelab.build(SPARSE, seed=1), tmp_path / "one", dtype=torch.float32)
    ids = torch.arange(40).view(2, 20)
    found = side_by_side(tmp_path / "one", tmp_path / "one", ids, ids)
    assert torch.equal(found.nats_first, found.nats_second)
    assert found.furthest == 0
    assert all(layer.relative == 0 and layer.kl == 0 for layer in found.layers)
