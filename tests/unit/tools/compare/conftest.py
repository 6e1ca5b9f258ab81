"""Run folders to compare, written on demand."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """make_run("name", quality=..., ...) -> a run folder; the fields are those of make_runs.FakeRun."""
    return _maker(tmp_path)


@pytest.fixture(scope="module")
def make_shared_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """The same for runs that all tests of a file only read."""
    return _maker(tmp_path_factory.mktemp("shared"))


def _maker(folder: Path) -> MakeRun:
    path = Path(__file__).with_name("make_runs.py")
    spec = importlib.util.spec_from_file_location("moelab_make_runs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)

    def make(name: str, **fields: Any) -> Path:
        made: Path = module.write_run(folder / "runs", module.FakeRun(name, **fields))
        return made

    return make
