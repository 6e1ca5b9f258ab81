"""Shares that mixers reckon: by the formulas, and by what a package that does the same prints."""

from __future__ import annotations

from typing import Any

import pytest

from moelab import ConfigError, MixContext, Mixer, Registry
from moelab.hookspecs import MIXERS

REGISTRY = Registry(entry_points=False)
SIZES = {"a": 100, "b": 1600, "c": 100_000}


def build(name: str, sizes: dict[str, int] | None = None, planned: int = 1000, **options: Any) -> Mixer:
    return REGISTRY.build(MIXERS, {"name": name, **options}, MixContext(sizes or SIZES, planned), "data.mixer")


def shares(mixer: Mixer) -> dict[str, float]:
    (phase,) = mixer.phases
    total = sum(phase.weights.values())
    return {name: value / total for name, value in phase.weights.items()}


def test_balanced_is_unimax() -> None:
    """The figures of `unimax-sampling`'s page on PyPI: characters, a budget of 250e9, four epochs at most."""
    sizes = {"swe": 179955884499, "fas": 184595788282, "ekk": 42541080893, "isl": 10027573389, "fao": 549707867}
    printed = {"fao": 0.008795325872, "isl": 0.160441174224, "ekk": 0.2769211666346667, "swe": 0.27692116663466665,
               "fas": 0.27692116663466665}  # fmt: skip
    assert shares(build("balanced", sizes, 250_000_000_000, max_epochs=4)) == pytest.approx(printed, rel=1e-9)
    assert shares(build("balanced", sizes, 1, max_epochs=4, tokens=250_000_000_000)) == pytest.approx(printed, rel=1e-9)


def test_balanced_without_a_limit_is_equal_and_under_one_that_all_reach_as_much_as_there_is() -> None:
    assert shares(build("balanced")) == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    found = shares(build("balanced", planned=10**9, max_epochs=2))
    assert found == pytest.approx({name: size / 101_700 for name, size in SIZES.items()})


def test_temperature_goes_from_what_there_is_towards_equal_shares() -> None:
    assert shares(build("temperature", temperature=1)) == pytest.approx({n: s / 101_700 for n, s in SIZES.items()})
    roots = {"a": 10, "b": 40, "c": 100_000**0.5}
    found = shares(build("temperature", temperature=2))
    assert found == pytest.approx({name: value / sum(roots.values()) for name, value in roots.items()})
    assert shares(build("temperature", temperature=1e9)) == pytest.approx(dict.fromkeys(SIZES, 1 / 3), rel=1e-6)


def test_weights_are_taken_as_they_are_phase_by_phase() -> None:
    assert build("weights", weights={"a": 3, "b": 1}).phases[0].weights == {"a": 3, "b": 1}
    phases = build("weights", phases=[{"until": 10, "weights": {"a": 1}}, {"weights": {"a": 1, "c": 2}}]).phases
    assert [(phase.until, dict(phase.weights)) for phase in phases] == [(10, {"a": 1}), (None, {"a": 1, "c": 2})]


def test_domains_that_a_pattern_names_share_as_if_there_were_no_others() -> None:
    sizes = {"code/no": 7, "code/yes": 100, "prose/no": 9, "prose/yes": 1600, "x": 100_000}
    among = {name: sizes[name] for name in ("code/yes", "prose/yes")}
    for name, options in (("temperature", {"temperature": 2}), ("balanced", {"max_epochs": 3})):
        found = shares(build(name, sizes, domains=["*/yes"], **options))
        assert found == pytest.approx(shares(build(name, among, **options)))
        assert list(shares(build(name, sizes, domains=["x", "code/no"], **options))) == ["code/no", "x"]
        with pytest.raises(ConfigError, match=r"no domain 'code/yea', did you mean 'code/yes'.*Domains: code/no, "):
            build(name, sizes, domains=["*/yes", "code/yea"], **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give `weights`, or `phases` that have them, and not both"),
        ({"weights": {"a": 1}, "phases": [{"weights": {"a": 1}}]}, "and not both"),
        ({"phases": [{"untl": 3, "weights": {"a": 1}}]}, r"phases\.0\.untl: no such key"),
        ({"phases": [{"until": 2.5, "weights": {"a": 1}}]}, r"phases\.0\.until: 2\.5 is no whole number"),
        ({"phases": [{"weights": {"a": "much"}}]}, r"phases\.0\.weights: .*is no table of domains and numbers"),
    ],
)
def test_weights_that_say_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build("weights", **options)
