"""Every key of a config can be told: its type, its default and, from the comment of its field, what it is for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from moelab.config.comments import field_comments
from moelab.config.keys import config_keys, flow, keys_under, option_words
from moelab.config.run import RunConfig
from moelab.config.scalars import settle
from moelab.config.text import read_tree
from moelab.config.upcycle import UpcycleConfig
from moelab.errors import ConfigError


@dataclass
class Base:
    inherited: int = 1  # from below
    # Above, in
    # two lines.
    over: str | None = None
    alone: int = 2

    # Of nothing: a line is empty.

    silent: int = 3
    wrapped: list[int] = field(
        default_factory=lambda: [1, 2]  # behind, but None is not True
    )
    tools: int = 4
    text: str = "# no comment"


@dataclass
class Options(Base):
    must: Literal["a", "b"] = "???"  # type: ignore[assignment]
    alone: int = 5  # in its place


def test_a_comment_stands_behind_its_field_or_in_whole_lines_above() -> None:
    assert field_comments(Options) == {
        "inherited": "from below", "over": "Above, in two lines.", "wrapped": "behind, but null is not true",
        "alone": "in its place",
    }  # fmt: skip


def test_what_has_no_source_has_no_comments() -> None:
    made = dataclasses.make_dataclass("made", [("a", int, 1)])
    assert field_comments(made) == {}
    assert option_words(made) == [("a", "int", "1")]


def test_options_are_told_in_the_words_of_a_config() -> None:
    assert option_words(Options)[1:] == [
        ("over", "text | null", "null"), ("alone", "int", "5"), ("silent", "int", "3"),
        ("wrapped", "list of int", "[1, 2]"), ("tools", "int", "4"), ("text", "text", '"# no comment"'),
        ("must", "a | b", "required"),
    ]  # fmt: skip


@pytest.mark.parametrize("schema", [RunConfig, UpcycleConfig])
def test_every_key_says_what_it_is_for(schema: type) -> None:
    silent = [key.path for key in config_keys(schema) if not key.doc]
    assert not silent, f"a comment is wanted behind these fields: {silent}"


def test_every_default_is_yaml_that_reads_back() -> None:
    plain = dataclasses.asdict(RunConfig())
    for key in config_keys(RunConfig):
        if key.default is not None and not key.path.startswith(("model.moe.", "model.latent_attention.")):
            expected: Any = plain
            for piece in key.path.split("."):
                expected = expected[piece]
            assert settle(read_tree(key.default, key.path)) == expected, key.path


@pytest.mark.parametrize("value", ["null", "true", "a b", "", "0123", "a: b", 1e-8, None, [1.5, "x"], {"a": {"b": []}}])
def test_a_value_in_one_line_reads_back(value: Any) -> None:
    assert settle(read_tree(f"key: {flow(value)}", "x")) == {"key": value}


def test_a_partial_section_has_neither_defaults_nor_duties() -> None:
    keys = {key.path: key for key in config_keys(UpcycleConfig)}
    assert not keys["model.hidden_size"].required
    assert keys["model.rms_norm_eps"].default is None
    assert keys["model.moe.layout"].default == "{name: uniform}"
    assert keys["source"].required


def test_a_prefix_takes_whole_words() -> None:
    paths = [key.path for key in keys_under(RunConfig, "optimizer")]
    assert paths == [
        "optimizer",
        *(
            f"optimizer.{name}"
            for name in ("algorithm", "lr", "betas", "eps", "weight_decay", "moments_dtype", "learning_rates")
        ),
    ]
    with pytest.raises(ConfigError, match="did you mean 'optimizer'"):
        keys_under(RunConfig, "optimiser")
    with pytest.raises(ConfigError):
        keys_under(RunConfig, "optim")
