"""A script of tests in a process of its own, since triton decides at its first import whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "interpreter"


def run(script: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / script)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def need(reason: str | None) -> None:
    """Skip for that reason, or fail where MOELAB_REQUIRE_MEGABLOCKS=1 (CI)."""
    if reason is not None:
        assert os.environ.get("MOELAB_REQUIRE_MEGABLOCKS") != "1", reason
        pytest.skip(reason)


def _of(package: str) -> tuple[int, ...]:
    """(major, minor) of what is installed; (0, 0) of what is not."""
    try:
        return tuple(int(number) for number in version(package).split(".")[:2])
    except PackageNotFoundError:
        return (0, 0)


interpreter_works = pytest.mark.skipif(
    (0, 0) < _of("triton") < (3, 7) and _of("numpy") >= (2, 4),
    reason="triton's interpreter before 3.7 makes numbers of arrays with one element, which NumPy refuses from 2.4 on: "
    "install numpy<2.4",
)
