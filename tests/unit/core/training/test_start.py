"""What a run starts from: the checkpoint's model and tokenizer, and no difference that nobody named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moelab
from moelab.checkpoint import newest_checkpoint
from moelab.config.load import load_config
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import DataConfig, EvaluationConfig, RunConfig, TrainConfig
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.errors import CheckpointError, ConfigError
from moelab.hf.save import save_hf
from moelab.origin import origin_layer, read_origin
from moelab.registry import Registry
from moelab.training import start
from moelab.training.start import model_differences
from moelab.training.trainer import train

DENSE = ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1e5,
)  # fmt: skip
SPARSE = dataclasses.replace(
    DENSE,
    moe=MoEConfig(
        layout={"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        router={"name": "softmax_topk", "norm_topk_prob": False},
        shared_expert={"name": "gated", "intermediate_size": 24},
    ),
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"document {n} says {n * n} and {n**3} " * 8}) + "\n" for n in range(20))
    )
    return path


def folder_of(model: ModelConfig, path: Path, **files: bytes) -> Path:
    """A Hugging Face folder, with the byte tokenizer unless `files` say otherwise."""
    made = {name.replace("__", "."): content for name, content in files.items()}
    save_hf(moelab.build(model, seed=3), path, dtype=torch.float32, extra_files=made or ByteTokenizer().files())
    return path


def run_config(tmp_path: Path, data: Path, model: ModelConfig, **train: Any) -> RunConfig:
    return RunConfig(
        run_dir=str(tmp_path / "run"),
        model=model,
        data=DataConfig(source={"name": "jsonl", "paths": [str(data)]}, validation_fraction=0.2),
        train=TrainConfig(**{"steps": 1, "batch_size": 2, "sequence_length": 16, **train}),
        evaluation=EvaluationConfig(sequences=2, sample_tokens=0),
        observers=[],
    )


def _changed(model: ModelConfig, key: str, value: Any) -> ModelConfig:
    tree = dataclasses.asdict(model)
    node = tree
    *above, last = key.split(".")[1:]
    for part in above:
        node = node[part]
    node[last] = value
    moe = MoEConfig(**tree.pop("moe")) if tree["moe"] else None
    return ModelConfig(**{k: v for k, v in tree.items() if k != "moe"}, moe=moe)


# Whatever no shape shows: the tensors of both models are the same.
SAME_SHAPES = {
    "model.rope_theta": 1e6,
    "model.rms_norm_eps": 1e-6,
    "model.moe.router.norm_topk_prob": True,
    "model.moe.layout.num_experts_per_tok": 1,
}


@pytest.mark.parametrize(("key", "value"), SAME_SHAPES.items())
def test_what_no_shape_shows_is_refused_unless_it_is_named(tmp_path: Path, data: Path, key: str, value: Any, caplog):
    folder = folder_of(SPARSE, tmp_path / "hf")
    config = run_config(tmp_path, data, _changed(SPARSE, key, value), init_from=str(folder))
    with pytest.raises(ConfigError, match=rf"^{key}: is not as in the checkpoint .*init_overrides=\[{key}\]"):
        train(config)
    assert not (tmp_path / "run").exists()
    config.train.init_overrides = [key.rpartition(".")[0] if "moe" in key else key]
    run = train(config)
    assert f"train.init_overrides: {key} is {value!r}" in caplog.text
    told = json.loads((run / "summary.json").read_text())["init_overrides"]
    assert list(told) == [key]
    assert told[key]["config"] == value
    assert "train.init_overrides" in (run / "log.txt").read_text()


def test_heads_of_another_number_and_width_are_refused(tmp_path: Path, data: Path):
    """8 heads of 4 have the tensors of 4 heads of 8."""
    folder = folder_of(DENSE, tmp_path / "hf")
    other = dataclasses.replace(DENSE, num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(ConfigError, match=r"num_attention_heads: 8 here, 4 there.*head_dim: 4 here, 8 there"):
        train(run_config(tmp_path, data, other, init_from=str(folder)))


def test_what_leaves_the_function_alone_may_differ(tmp_path: Path, data: Path):
    folder = folder_of(SPARSE, tmp_path / "hf")
    other = dataclasses.replace(SPARSE, initializer_range=0.5, max_position_embeddings=128, head_dim=8)
    assert other.moe is not None
    moe = dataclasses.replace(other.moe, balance_losses=[{"name": "load_balance", "weight": 0.01}], expert_chunk=8)
    train(run_config(tmp_path, data, dataclasses.replace(other, moe=moe), init_from=str(folder)))


def test_a_sequence_longer_than_the_checkpoints_is_refused_unless_named(tmp_path: Path, data: Path):
    folder = folder_of(DENSE, tmp_path / "hf")
    other = dataclasses.replace(DENSE, max_position_embeddings=128)
    config = run_config(tmp_path, data, other, init_from=str(folder), sequence_length=80)
    with pytest.raises(ConfigError, match="max_position_embeddings: 128 here, 64 there"):
        train(config)
    config.train.init_overrides = ["model.max_position_embeddings"]
    train(config)


def test_a_part_of_one_layer_is_compared_layer_by_layer():
    """Two ways to say the same are the same; one layer's router is another one."""
    assert SPARSE.moe is not None
    layered = dataclasses.replace(
        SPARSE.moe, router={"name": "sigmoid_topk"}, layers={"0-1": {"router": SPARSE.moe.router}}
    )
    said = dataclasses.replace(SPARSE, moe=layered)
    registry = Registry(entry_points=False)
    assert list(model_differences(said, SPARSE, registry, registry)) == []
    one = dataclasses.replace(SPARSE, moe=dataclasses.replace(SPARSE.moe, layers={"1": {"router": {"name": "hash"}}}))
    found = list(model_differences(one, SPARSE, registry, registry))
    assert [(d.key, d.config, d.checkpoint) for d in found] == [
        ('model.moe.layers."1".router.name', "hash", "softmax_topk")
    ]
    assert found[0].covered_by(["model.moe.layers.1.router"])
    assert not found[0].covered_by(["model.moe.layers.1.route"])
    dense = [d.key for d in model_differences(DENSE, SPARSE, registry, registry)]
    assert dense == ["model.moe"]


