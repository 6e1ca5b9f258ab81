"""What a new component of each kind costs outside its own file: nothing but its entry in the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moelab.hookspecs import EXTENSION_POINTS, ExtensionPoint
from moelab.registry import Registry, builtin_modules

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = ("core", "plugins", "upcycling", "tools")
PLANTED = """
\"\"\"A component for a test.\"\"\"

from dataclasses import dataclass

import moelab


@dataclass
class Options:
    pass


def build(options, context):
    \"\"\"Planted.\"\"\"


@moelab.hookimpl
def {hook}():
    return [moelab.component("planted", Options, build)]
"""
LIST = """
import sys
from moelab.hookspecs import EXTENSION_POINTS
from moelab.registry import Registry
from moelab_tools.describe_plugins import describe_plugins
from moelab_tools.plugin_pages import pages
registry = Registry(entry_points=False)
assert [p.kind for p in EXTENSION_POINTS if "planted" not in registry.components(p)] == []
assert sum(entry.name == "planted" for entry in describe_plugins(registry)) == len(EXTENSION_POINTS)
assert sum("## planted" in page for page in pages().values()) == len(EXTENSION_POINTS)
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources."""
    copy = tmp_path_factory.mktemp("house")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_a_file_in_its_folder_is_all_that_a_component_needs(house: Path) -> None:
    """Known to the registry, to `moelab plugins` and to the generated pages without a line anywhere else."""
    for point in EXTENSION_POINTS:
        package, *rest = point.builtins.split(".")
        root = house / {"moelab_plugins": "plugins", "moelab_upcycling": "upcycling"}[package]
        (root / package / Path(*rest) / "planted.py").write_text(PLANTED.format(hook=point.hook).lstrip())
    done = subprocess.run(
        [sys.executable, "-c", LIST],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(house / folder) for folder in FOLDERS)},
        cwd=house,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("point", EXTENSION_POINTS, ids=lambda point: point.kind)
def test_no_source_names_the_file_of_a_component(point: ExtensionPoint[object, object]) -> None:
    """Lines outside its own file that know it; helpers that a component shares begin with an underscore."""
    modules = builtin_modules(point)
    assert modules
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            known = [module for module in modules if module in text and not path.match(f"*/{module.split('.')[-1]}.py")]
            assert not known, f"{path.relative_to(ROOT)} knows {known}"


def test_every_conformance_check_of_the_table_exists() -> None:
    import moelab.testing

    for point in EXTENSION_POINTS:
        assert not point.check or callable(getattr(moelab.testing, point.check)), point.kind


def test_a_registry_of_some_points_has_their_builtins_alone() -> None:
    some, other = EXTENSION_POINTS[0], EXTENSION_POINTS[1]
    registry = Registry(entry_points=False, points=[some])
    assert registry.components(some)
    assert not registry.components(other)
