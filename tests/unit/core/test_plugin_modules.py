"""Which code a config's folder may run: the modules that `plugins` names, and no other file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moelab.errors import ConfigError
from moelab.paths import Places
from moelab.plugin_modules import import_plugin
from moelab.registry import Registry

PLUGIN = '''
"""A plugin."""
import moelab
from moelab.moe.layout import ExpertLayout
from dataclasses import dataclass


@dataclass
class Options:
    pass


def build(options, context):
    """For a test."""
    return None


{marker}
def {hook}():
    return [moelab.component("beside", Options, build)]
'''


def write(folder: Path, name: str, marker: str = "@moelab.hookimpl", hook: str = "moelab_expert_layouts") -> Path:
    path = folder / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PLUGIN.format(marker=marker, hook=hook))
    return path


def test_a_named_module_beside_the_config_is_found_and_the_path_stays_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, "beside_one")
    path, finders = list(sys.path), list(sys.meta_path)
    registry = Registry(["beside_one"], entry_points=False, places=Places(search=(tmp_path,)))
    assert any(name == "beside_one" for name, _ in registry.manager.list_name_plugin())
    assert (sys.path, sys.meta_path) == (path, finders)


def test_a_package_beside_the_config_finds_its_own_modules(tmp_path: Path) -> None:
    write(tmp_path / "beside_lab", "layouts")
    (tmp_path / "beside_lab" / "__init__.py").touch()
    (tmp_path / "beside_lab" / "layouts.py").open("a").write("\nfrom beside_lab import numbers\n")
    (tmp_path / "beside_lab" / "numbers.py").touch()
    assert import_plugin("beside_lab.layouts", [tmp_path]).numbers.__name__ == "beside_lab.numbers"


def test_a_neighbour_that_nobody_named_is_not_imported(tmp_path: Path) -> None:
    write(tmp_path, "beside_two").open("a").write("\nimport beside_helper\n")
    (tmp_path / "beside_helper.py").touch()
    with pytest.raises(ConfigError, match=r"needs the module 'beside_helper'.*put both into one package"):
        import_plugin("beside_two", [tmp_path])


def test_what_is_installed_is_not_shadowed(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise SystemExit('shadowed')")
    assert "site-packages" in str(import_plugin("click", [tmp_path]).__file__)


def test_two_files_of_one_name_are_not_mixed_up(tmp_path: Path) -> None:
    write(tmp_path / "a", "beside_three")
    write(tmp_path / "b", "beside_three")
    import_plugin("beside_three", [tmp_path / "a"])
    import_plugin("beside_three", [tmp_path / "a"])
    with pytest.raises(ConfigError, match="one process can have one module of a name"):
        import_plugin("beside_three", [tmp_path / "b"])


@pytest.mark.parametrize(
    ("marker", "hook", "words"),
    [
        ("", "moelab_expert_layouts", "moelab_expert_layouts lacks its marker"),
        ("", "moelab_expert_layout", "did you mean 'moelab_expert_layouts'"),
        ("", "layouts", "implements no hook"),
    ],
)
def test_a_module_that_is_no_plugin_is_refused(tmp_path: Path, marker: str, hook: str, words: str) -> None:
    write(tmp_path, "beside_four", marker, hook)
    with pytest.raises(ConfigError, match=words):
        Registry(["beside_four"], entry_points=False, places=Places(search=(tmp_path,)))


@pytest.mark.parametrize("name", ["", ".relative", "no_such_module_anywhere", "click.nothing"])
def test_a_name_that_is_no_module_is_one_message(name: str) -> None:
    with pytest.raises(ConfigError, match="plugins: "):
        import_plugin(name)


def test_optional_libraries_are_not_taken_from_the_configs_folder(tmp_path: Path) -> None:
    """torch, rich and sympy look for modules that are not installed; files of that name beside a config stay data."""
    for name in ("triton", "colorama", "gmpy2", "tabulate", "jax", "IPython", "tensorflow", "cupy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    write(tmp_path, "beside_five")
    code = (
        "import sys; from pathlib import Path; from moelab import Places, Registry; "
        f"Registry(['beside_five'], places=Places(search=(Path({str(tmp_path)!r}),))); "
        "import torch, rich.console, sympy, moelab.training.trainer; torch.compile; import torch._dynamo"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
