"""Whole conversions at a tiny size: what depends on what, resuming, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from dense_checkpoints import Tiny, dense_tensors, neurons, plan_for, read_all, recipe_config, upcycle, write_dense
from moelab.errors import CheckpointError, ConfigError
from moelab.hf.carried import SIDE_FILES
from moelab_upcycling.convert import convert
from moelab_upcycling.output import content_hash

BYTES = "38231e1fd368b42b303110804988fe2b9ed357d64fc4b737daeb6da76e4d932a"  # numpy 2.4, x86-64
GOLDEN = "930ef421873750e2b92650ac7820382b1318a485f5154c7333115de2e9f5f0a9"  # of xxh3-128 hashes of the same bytes

LATENT_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def output(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upcycled") / "out"
    upcycle(recipe_config(source), folder)
    return folder


@pytest.fixture(scope="module")
def golden_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Values that no random generator makes: the same everywhere."""
    folder = tmp_path_factory.mktemp("golden")
    tiny = Tiny(layers=1)
    tensors = {
        name.replace(".", "__"): (torch.arange(t.numel()).remainder(1009) / 4096 - 0.1).reshape(t.shape).bfloat16()
        for name, t in dense_tensors(tiny).items()
    }
    return write_dense(folder, tiny, **tensors)


def test_the_bytes_are_pinned(golden_source: Path, tmp_path: Path):
    """A change here makes another checkpoint of every published recipe: raise plan.FORMAT with it."""
    plan = plan_for(recipe_config(golden_source))
    outcome = convert(plan, tmp_path / "out", workers=1)
    made = read_all(tmp_path / "out")
    digests = {name: sha256(tensor.view(torch.uint8).numpy()).hexdigest() for name, tensor in made.items()}
    assert content_hash(plan, digests) == BYTES
    assert outcome.content_hash == GOLDEN


def test_kept_neurons_are_dense_neurons_across_all_three_matrices(source: Path, output: Path):
    """I1, I2 and coverage from the files alone, by looking rows up."""
    made, dense = read_all(output), read_all(source)
    for layer in (0, 1):
        ffn = neurons(dense, f"model.layers.{layer}.mlp")
        whole = torch.cat([ffn[m].view(torch.int16) for m in ("gate", "up", "down")], dim=1)
        places = {row.numpy().tobytes(): j for j, row in enumerate(whole)}
        parts = {m: {row.view(torch.int16).numpy().tobytes() for row in ffn[m]} for m in ffn}
        kept = []
        for e in range(64):
            expert = neurons(made, f"model.layers.{layer}.mlp.experts.{e}")
            rows = torch.cat([expert[m].view(torch.int16) for m in ("gate", "up", "down")], dim=1)
            found = [places.get(row.numpy().tobytes()) for row in rows]
            assert sum(j is not None for j in found) == 40
            kept += [j for j in found if j is not None]
            for matrix, known in parts.items():  # a row that is kept in one matrix is kept in all
                same = sum(row.view(torch.int16).numpy().tobytes() in known for row in expert[matrix])
                assert same == 40
        assert max(torch.bincount(torch.tensor(kept))) <= 9


def test_whatever_is_no_ffn_is_copied_byte_for_byte(source: Path, output: Path):
    """I6."""
    made, dense = read_all(output), read_all(source)
    for name, tensor in dense.items():
        if ".mlp." not in name:
            assert torch.equal(made[name].view(torch.int16), tensor.view(torch.int16)), name
    shared, ffn = neurons(made, "model.layers.0.mlp.shared_expert"), neurons(dense, "model.layers.0.mlp")
    assert torch.equal(shared["gate"][:592], ffn["gate"])
    assert torch.equal(shared["down"][:592], 2 * ffn["down"])
    assert not shared["down"][592:].any()


@pytest.mark.parametrize("changes", [{"max_shard_size": "300KB"}, {"max_shard_size": "30KB"}, {"workers": 3}])
def test_tensors_do_not_depend_on_shards_or_workers(source: Path, output: Path, tmp_path: Path, changes: dict):
    """I7."""
    config = recipe_config(source)
    for key, value in changes.items():
        setattr(config, key, value)
    outcome = upcycle(config, tmp_path / "out")
    assert outcome.complete
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert outcome.content_hash == index["metadata"]["upcycle_hash"]
    first, second = read_all(output), read_all(tmp_path / "out")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first.keys() == second.keys()


