"""Installed packages' entry points: found, imported only where they may offer what is needed, named when broken."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moelab.errors import ConfigError
from moelab.hookspecs import EXPERT_LAYOUTS, ROUTERS
from moelab.registry import Registry

# An installed module: it remembers that it was imported by being in sys.modules, and offers `{hook}`.
OFFER = """
import moelab
from dataclasses import dataclass

@dataclass
class Options:
    pass

def build(options, context):
    '''One more.'''

{extra}
@moelab.hookimpl({specname})
def {hook}():
    return [moelab.component("{name}", Options, build)]
"""
Install = Callable[..., None]


def offer(hook: str = "moelab_expert_layouts", name: str = "mine", specname: str = "", extra: str = "") -> str:
    return OFFER.format(hook=hook, name=name, specname=f"specname='{specname}'" if specname else "", extra=extra)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install("name", "module:attr", {"file.py": source}) makes a distribution with an entry point `plugin`."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(distribution: str, value: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[moelab]\nplugin = {value}\n")

    return make


def layouts() -> Registry:
    """What a command without models asks for."""
    return Registry(points=(EXPERT_LAYOUTS,))


def test_a_package_that_offers_nothing_needed_is_not_imported(install: Install) -> None:
    """Nor is its parent, whatever stands in there."""
    install(
        "heavy", "heavy_lab.routers", {"heavy_lab/__init__.py": "", "heavy_lab/routers.py": offer("moelab_routers")}
    )
    registry = layouts()
    assert not {"heavy_lab", "heavy_lab.routers"} & sys.modules.keys()
    with pytest.raises(
        ConfigError, match=r"Not imported, as no hook for this command stands in its source: .*heavy:plugin"
    ):
        registry.select(EXPERT_LAYOUTS, {"name": "mine"}, "x")
    assert "mine" in Registry().components(ROUTERS)


@pytest.mark.parametrize(
    ("value", "files"),
    [
        ("own", {"own.py": offer()}),
        ("own", {"own.py": offer("anything", specname="moelab_expert_layouts")}),
        ("own.hooks", {"own/__init__.py": "", "own/hooks.py": offer()}),
        ("own", {"own/__init__.py": "from own.hooks import moelab_expert_layouts", "own/hooks.py": offer()}),
        ("own", {"own/__init__.py": "from own.hooks import *", "own/hooks.py": offer()}),
        ("own:plugin", {"own/__init__.py": "import own.hooks as plugin", "own/hooks.py": offer()}),
    ],
    ids=["module", "specname", "submodule", "imported hook", "imported star", "object"],
)
def test_a_package_that_may_offer_it_is_imported(install: Install, value: str, files: dict[str, str]) -> None:
    install("own", value, files)
    assert "mine" in layouts().components(EXPERT_LAYOUTS)


def test_a_replacement_of_a_builtin_takes_effect_without_being_named(install: Install) -> None:
    replacement = offer(name="uniform").replace("build)", "build, overrides=True)")
    install("own", "own", {"own.py": replacement})
    assert layouts().components(EXPERT_LAYOUTS)["uniform"].owner == "own"


def test_two_packages_whose_entry_points_have_one_name_are_both_found(install: Install) -> None:
    install("first", "first", {"first.py": offer(name="one")})
    install("second", "second", {"second.py": offer(name="two")})
    assert {"one", "two"} <= layouts().components(EXPERT_LAYOUTS).keys()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (offer(extra="1 / 0"), "ZeroDivisionError"),
        ("def broken(:  # moelab_routers", "SyntaxError"),
        (offer(extra="import sys; sys.exit()"), "SystemExit"),
    ],
)
def test_a_broken_package_is_named_with_the_cure(install: Install, source: str, said: str) -> None:
    install("broken", "broken_lab", {"broken_lab.py": source})
    with pytest.raises(ConfigError, match=rf"'broken:plugin' \(broken_lab\).*{said}.*entry_points=false"):
        Registry()
    assert Registry(entry_points=False).components(ROUTERS)


def test_a_package_without_its_module_is_named(install: Install) -> None:
    install("broken", "not_there.hooks", {})
    with pytest.raises(ConfigError, match=r"'broken:plugin' \(not_there.hooks\).*ModuleNotFoundError"):
        layouts()