def test_a_name_that_overrides_nothing_is_told(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture):
    folder = folder_of(DENSE, tmp_path / "hf")
    train(run_config(tmp_path, data, DENSE, init_from=str(folder), init_overrides=["model.rope_theta"]))
    assert "model.rope_theta overrides nothing" in caplog.text
    with pytest.raises(ConfigError, match=r"'optimizer\.lr' is no key of the model"):
        run_config(tmp_path, data, DENSE, init_overrides=["optimizer.lr"]).check()


def test_a_config_takes_model_and_tokenizer_from_the_checkpoint(tmp_path: Path, data: Path):
    """Nothing of the model is said, and the run's loss before it has learnt anything is the checkpoint's."""
    folder = folder_of(SPARSE, tmp_path / "hf")
    config = tmp_path / "run.yaml"
    config.write_text(
        json.dumps(
            {
                "run_dir": str(tmp_path / "run"), "observers": [], "optimizer": {"lr": 1e-12, "weight_decay": 0.0},
                "data": {"source": {"name": "jsonl", "paths": [str(data)]}, "validation_fraction": 0.2},
                "train": {"steps": 1, "batch_size": 2, "sequence_length": 16, "init_from": str(folder)},
                "evaluation": {"sequences": 4, "sample_tokens": 0},
            }
        )
    )  # fmt: skip
    loaded = load_config([str(config)], RunConfig, below=origin_layer)
    assert loaded.config.model.rope_theta == 1e5
    assert loaded.config.data.tokenizer == "bytes"
    assert loaded.below is not None
    run = train(loaded.config)
    mine, theirs = moelab.load(run), moelab.load(folder)
    assert not mine.training and not theirs.training
    ids = torch.arange(40)[None]
    torch.testing.assert_close(mine(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)
    # ... and a run that starts from that run takes its model in turn, and carries the tokenizer on.
    again = load_config(
        [str(config), f"train.init_from={run}", f"run_dir={tmp_path / 'again'}"], RunConfig, below=origin_layer
    )
    assert dataclasses.asdict(again.config.model) == dataclasses.asdict(read_origin(run).model)
    train(again.config)


def test_a_resumed_run_needs_no_model_and_no_init_from(tmp_path: Path, data: Path):
    """Its own checkpoint says all, and the folder it once began from may be gone."""
    folder = folder_of(DENSE, tmp_path / "hf")
    config = run_config(
        tmp_path, data, dataclasses.replace(DENSE, rope_theta=1e6), init_from=str(folder),
        init_overrides=["model.rope_theta"],
    )  # fmt: skip
    train(config)
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "summary.json").unlink()
    config.resume = True
    train(config)
    assert list(json.loads((tmp_path / "run" / "summary.json").read_text())["init_overrides"]) == ["model.rope_theta"]