def test_tensors_do_not_depend_on_how_the_source_is_sharded(output: Path, tmp_path: Path):
    again = upcycle(recipe_config(write_dense(tmp_path / "sharded", shards=5)), None)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert again.content_hash == index["metadata"]["upcycle_hash"]


def test_a_change_in_one_layer_changes_only_that_layer(source: Path, output: Path, tmp_path: Path):
    """I8."""
    name = "model__layers__1__mlp__up_proj__weight"
    changed = dense_tensors(Tiny())[name.replace("__", ".")] * 1.5
    write_dense(tmp_path / "other", **{name: changed})
    upcycle(recipe_config(tmp_path / "other"), tmp_path / "out")
    first, second = read_all(output), read_all(tmp_path / "out")
    differing = {n for n in first if not torch.equal(first[n], second[n])}
    assert differing
    assert all(n.startswith("model.layers.1.mlp.") and "up_proj" in n for n in differing)


def test_another_seed_changes_every_expert(source: Path, output: Path):
    other = upcycle(recipe_config(source, seed=1), None)
    first = json.loads((output / "upcycle_manifest.jsonl").read_text().splitlines()[0])["tensors"]
    experts = [name for name in first if ".experts." in name]
    assert experts
    assert not any(other.hashes[name] == first[name] for name in experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_formats_keep_their_bits(tmp_path: Path, dtype: torch.dtype):
    write_dense(tmp_path / "dense", Tiny(dtype=dtype, layers=1))
    upcycle(recipe_config(tmp_path / "dense"), tmp_path / "out")
    made, dense = read_all(tmp_path / "out"), read_all(tmp_path / "dense")
    assert {t.dtype for t in made.values()} == {dtype}
    known = {row.numpy().tobytes() for row in dense["model.layers.0.mlp.gate_proj.weight"]}
    rows = made["model.layers.0.mlp.experts.5.gate_proj.weight"]
    assert sum(row.numpy().tobytes() in known for row in rows) == 40
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_the_output_can_have_another_format(tmp_path: Path):
    write_dense(tmp_path / "dense", Tiny(dtype=torch.float32, layers=1))
    upcycle(recipe_config(tmp_path / "dense", dtype="bfloat16"), tmp_path / "out")
    made, dense = read_all(tmp_path / "out"), read_all(tmp_path / "dense")
    name = "model.embed_tokens.weight"
    assert torch.equal(made[name], dense[name].bfloat16())
    assert {t.dtype for t in made.values()} == {torch.bfloat16}


def test_the_vocabulary_is_cut(source: Path, tmp_path: Path):
    upcycle(recipe_config(source, model={"vocab_size": 60}), tmp_path / "out")
    made, dense = read_all(tmp_path / "out"), read_all(source)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(made[name], dense[name][:60])
    with pytest.raises(ConfigError, match=r"model\.vocab_size=64 or fewer"):
        plan_for(recipe_config(source, model={"vocab_size": 65}))


def test_a_tied_source_stays_tied_unless_untied(tmp_path: Path):
    write_dense(tmp_path / "dense", Tiny(tied=True, layers=1))
    upcycle(recipe_config(tmp_path / "dense"), tmp_path / "tied")
    assert "lm_head.weight" not in read_all(tmp_path / "tied")
    upcycle(recipe_config(tmp_path / "dense", untie=True), tmp_path / "untied")
    made = read_all(tmp_path / "untied")
    assert torch.equal(made["lm_head.weight"], made["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "untied/config.json").read_text())["tie_word_embeddings"] is False


def test_a_tied_source_that_stores_another_head_is_refused(tmp_path: Path):
    write_dense(tmp_path / "dense", Tiny(tied=True, layers=1), lm_head__weight=torch.ones(64, 32).bfloat16())
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight"):
        plan_for(recipe_config(tmp_path / "dense"))


def test_silence_zeroes_or_shrinks_the_routed_experts(source: Path, output: Path, tmp_path: Path):
    upcycle(recipe_config(source, recipe={"silence": 0.0}), tmp_path / "silent")
    upcycle(recipe_config(source, recipe={"silence": 0.0078125}), tmp_path / "faint")
    loud, silent, faint = read_all(output), read_all(tmp_path / "silent"), read_all(tmp_path / "faint")
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert not silent[name].view(torch.int16).any()
    assert torch.equal(faint[name], loud[name] * 2**-7)
    other = name.replace("down", "up")
    assert torch.equal(silent[other], loud[other])


def test_several_sources_are_mixed(source: Path, tmp_path: Path):
    second = write_dense(tmp_path / "second", Tiny(seed=1))
    keys = {"recipe": {"experts": {"name": "mix"}}, "moe": {"layout": {
        "name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 592}}}  # fmt: skip
    upcycle(recipe_config([source, second], **keys), tmp_path / "out")
    made, a, b = read_all(tmp_path / "out"), read_all(source), read_all(second)
    for e, dense in enumerate([a, a, b, b]):
        name = f"model.layers.1.mlp.experts.{e}.down_proj.weight"
        assert torch.equal(made[name], dense["model.layers.1.mlp.down_proj.weight"])
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert torch.equal(made[name], ((a[name].float() + b[name].float()) / 2).bfloat16())
    kept = upcycle(recipe_config([source, second], **(keys | {"recipe": keys["recipe"] | {"others": "first"}})), None)
    assert kept.hashes["model.norm.weight"] == upcycle(recipe_config(source), None).hashes["model.norm.weight"]


def test_what_belongs_to_the_tokenizer_and_the_licence_are_carried(source: Path, tmp_path: Path):
    shutil.copytree(source, tmp_path / "dense")
    carried = {
        "tokenizer.json": '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 63}]}',
        "tokenizer_config.json": '{"eos_token": "a"}',
        "generation_config.json": '{"eos_token_id": [1, 2], "temperature": 0.7}',
        "LICENSE": "Apache",
        "NOTICE.txt": "who",
        **dict.fromkeys(SIDE_FILES, "as it is"),
    }
    for name, content in {**carried, "README.md": "card", "notes.txt": "stays"}.items():
        (tmp_path / "dense" / name).write_text(content)
    upcycle(recipe_config(tmp_path / "dense"), tmp_path / "out")
    for name, content in {**carried, "README.source.md": "card"}.items():
        assert (tmp_path / "out" / name).read_text() == content
    assert not {"notes.txt", "README.md"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_a_generation_config_without_sense_is_refused_before_anything_is_written(source: Path, tmp_path: Path):
    shutil.copytree(source, tmp_path / "dense")
    (tmp_path / "dense" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id: must be a token id or a list"):
        upcycle(recipe_config(tmp_path / "dense"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


TOKENIZERS = {
    "tokens of the model": ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 60}}}),
    "a list of pieces": ("tokenizer.json", {"model": {"vocab": [["a", 0.0]] * 61}}),
    "an added token": ("tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 60, "content": "b"}]}),
    "added by its config": ("tokenizer_config.json", {"added_tokens_decoder": {"60": {"content": "b"}}}),
    "without tokenizer.json": ("vocab.json", {"a": 0, "b": 60}),
    "added beside vocab.json": ("added_tokens.json", {"b": 60}),
}


@pytest.mark.parametrize(("name", "content"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_a_vocabulary_cut_below_the_tokenizer_is_refused(source: Path, tmp_path: Path, name: str, content: dict):
    """The largest id is 60: 61 rows do, 60 don't."""
    shutil.copytree(source, tmp_path / "dense")
    (tmp_path / "dense" / name).write_text(json.dumps(content))
    assert plan_for(recipe_config(tmp_path / "dense", model={"vocab_size": 61})).target.vocab_size == 61
    with pytest.raises(ConfigError, match=rf"model\.vocab_size: 60 is less than 61, .*{name} .*vocab_size=61 or more"):
        plan_for(recipe_config(tmp_path / "dense", model={"vocab_size": 60}))


def test_a_range_of_layers_waits_for_the_rest(source: Path, output: Path, tmp_path: Path):
    config = recipe_config(source)
    part = upcycle(config, tmp_path / "out", layers=range(1, 2))
    assert not part.complete
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
    whole = upcycle(config, tmp_path / "out")
    assert whole.complete
    assert whole.kept > 0
    assert {p.name: p.read_bytes() for p in output.glob("*.safetensors")} == {
        p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.safetensors")
    }


def test_a_damaged_shard_is_made_again(source: Path, output: Path, tmp_path: Path):
    shutil.copytree(output, tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    outcome = upcycle(recipe_config(source), tmp_path / "out")
    assert outcome.made == len(good)
    assert outcome.complete
    assert shard.read_bytes() == good


@pytest.mark.parametrize("changes", [{"seed": 1}, {"recipe": {"silence": 0.5}}, {"max_shard_size": "1MB"}])
def test_another_plan_is_not_resumed(source: Path, output: Path, changes: dict):
    before = {p.name: p.stat().st_mtime_ns for p in output.iterdir()}
    with pytest.raises(CheckpointError, match=f"another plan.*{next(iter(changes))}"):
        upcycle(recipe_config(source, **changes), output)
    assert before == {p.name: p.stat().st_mtime_ns for p in output.iterdir()}


def test_a_folder_with_something_else_is_left_alone(source: Path, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds something else \(thesis\.tex"):
        upcycle(recipe_config(source), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(CheckpointError, match="the source itself"):
        upcycle(recipe_config(source), source)


def test_nan_in_the_source_is_named(source: Path, tmp_path: Path):
    name = "model__layers__1__mlp__down_proj__weight"
    bad = dense_tensors(Tiny())[name.replace("__", ".")]
    bad[3, 100] = float("nan")
    write_dense(tmp_path / "bad", **{name: bad})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight' holds NaN"):
        upcycle(recipe_config(tmp_path / "bad"), tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
    assert not list((tmp_path / "out").glob(".*partial"))


@pytest.mark.parametrize("cut", [1, 5000, 10**9])
def test_a_source_that_is_cut_short_is_named(tmp_path: Path, cut: int):
    file = write_dense(tmp_path / "dense") / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: max(3, len(data) - cut)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is no whole safetensors file"):
        plan_for(recipe_config(tmp_path / "dense"))


def test_a_source_without_a_tensor_or_of_another_shape_is_named(tmp_path: Path):
    write_dense(tmp_path / "dense", model__norm__weight=torch.ones(31).bfloat16())
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight: has shape \[31\], but config\.json asks for \[32\]"
    ):
        plan_for(recipe_config(tmp_path / "dense"))
    (tmp_path / "dense/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        plan_for(recipe_config(tmp_path / "dense"))
    what_to_give = "nowhere: no such folder; give a Hugging Face checkpoint: a folder with config.json and .safetensors"
    with pytest.raises(CheckpointError, match=what_to_give):
        plan_for(recipe_config(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model": {"hidden_size": 64}}, "model.hidden_size: 64, but the source's is 32"),
        (
            {"model": {"latent_attention": dict.fromkeys(LATENT_SIZES, 4)}},
            "model.latent_attention: LatentAttentionConfig(kv_lora_rank=4",
        ),
        ({"model": {"mlp_bias": True}}, "model.mlp_bias: True, but the source's is False"),
        ({"model": {"activation": {"name": "relu2"}}}, "model.activation: {'name': 'relu2'}, but the source's is"),
        ({"moe": {"moe_latent_size": 8}}, "model.moe.moe_latent_size: experts made of a dense FFN's neurons"),
        ({"model": {"hiden_size": 32}}, "did you mean 'hidden_size'"),
        ({"moe": {"router": {"name": "expert_choice"}}}, "can't be stored as Qwen2-MoE"),
        ({"moe": {"shared_expert": {"name": "none"}}}, "recipe.shared.name=zero"),
        ({"recipe": {"shared": {"name": "copi"}}}, "did you mean 'copy'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(source: Path, keys: dict, words: str):
    with pytest.raises(ConfigError) as error:
        plan_for(recipe_config(source, **keys))
    assert words in str(error.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB; the tiny output has 3."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small tmpfs needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "none", str(place)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a small tmpfs failed: {done.stderr.decode()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_too_small_is_found_before_the_first_byte(source: Path, small_disk: Path):
    with pytest.raises(CheckpointError, match=r"are to be written, .* are free"):
        upcycle(recipe_config(source), small_disk / "out")
    assert not (small_disk / "out").exists()


def test_a_disk_that_fills_up_is_survived(source: Path, output: Path, small_disk: Path, monkeypatch):
    monkeypatch.setattr("moelab_upcycling.output.OutputFolder.check_space", lambda self, nbytes: None)
    with pytest.raises(CheckpointError, match="no space left; free some and run the same command again"):
        upcycle(recipe_config(source), small_disk / "out")
    left = sorted(p.name for p in (small_disk / "out").iterdir())
    assert left == ["model-00001-of-00003.safetensors", "upcycle.json", "upcycle_manifest.jsonl"]
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    outcome = upcycle(recipe_config(source), small_disk / "out")
    assert outcome.complete
    assert outcome.kept > 0
    assert (small_disk / "out" / left[0]).read_bytes() == (output / left[0]).read_bytes()


def test_a_read_only_target_is_named(source: Path, small_disk: Path):
    subprocess.run(["mount", "-o", "remount,ro,size=20m", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="choose another output folder"):
        upcycle(recipe_config(source), small_disk / "out")
