"""Merging beside its formulas in float64, matrix by matrix; experts in another order; what can't be merged."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moelab
from later_keys import later
from moelab.checksums import checksum
from moelab.components import came_later
from moelab.config.model import ModelConfig, MoEConfig
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.lineage import lineage_of
from moelab.hf.save import save_hf
from moelab.nn.transformer import Transformer
from moelab_tools.cli import run
from moelab_tools.merging.declaration import MergeConfig, MergedModel

LAYOUT = {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
CONFIG = ModelConfig(
    vocab_size=257, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=True,
    moe=MoEConfig(layout=LAYOUT, shared_expert={"name": "gated", "intermediate_size": 10}),
)  # fmt: skip
ORDER = [2, 0, 3, 1]


def save(model: Transformer, folder: Path, dtype: torch.dtype = torch.float32, tokenizer: bool = True) -> None:
    files = ByteTokenizer().files() if tokenizer else None
    save_hf(model, folder, dtype=dtype, extra_files=files, config_extra={"eos_token_id": 256})


def changed(model: Transformer, seed: int, size: float = 0.1) -> Transformer:
    """Another model of the same numbers and some noise."""
    other = moelab.build(model.config, seed=0)
    other.load_state_dict(model.state_dict())
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0.0, size, generator=stream))
    return other


def reordered(model: Transformer) -> Transformer:
    """The same function, with its experts under other numbers."""
    other = changed(model, 0, 0.0)
    with torch.no_grad():
        for layer in other.layers:
            for tensor in (layer.mlp.experts.gate_up, layer.mlp.experts.down, layer.mlp.router.weight):
                tensor.copy_(tensor[ORDER].clone())
    return other


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a, b: of one lineage; turned: a with its experts in another order."""
    folder = tmp_path_factory.mktemp("merge")
    base = moelab.build(CONFIG, seed=0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    save(base, folder / "base")
    for number, name in enumerate("ab", start=1):
        save(changed(base, number), folder / name)
    save(reordered(changed(base, 1)), folder / "turned")
    return folder


def merge(folders: Path, output: Path, *words: str) -> int:
    """`moelab merge`, where {name} is a folder."""
    there = {name: folders / name for name in ("base", "a", "b", "turned")}
    return run(["merge", *(_named(word, there) for word in words), f"output={output}"])


def _named(word: str, there: dict[str, Path]) -> str:
    for name, path in there.items():
        word = word.replace(f"<{name}>", str(path))
    return word


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


def largest(change: Tensor, density: float) -> Tensor:
    """Of a tensor all but the share of its largest magnitudes 0."""
    count = int(density * change.numel())
    kept = torch.zeros(change.numel(), dtype=torch.float64)
    best = change.flatten().abs().topk(count).indices
    kept[best] = change.flatten()[best]
    return kept.view(change.shape)


def ties(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """TIES by its definition: trim, elect, mean of those that agree, by their weights 0.5 and 0.25."""
    parts = [(0.5, largest(a - base, 0.5)), (0.25, largest(b - base, 0.8))]
    total = sum(weight * part for weight, part in parts)
    assert isinstance(total, Tensor)
    sign = torch.where(total >= 0, 1.0, -1.0)
    agree = [(weight, part, (part.sign() == sign).double()) for weight, part in parts]
    divisor = sum(weight * which for weight, _, which in agree)
    assert isinstance(divisor, Tensor)
    summed = sum(weight * part * which for weight, part, which in agree)
    return base + summed / torch.where(divisor == 0, 1.0, divisor)


CASES: dict[str, tuple[list[str], Any]] = {
    "linear": (
        ["models=[{path: <a>, weight: 1}, {path: <b>, weight: 3}]"], lambda base, a, b: (a + 3 * b) / 4
    ),
    "sum": (
        ["normalize=false", "models=[{path: <a>, weight: 0.5}, {path: <b>}]"], lambda base, a, b: 0.5 * a + b
    ),
    "task_arithmetic": (
        ["method=task_arithmetic", "base=<base>", "scale=0.5",
         "models=[{path: <a>, weight: 1}, {path: <b>, weight: -1}]"],
        lambda base, a, b: base + 0.5 * (a - b),
    ),
    "ties": (
        ["method=ties", "base=<base>", "models=[{path: <a>, weight: 0.5, density: 0.5}, "
         "{path: <b>, weight: 0.25, density: 0.8}]"], ties,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_matrix_of_each_expert_is_merged_by_its_formula(case: str, folders: Path, tmp_path: Path) -> None:
    """Of a Hugging Face folder, where gate, up and down of each expert are tensors of their own."""
    words, formula = CASES[case]
    assert merge(folders, tmp_path / "out", *words) == 0
    found = tensors(tmp_path / "out")
    base, a, b = (tensors(folders / name) for name in ("base", "a", "b"))
    assert found.keys() == base.keys() and any("experts.3.down_proj" in name for name in found)
    for name, value in found.items():
        torch.testing.assert_close(value, formula(base[name], a[name], b[name]), rtol=0, atol=2e-6, msg=name)
    assert moelab.load(tmp_path / "out")(torch.arange(6)[None]).logits.isfinite().all()
    said = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert said["merge"]["models"] and said["dtype"] == "float32"
    sources = [Path(one["folder"]).name for one in said["sources"]]
    assert sources == (["a", "b"] if case in ("linear", "sum") else ["base", "a", "b"])
    assert ("changed" in said["tensors"]["norm.weight"]) == (case not in ("linear", "sum"))


@pytest.mark.parametrize(("rescale", "expected"), [("l1", None), ("density", 2.0), ("none", 1.0)])
def test_dare_keeps_a_random_part_of_each_change(
    rescale: str, expected: float | None, folders: Path, tmp_path: Path
) -> None:
    words = ["method=dare_linear", "base=<base>", f"rescale={rescale}", "models=[{path: <a>, density: 0.5}]"]
    for name in ("one", "again"):
        assert merge(folders, tmp_path / name, *words) == 0
    found, base, a = tensors(tmp_path / "one"), tensors(folders / "base"), tensors(folders / "a")
    assert all(torch.equal(value, found[name]) for name, value in tensors(tmp_path / "again").items())
    kept = 0
    for name, value in found.items():
        moved, change = value - base[name], a[name] - base[name]
        where = moved.abs() > 1e-6
        kept += int(where.sum())
        factor = expected or float(change.abs().sum() / change[where].abs().sum())
        torch.testing.assert_close(moved[where], factor * change[where], rtol=0, atol=5e-6)
    share = kept / sum(value.numel() for value in found.values())
    assert abs(share - 0.5) < 6 * 0.5 / sum(value.numel() for value in found.values()) ** 0.5


def test_weights_go_by_pattern_and_a_pattern_of_nothing_is_refused(folders: Path, tmp_path: Path) -> None:
    words = ["method=task_arithmetic", "base=<base>", "models=[{path: <a>, weights: {'*.router.*': 0}}]"]
    assert merge(folders, tmp_path / "out", *words) == 0
    found, base, a = tensors(tmp_path / "out"), tensors(folders / "base"), tensors(folders / "a")
    for name, value in found.items():
        expected = base[name] if ".mlp.gate.weight" in name else a[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    assert merge(folders, tmp_path / "no", *[word.replace("router", "rooter") for word in words]) == 2
    assert not (tmp_path / "no").exists()


def test_experts_in_another_order_are_told_of_and_put_in_order(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["models=[{path: <a>}, {path: <turned>}]"]
    assert merge(folders, tmp_path / "mixed", *words) == 0
    assert "the experts of" in (told := capsys.readouterr().out) and "align_experts=true" in told
    assert merge(folders, tmp_path / "out", *words, "align_experts=true") == 0
    assert "are taken in the order 1, 3, 0, 2 (cosine 1.00 so" in " ".join(capsys.readouterr().out.split())
    found, mixed, a = (tensors(path) for path in (tmp_path / "out", tmp_path / "mixed", folders / "a"))
    for name, value in found.items():
        torch.testing.assert_close(value, a[name], rtol=0, atol=1e-6, msg=name)
    assert not torch.allclose(mixed["model.layers.0.mlp.experts.0.down_proj.weight"],
                              a["model.layers.0.mlp.experts.0.down_proj.weight"])  # fmt: skip


def test_what_was_written_can_be_checked_against_its_sources(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", f"models=[{{path: {folders / 'a'}}}, {{path: {folders / 'b'}}}]", f"output={tmp_path / 'out'}"]
    assert run([*words, "dtype=bfloat16"]) == 0
    assert run([*words, "dtype=bfloat16", "--check"]) == 0
    assert "as this config makes it of its sources" in capsys.readouterr().out
    path = tmp_path / "out" / "model.safetensors"
    stored = load_file(path)
    stored["model.norm.weight"][3] += 1
    save_file(stored, path)
    assert run([*words, "dtype=bfloat16", "--check"]) == 1
    assert "'norm.weight' is not what this config makes" in capsys.readouterr().err


def test_each_tensor_is_told_of_with_what_each_model_changed_and_what_was_kept_of_it(
    folders: Path, tmp_path: Path
) -> None:
    words, _ = CASES["ties"]
    assert merge(folders, tmp_path / "out", *words) == 0
    said = json.loads((tmp_path / "out" / "merge.json").read_text())
    base, a, b = (moelab.load(folders / name).state_dict() for name in ("base", "a", "b"))
    made = moelab.load(tmp_path / "out").state_dict()
    for name, entry in said["tensors"].items():
        assert entry["shape"] == list(base[name].shape)
        assert entry["checksum"] == checksum(made[name].contiguous().numpy().tobytes())
        assert entry["sources"] == [checksum(one[name].contiguous().numpy().tobytes()) for one in (base, a, b)]
        changed = [int((one[name] != base[name]).sum()) for one in (a, b)]
        assert entry["changed"] == changed
        assert all(0 < kept < all_ for kept, all_ in zip(entry["kept"], changed, strict=True))
        assert all(0 < agreeing <= kept for agreeing, kept in zip(entry["agreeing"], entry["kept"], strict=True))
    bank = said["tensors"]["layers.0.mlp.experts.down"]  # 4 experts of [8, 6], half of each, and 0.8 of each
    assert bank["kept"] == [4 * int(0.5 * 48), 4 * int(0.8 * 48)]
    assert said["tensors"].keys() == made.keys() - {"lm_head.weight"}
    assert len({one["checksum"] for one in said["sources"]}) == 3


def test_a_merged_folder_is_verified_without_its_sources(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert merge(folders, out, "models=[{path: <a>}, {path: <b>}]", "dtype=bfloat16") == 0
    assert run(["verify", str(out)]) == 0
    assert "as it was merged" in (told := capsys.readouterr().out) and f"linear of {folders / 'a'}" in told
    stored = load_file(out / "model.safetensors")
    stored["model.layers.1.mlp.experts.2.down_proj.weight"][0, 0] += 1
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    assert run(["verify", str(out)]) == 1
    assert "changed after it was merged: layers.1.mlp.experts.down" in capsys.readouterr().err
    (out / "merge.json").write_text('{"format_version": 1}')
    assert run(["verify", str(out)]) == 2
    assert "merge.json" in capsys.readouterr().err


def test_a_check_names_the_option_or_the_source_that_differs(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(folders / "b", mine)
    words = ["merge", f"models=[{{path: {folders / 'a'}}}, {{path: {mine}}}]", f"output={tmp_path / 'out'}"]
    assert run(words) == 0
    assert run([*words, "--check", "normalize=false"]) == 1
    assert "was merged otherwise: normalize is None there, False here" in capsys.readouterr().err
    stored = load_file(mine / "model.safetensors")
    stored["model.norm.weight"][3] += 1
    save_file(stored, mine / "model.safetensors", metadata={"format": "pt"})
    assert run([*words, "--check"]) == 1
    assert "models.1.path: 'norm.weight' of" in (told := capsys.readouterr().err) and "is not what was merged" in told


def test_what_is_no_one_model_is_refused_with_nothing_written(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(moelab.build(replace(CONFIG, rope_theta=5.0), seed=0), tmp_path / "theta")
    save(moelab.build(replace(CONFIG, hidden_size=16), seed=0), tmp_path / "wide")
    save(moelab.build(CONFIG, seed=0), tmp_path / "mute", tokenizer=False)
    more = moelab.build(replace(CONFIG, moe=replace(CONFIG.moe, layout=LAYOUT | {"num_experts": 8})), seed=0)  # type: ignore[type-var]
    save(more, tmp_path / "more")
    pair = "models=[{path: <a>}, {path: %s}]"
    for words, told in (
        ([pair % (tmp_path / "theta")], "models.1.path: .*is another architecture .*model.rope_theta is 5.0 there"),
        ([pair % (tmp_path / "wide")], "models.1.path: .*model.hidden_size is 16 there and 8 here"),
        ([pair % (tmp_path / "more")], "models.1.path: .*num_experts is 8 there and 4 here"),
        ([pair % (tmp_path / "mute")], "models.1.path: .*has another tokenizer"),
        ([pair % (tmp_path / "none")], "models.1.path: .*no such folder"),
        (["models=[{path: <a>}]"], "models: give two or more"),
        (["models=[{path: <a>}, {path: <b>}]", "base=<base>"], "base: is nothing to a mean"),
        (["models=[{path: <a>}, {path: <b>}]", "method=ties"], "base: has no value"),
        (["models=[{path: <a>, density: 0.5}, {path: <b>}]"], "models.0.density: linear keeps all"),
        (["models=[{path: <a>, weight: 1}, {path: <b>, weight: -1}]"], "add up to 0"),
        (["models=[{path: <a>}, {path: <b>}]", "method=tie"], "method: must be one of"),
        (["models=[{path: <a>, wieght: 1}, {path: <b>}]"], "models.0.wieght: no such key"),
    ):
        assert merge(folders, tmp_path / "out", *words) == 2, words
        said = capsys.readouterr().err
        assert re.search(told, said), (told, said)
        assert not (tmp_path / "out").exists()
        assert len(said.strip().splitlines()) == 1


def test_a_merge_is_the_same_under_a_key_that_came_later(folders: Path, tmp_path: Path) -> None:
    words = ("models=[{path: <a>}, {path: <b>, weight: 0.5}]",)
    assert merge(folders, tmp_path / "before", *words) == 0
    before = lineage_of(tmp_path / "before", "")
    with (
        later(MergeConfig, "later", "float", field(default=0.5, metadata=came_later(0.5))),
        later(MergedModel, "later", "int", field(default=3, metadata=came_later(3))),
    ):
        assert merge(folders, tmp_path / "after", *words) == 0
        assert merge(folders, tmp_path / "other", *words, "later=0.25") == 0
        assert merge(folders, tmp_path / "before", *words, "--check") == 0, "as it was merged then"
        assert merge(folders, tmp_path / "before", *words, "later=0.25", "--check") == 1
    assert lineage_of(tmp_path / "after", "") == before
    assert lineage_of(tmp_path / "other", "").recipe != before.recipe
