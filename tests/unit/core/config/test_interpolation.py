"""`${...}` in a user's files: as OmegaConf resolves it, remembered where it asks the environment, and escapes."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from moelab.config.interpolation import calls, escape, resolve, unescape
from moelab.config.scalars import Literal, Plain
from moelab.errors import ConfigError

TREE: dict[str, Any] = {
    "steps": 30, "name": "moe", "plain": Plain("0123"), "list": ["a", "b"],
    "section": {"rate": 0.5, "up": "${..steps}", "beside": "${.rate}"},
}  # fmt: skip
EXPRESSIONS = [
    "${steps}", "${section.rate}", "x-${name}-${steps}", "${list}", "${list.1}", "${list[0]}", "${section}",
    "a\\${steps}",
    "a\\\\${steps}", "\\${steps} and ${steps}", "${oc.env:MOELAB_TEST}", "${oc.env:MOELAB_NONE,7}",
    "${oc.decode:'[1, 2]'}",
    "${${key_of}}", "no \\ interpolation", "c:\\dir\\${steps}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_TEST", "secret")
    monkeypatch.delenv("MOELAB_NONE", raising=False)


def _resolve(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    return resolve(tree, tree)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_value_is_what_omegaconf_makes_of_it(expression: str) -> None:
    tree = TREE | {"key_of": "steps", "value": expression, "plain": "0123"}
    expected = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    assert isinstance(expected, dict)
    if "${" in expression:
        assert _resolve(tree)[0] == expected


def test_a_reference_brings_the_characters_of_what_it_names() -> None:
    found = _resolve(TREE | {"value": "${plain}", "longer": "v${plain}"})[0]
    assert (found["value"], type(found["value"]), found["longer"]) == ("0123", Plain, "v0123")


def test_only_what_asks_the_environment_is_remembered() -> None:
    tree = {"a": "${b}", "b": "x/${oc.env:MOELAB_TEST}", "c": ["${steps}", "${a}"], "steps": 3, "d": "a: ${steps} {:}"}
    found, outside = _resolve(tree)
    assert found == {"a": "x/secret", "b": "x/secret", "c": [3, "x/secret"], "steps": 3, "d": "a: 3 {:}"}
    assert outside == {("a",): "${b}", ("b",): "x/${oc.env:MOELAB_TEST}", ("c", "1"): "${a}"}


def test_a_default_that_hides_a_missing_variable_is_remembered_too() -> None:
    tree = {"a": "${oc.env:MOELAB_NONE,3}", "b": "${oc.select:a,4}"}
    assert set(_resolve(tree)[1]) == {("a",), ("b",)}


def test_text_of_data_is_not_resolved_and_can_be_named() -> None:
    tree = {"a": Literal("${oc.env:MOELAB_TEST}"), "b": "<${a}>"}
    assert _resolve(tree) == ({"a": "${oc.env:MOELAB_TEST}", "b": "<${oc.env:MOELAB_TEST}>"}, {})


@pytest.mark.parametrize(
    "broken",
    ["${", "${}", "${nope}", "${value}", "${foo:bar}", "${oc.env:MOELAB_NONE}", "${a" * 400, "${list.9}", "${list.x}"],
)
def test_what_can_not_be_resolved_names_its_key(broken: str) -> None:
    with pytest.raises(ConfigError, match=r"^section\.value: can't resolve") as caught:
        _resolve({"section": {"value": broken}, "list": ["a"], "value": "${section.value}"})
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["${a}", "\\${a}", "\\\\${a}", "\\\\\\${a}${b}", "a\\b${", "plain", "$${a}", "\\"])
def test_an_escaped_text_is_itself_again_here_and_in_omegaconf(text: str) -> None:
    assert unescape(escape(text)) == text
    assert OmegaConf.create({"k": escape(text)}).k == text
    assert unescape(text.replace("\\", "")) == text.replace("\\", "")  # nothing to undo: the characters stay


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("${a.b}", False),
        ("a:${b}:c", False),
        ("${oc.env:X}", True),
        ("${${a}:X}", True),
        ("{:}", False),
        ("${a}${b:c}", True),
    ],
)
def test_a_call_is_told_from_a_reference(text: str, answer: bool) -> None:
    assert calls(text) is answer
