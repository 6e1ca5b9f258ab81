"""The documentation of plugins does what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moelab import Registry
from moelab.hookspecs import ACTIVATIONS, BALANCE_LOSSES, EXPERT_LAYOUTS, ROUTERS, SHARED_EXPERTS
from moelab_tools.describe_plugins import describe_point
from moelab_tools.plugin_pages import pages


def _blocks(root: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (root / "docs/plugins.md").read_text(), re.DOTALL)


def test_the_documented_router_is_short(root: Path) -> None:
    lines = [line for line in _blocks(root, "python")[0].splitlines() if line.strip()]
    assert len(lines) <= 25
    assert f"A router in {len(lines)} lines" in (root / "docs/plugins.md").read_text()


def test_the_documented_router_conforms_and_is_listed(root: Path, tmp_path: Path) -> None:
    """From a plain module in the current folder, as the page says."""
    source, check = _blocks(root, "python")[:2]
    (tmp_path / "my_router.py").write_text(source)
    (tmp_path / "check.py").write_text(f"from my_router import *\n{check}")
    listing = [sys.executable, "-m", "moelab", "plugins", "plugins=[my_router]", "--json"]
    for command in ([sys.executable, "check.py"], listing):
        outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert outcome.returncode == 0, outcome.stderr
    assert '"owner": "my_router"' in outcome.stdout
    assert '"comment": "of the softmax; higher is flatter"' in outcome.stdout


@pytest.mark.parametrize(
    ("hook", "check"),
    [
        ("moelab_observers", "check_observer(component)"),
        ("moelab_activations", "check_activation(component)"),
        ("moelab_data_sources", "check_data_source(component, {'file': 'rows.txt'})"),
        ("moelab_balance_losses", "check_balance_loss(component, balanced=0.0)"),
    ],
)
def test_the_documented_parts_of_other_kinds_conform(hook: str, check: str, root: Path, tmp_path: Path) -> None:
    (source,) = (block for block in _blocks(root, "python") if f"def {hook}" in block)
    (tmp_path / "rows.txt").write_text("".join(f"Row {n} says {n * n}.\n" for n in range(40)))
    (tmp_path / "check.py").write_text(f"{source}\nfrom moelab.testing import *\n(component,) = {hook}()\n{check}\n")
    outcome = subprocess.run([sys.executable, "check.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("name", sorted(pages()))
def test_a_generated_page_is_up_to_date(root: Path, name: str) -> None:
    found = (root / "docs/plugins" / name).read_text()
    assert found == pages()[name], "run: python -m moelab_tools.plugin_pages docs/plugins"


@pytest.mark.parametrize(
    "point", [ROUTERS, BALANCE_LOSSES, EXPERT_LAYOUTS, SHARED_EXPERTS, ACTIVATIONS], ids=lambda p: p.hook
)
def test_every_builtin_says_source_use_and_cost(point: object) -> None:
    for entry in describe_point(Registry(entry_points=False), point):  # type: ignore[arg-type]
        assert {"Source", "Use", "Cost"} <= entry.sections.keys(), entry.name
        assert all(option.comment for option in entry.options if option.name not in UNCOMMENTED), entry.name


UNCOMMENTED = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "weight", "norm_topk_prob"}
