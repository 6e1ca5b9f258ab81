"""Stored configs: they read back as they were, hold nothing of the environment unasked, and are data to all."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from moelab.config.files import Layer
from moelab.config.load import Loaded, load_config
from moelab.config.run import RunConfig
from moelab.config.scalars import settle
from moelab.config.stages import StageConfig
from moelab.config.stored import filled, is_sealed, is_stored, read_stored, read_stored_tree, seal, stored, to_yaml
from moelab.config.upcycle import UpcycleConfig
from moelab.errors import ConfigError

TINY = "train/tiny_moe"
PIECES = [
    "${HOME}",
    "\\",
    "\\${x}",
    "$",
    "{",
    "}",
    "0123",
    "null",
    "~",
    " ",
    "\n",
    "#",
    ": ",
    "'",
    '"',
    "é",
    "${oc.env:A}",
    "x",
    "\x85",
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_SECRET", "hunter2")
    monkeypatch.setenv("MOELAB_NUMBER", "4")


def _load(tmp_path: Path, text: str, *overrides: str) -> Loaded[RunConfig]:
    (tmp_path / "mine.yaml").write_text(text)
    return load_config([TINY, str(tmp_path / "mine.yaml"), *overrides], RunConfig)


def _stored(folder: Path, config: RunConfig) -> Path:
    """As training leaves it."""
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text("{}")
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder / "config.yaml"


def _under(path: Path | None) -> Callable[[object], Layer] | None:
    """A stored config below all that is given."""
    return None if path is None else lambda said: Layer(str(path), read_stored_tree(path))


def test_any_text_survives_storing_and_every_way_of_reading(tmp_path: Path) -> None:
    draw = random.Random(1)
    for _ in range(60):
        config = load_config([TINY], RunConfig).config
        texts = ["".join(draw.choices(PIECES, k=draw.randrange(1, 7))) for _ in range(3)]
        config.name, config.evaluation.prompts = texts[0], texts
        config.data.source = {"name": "text", "paths": ["a"], "separator": texts[1]}
        path = _stored(tmp_path / "run", config)
        assert read_stored(path, RunConfig) == config
        assert load_config([str(path)], RunConfig).config == config  # the run's folder, named by the user
        (tmp_path / "copied.yaml").write_text(path.read_text())
        copied = load_config(
            [str(tmp_path / "copied.yaml")], RunConfig
        ).config  # a file of the user's, in a place of its own
        assert dataclasses.replace(copied, search_path=config.search_path) == config
        assert load_config(["seed=3"], RunConfig, below=_under(path)).config == dataclasses.replace(config, seed=3)


def test_an_escaped_dollar_is_a_text(tmp_path: Path) -> None:
    config = _load(tmp_path, "evaluation: {prompts: ['echo \\${HOME}']}\n").config
    assert config.evaluation.prompts == ["echo ${HOME}"]
    assert config.as_written == {}


def test_the_environment_is_used_and_not_stored(tmp_path: Path) -> None:
    text = "name: a-${oc.env:MOELAB_SECRET}\nseed: ${oc.env:MOELAB_NUMBER}\n"
    text += "train: {batch_size: '${seed}'}\nrun_dir: ${name}\n"
    config = _load(tmp_path, text).config
    assert (config.name, config.seed, config.train.batch_size, config.run_dir) == ("a-hunter2", 4, 4, "a-hunter2")
    written = to_yaml(config)
    assert "hunter2" not in written
    assert "seed: ${oc.env:MOELAB_NUMBER}" in written
    tree = stored(config)
    assert (tree["name"], tree["train"]["batch_size"]) == ("a-${oc.env:MOELAB_SECRET}", "${seed}")


def test_what_does_not_come_from_the_environment_is_stored_resolved(tmp_path: Path) -> None:
    assert "seed: 30\n" in to_yaml(_load(tmp_path, "seed: ${train.steps}\n").config)


def test_the_environment_is_stored_when_that_is_asked_for(tmp_path: Path) -> None:
    config = _load(tmp_path, "name: ${oc.env:MOELAB_SECRET}\nstore_environment: true\n").config
    assert "name: hunter2" in to_yaml(config)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("model: {max_position_embeddings: '${oc.env:MOELAB_NUMBER}000'}", "model.max_position_embeddings"),
        ("plugins: ['${oc.env:MOELAB_SECRET}']", "plugins.0"),
        ("search_path: ['${oc.env:MOELAB_SECRET}']", "search_path.0"),
        ("optimizer: {betas: '${oc.decode:\"[0.9, 0.9]\"}'}", "optimizer.betas"),
    ],
)
def test_what_a_checkpoint_needs_to_be_opened_is_stored_or_refused(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: .*store_environment=true.*mine\.yaml"):
        _load(tmp_path, text)
    _load(tmp_path, text, "store_environment=true")


def test_upcycling_takes_only_places_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "u.yaml").write_text("base: upcycle/sparse\nsource: ${oc.env:MOELAB_SECRET}\noutput: ${source}_moe\n")
    config = load_config([str(tmp_path / "u.yaml")], UpcycleConfig).config
    assert (config.sources, config.output) == (["hunter2"], "hunter2_moe")
    with pytest.raises(ConfigError, match=r"^recipe\.experts\.name: .*store_environment"):
        load_config([str(tmp_path / "u.yaml"), "recipe.experts.name=${oc.env:MOELAB_SECRET}"], UpcycleConfig)


def test_a_strangers_run_folder_is_data(tmp_path: Path) -> None:
    path = _stored(tmp_path / "run", load_config([TINY], RunConfig).config)
    path.write_text(
        path.read_text()
        .replace("name: tiny_moe", "name: ${oc.env:MOELAB_SECRET}")
        .replace("seed: 0", "seed: ${oc.env:X}", 1)
    )
    config = read_stored(path, RunConfig)
    assert (config.name, config.seed) == ("${oc.env:MOELAB_SECRET}", "${oc.env:X}")
    assert "hunter2" not in str(settle(read_stored_tree(path)))
    for arguments, below in ((["seed=1"], path), ([str(path), "seed=1"], None)):
        found = load_config(arguments, RunConfig, below=_under(below)).config
        assert found.name == "${oc.env:MOELAB_SECRET}"
        assert "hunter2" not in to_yaml(found)
        with pytest.raises(ConfigError, match=r"^seed: .*oc\.env:X.*pass that config again"):
            load_config([a for a in arguments if a != "seed=1"], RunConfig, below=_under(below))


def test_a_stored_config_has_no_base(tmp_path: Path) -> None:
    path = _stored(tmp_path / "run", load_config([TINY], RunConfig).config)
    path.write_text("base: train/tiny_moe\n" + path.read_text())
    with pytest.raises(ConfigError, match=r"^base: no such key"):
        read_stored(path, RunConfig)
    with pytest.raises(ConfigError, match=r"^base: no such key"):
        load_config([str(path)], RunConfig)


@pytest.mark.parametrize("sign", ["state.json", "checkpoints", "metrics.jsonl", "summary.json"])
def test_a_runs_own_config_is_known_by_what_lies_beside_it(tmp_path: Path, sign: str) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert not is_stored(tmp_path / "config.yaml")
    (tmp_path / sign).touch()
    assert is_stored(tmp_path / "config.yaml")
    assert not is_stored(tmp_path / "mine.yaml")


def test_a_seal_tells_equal_values_and_shows_none() -> None:
    values = {"seed": 5, "data.source.paths.0": "/home/hunter2"}
    sealed = seal(values)
    assert is_sealed(dict(reversed(values.items())), sealed)
    assert not is_sealed(values | {"seed": 6}, sealed)
    assert not is_sealed(values, "")
    assert seal(values) != sealed


def test_a_tree_from_before_a_key_says_what_the_key_is_without_it() -> None:
    plain = RunConfig(run_dir="runs/a")
    plain.stages = [StageConfig("one", 2)]
    whole = stored(plain)
    older = copy.deepcopy(whole)
    del older["train"]["compile"], older["schedule"], older["stages"][0]["lr"], older["train"]["steps"]
    del whole["train"]["steps"]  # which has no default
    assert filled(older, RunConfig) == whole
    assert filled(older | {"later": 1, "train": {"steps": 3}}, RunConfig)["later"] == 1, "a key of a later version"
    assert filled({"model": 3, "stages": [4]}, RunConfig)["model"] == 3, "what is damaged is not mended"
