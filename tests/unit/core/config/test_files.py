"""Overrides and files on the command line: which is which, and what an override's characters mean."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from moelab.config.files import find_config, is_override, override_layer, read_file
from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("a.b=c", {"a": {"b": "c"}}),
        ("a.0.b=1", {"a": {"0": {"b": 1}}}),
        ("a[0].b=1", {"a": {"0": {"b": 1}}}),
        ('a."0-3".b=x', {"a": {"0-3": {"b": "x"}}}),
        ("a=b=c", {"a": "b=c"}),
        ("a= x ", {"a": "x"}),
        (" a =x", {"a": "x"}),
        ("a=b: c #d", {"a": "b: c #d"}),
        ("a=*x", {"a": "*x"}),
        ("a=- x", {"a": "- x"}),
        ("a=\\n", {"a": "\\n"}),
        ('a="\\n"', {"a": "\n"}),
        ("a='0123'", {"a": "0123"}),
        ("a=[1, x, {b: c}]", {"a": [1, "x", {"b": "c"}]}),
        ('a={"0": {b: {name: c}}}', {"a": {"0": {"b": {"name": "c"}}}}),
        ("a=~/x", {"a": "~/x"}),
    ],
)
def test_an_override_is_its_characters_unless_a_quote_or_bracket_opens_it(text: str, tree: dict[str, Any]) -> None:
    assert override_layer(text).tree == tree


@pytest.mark.parametrize("text", ["=x", "=", "a..b=1", ".a=1", "a.=1", "[0]=1", "a b", "a[x]=1"])
def test_what_is_no_override_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="neither a config file nor an override"):
        override_layer(text)


@pytest.mark.parametrize("text", ["a={b", "a=[x] y", "a='x", "a={b: 1, b: 2}"])
def test_broken_yaml_in_an_override_names_the_override(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override_layer(text)
    assert str(caught.value).startswith(f"{text}: can't be read as YAML")


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"run_dir: .*no UTF-8"):
        override_layer("run_dir=\udcff")


def test_an_override_may_be_longer_than_a_file_name(root: Path) -> None:
    layers = ", ".join(f'"{i}": {{router: {{name: softmax_topk}}}}' for i in range(12))
    arguments = [
        str(root / "configs/train/tiny_moe.yaml"),
        "model.num_hidden_layers=12",
        f"model.moe.layers={{{layers}}}",
    ]
    moe = load_config(arguments, RunConfig).config.model.moe
    assert moe is not None
    assert len(moe.layers) == 12
    with pytest.raises(ConfigError, match="is no path"):
        find_config("x" * 300)


def test_a_word_with_an_equals_sign_is_a_file_if_it_is_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed=7").write_text("seed: 8\n")
    (tmp_path / "lr=1e-3.yaml").write_text("seed: 9\n")
    assert is_override("seed=7")
    assert not is_override("lr=1e-3.yaml")
    assert is_override("name=other.yaml")


def test_a_config_is_found_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("base: ~/b\n")
    (tmp_path / "b.yaml").write_text("run_dir: x\nmodel: {base: qwen2-7b}\ntrain: {steps: 1}\n")
    assert load_config(["~/c"], RunConfig).config.train.steps == 1


@pytest.mark.parametrize(
    ("content", "tree"),
    [
        (b"\xef\xbb\xbfa: yes\r\nb:\r\n  c: 0123\r\n", {"a": "yes", "b": {"c": "0123"}}),
        (b"", {}),
        (b"# nothing\n", {}),
        (b"---\n", {}),
    ],
)
def test_a_byte_order_mark_windows_lines_and_nothing_are_read(
    tmp_path: Path, content: bytes, tree: dict[str, Any]
) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    assert read_file(tmp_path / "a.yaml") == tree


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: caf\xe9\n", "byte 9"),
        ("name: x\n".encode("utf-16"), "UTF-8"),
        (b"- 1\n", "must hold a mapping of keys, not a list"),
        (b"hello\n", "not 'hello'"),
        (b"a: " + b"x" * 2**22, "more than the 4194304"),
    ],
)
def test_a_file_that_holds_no_config_is_refused_by_name(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"a\.yaml: .*{words}"):
        read_file(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=2.5", "train.steps: .*no whole number"),
        ("train.steps=null", "train.steps: .*'null' of type 'NoneType'"),
        ("optimizer.lr=nan", "optimizer.lr: must be a finite number"),
        ("optimizer.lr=.inf", "optimizer.lr: must be a finite number"),
        ("seed=-1", "seed: must be at least 0"),
        ("data.seed=-1", "data.seed: must be at least 0"),
        ("seed=99999999999999999999", "seed: .*too large"),
        ("evaluation.temperature=-0.1", "evaluation.temperature: must be at least 0"),
        ("evaluation.batch_size=0", "evaluation.batch_size: must be at least 1"),
        ("model.head_dim=0", "model.head_dim: must be in 1 .. 2147483647"),
        ("model.initializer_range=-1", "model.initializer_range: must not be negative"),
        ("model.moe.expert_chunk=0", "model.moe.expert_chunk: must be at least 1"),
        ("train.threads=99999999", "train.threads: must be at most 1024"),
        ("run_dir=''", "run_dir: names no folder"),
        ("run_dir=", "run_dir: must be a text"),
        ("plugins=3", "plugins: must be a list"),
        ("observers={7: 2}", "observers: must be a list"),
        ("data.source=jsonl", "data.source: must be a mapping.*write data.source.name=jsonl"),
        ("data={source: [null]}", "data.source: must be a mapping"),
        ("model.moe.layers=[null]", "model.moe.layers: must be a mapping"),
        ("model.moe.layers.0.router=3", "model.moe.layers.0.router: must be a mapping"),
        ("model.moe.layout.name=[{}]", "model.moe.layout.name: must be a word"),
        ("optimizer.betas.1=[{}]", "optimizer.betas.1: "),
        ("train=3", "train: must be a mapping"),
    ],
)
def test_every_trap_is_one_line_with_key_and_origin(root: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}") as caught:
        load_config([str(root / "configs/train/tiny_moe.yaml"), override], RunConfig)
    assert f"(set by {override})" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_item_of_a_default_list_is_overridden_by_its_index(root: Path) -> None:
    config = load_config([str(root / "configs/train/tiny_moe.yaml"), "optimizer.betas.1=0.5"], RunConfig).config
    assert config.optimizer.betas == [0.9, 0.5]


def test_every_override_in_the_documentation_is_read(root: Path) -> None:
    seen = 0
    for page in [root / "README.md", root / "AGENTS.md", *root.glob("docs/*.md")]:
        for command in re.findall(r"^    (moelab (?:\\\n|[^\n])*)", page.read_text(), flags=re.MULTILINE):
            words = shlex.split(command.replace("\\\n", " "), comments=True)
            for word in [word for word in words if re.match(r"[a-z_.0-9]+=", word)]:
                assert override_layer(word).tree
                seen += 1
    assert seen > 10