def test_a_resumed_run_draws_no_weights_and_tells_another_model_by_its_key(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    config = run_config(tmp_path, data, SPARSE)
    train(config)
    config.resume = True
    drawn = start.build_model

    def watched(*arguments: Any, **named: Any) -> Any:
        assert named["seed"] is None, "weights were drawn that the checkpoint has"
        return drawn(*arguments, **named)

    monkeypatch.setattr(start, "build_model", watched)
    config.train.steps += 1
    config.schedule.name = "constant"
    with pytest.raises(ConfigError, match=r"schedule\.name"):  # the model was ready by then
        train(config)
    monkeypatch.undo()
    config.model = dataclasses.replace(SPARSE, hidden_size=64)
    with pytest.raises(ConfigError, match=r"model\.hidden_size"):
        train(config)


def test_another_tokenizer_than_the_checkpoints_is_refused_unless_named(tmp_path: Path, data: Path, caplog):
    tokenizer = json.loads(ByteTokenizer().files()["tokenizer.json"])
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 257, "content": "<|im_end|>"})
    folder = folder_of(
        DENSE, tmp_path / "hf", tokenizer__json=json.dumps(tokenizer).encode(),
        generation_config__json=b'{"eos_token_id": [256, 257], "temperature": 0.7}', LICENSE=b"free",
    )  # fmt: skip
    assert read_origin(folder).tokenizer == str(folder)
    config = run_config(tmp_path, data, DENSE, init_from=str(folder))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: 'bytes' here, .*hf' there"):
        train(config)
    config.train.init_overrides = ["data.tokenizer"]
    newest = newest_checkpoint(train(config))
    assert newest is not None
    assert "mean nothing any more" in caplog.text
    assert {p.name for p in newest.iterdir()} & {"generation_config.json", "LICENSE"} == {"LICENSE"}
    config.train.init_overrides, config.data.tokenizer, config.run_dir = [], str(folder), str(tmp_path / "own")
    newest = newest_checkpoint(train(config))
    assert newest is not None
    assert (newest / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()


def test_the_same_tokenizer_written_otherwise_is_the_same(tmp_path: Path, data: Path):
    content = json.loads(ByteTokenizer().files()["tokenizer.json"])
    rewritten = json.dumps(dict(reversed(content.items())) | {"padding": None, "version": "2.0"}).encode()
    folder = folder_of(DENSE, tmp_path / "hf", tokenizer__json=rewritten)
    train(run_config(tmp_path, data, DENSE, init_from=str(folder)))


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture):
    folder = folder_of(DENSE, tmp_path / "hf", LICENSE=b"free")
    train(run_config(tmp_path, data, DENSE, init_from=str(folder)))
    assert "holds no tokenizer.json" in caplog.text


def test_a_folder_that_is_both_kinds_of_checkpoint_is_refused(tmp_path: Path, data: Path):
    newest = newest_checkpoint(train(run_config(tmp_path, data, DENSE)))
    assert newest is not None
    (newest / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds both state\.json"):
        moelab.load(newest)


def test_every_kind_of_folder_loads_in_evaluation_mode(tmp_path: Path, data: Path):
    run = train(run_config(tmp_path, data, SPARSE))
    for place in (run, newest_checkpoint(run), folder_of(DENSE, tmp_path / "hf")):
        assert place is not None
        model = moelab.load(place)
        assert not any(module.training for module in model.modules()), place
