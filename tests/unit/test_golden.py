"""Every shipped config, fully resolved, is what tests/golden/ says: a changed default shows in a review."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from golden.write import DECLARATION, GOLDEN, ROOT

CONFIGS = [path for path in (ROOT / "configs").rglob("*.yaml") if path.name != DECLARATION]
NAMES = sorted(str(path.relative_to(ROOT / "configs")) for path in CONFIGS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documented command writes, elsewhere, without the environment of the tests."""
    folder = tmp_path_factory.mktemp("golden")
    command = [sys.executable, "tests/golden/write.py", str(folder)]
    outcome = subprocess.run(command, cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    return folder


def test_every_text_has_its_config() -> None:
    assert sorted(str(path.relative_to(GOLDEN)) for path in GOLDEN.rglob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_config_resolves_to_its_golden_text(name: str, written: Path) -> None:
    path = GOLDEN / name
    assert path.exists(), "run: python tests/golden/write.py"
    assert (written / name).read_text() == path.read_text(), "meant so? then run: python tests/golden/write.py"


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_text_names_no_place_of_a_machine(name: str, written: Path) -> None:
    text = (written / name).read_text()
    assert not any(f"{place}/" in text for place in (ROOT, Path.home(), written))
