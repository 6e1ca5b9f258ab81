"""The real MegaBlocks and stk without a GPU, each way in a process of its own: triton decides at its first import.

`make setup-megablocks` installs them beside torch. Where MOELAB_REQUIRE_MEGABLOCKS=1 (CI), missing ones fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from moelab_plugins.expert_backends._megablocks_install import missing

HERE = Path(__file__).parent

pytestmark = pytest.mark.interpreter


def _run(script: str, **environment: str) -> None:
    reason = missing()
    if reason is not None:
        assert os.environ.get("MOELAB_REQUIRE_MEGABLOCKS") != "1", reason
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / script)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _of(package: str) -> tuple[int, ...]:
    """(major, minor) of what is installed; (0, 0) of what is not."""
    try:
        return tuple(int(number) for number in version(package).split(".")[:2])
    except PackageNotFoundError:
        return (0, 0)


@pytest.mark.skipif(
    (0, 0) < _of("triton") < (3, 7) and _of("numpy") >= (2, 4),
    reason="triton's interpreter before 3.7 makes numbers of arrays with one element, which NumPy refuses from 2.4 on: "
    "install numpy<2.4",
)
def test_the_kernels_agree_with_the_reference_under_the_interpreter():
    _run("interpreted_checks.py", TRITON_INTERPRET="1")


def test_every_kernel_compiles_for_hopper_without_16_bit_index_products(tmp_path: Path):
    _run("compile_checks.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
