"""Our own triton kernels without a GPU, each way in a process of its own; triton comes with `make setup-megablocks`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from triton_process import interpreter_works, need, run

pytestmark = pytest.mark.interpreter
MISSING = None if importlib.util.find_spec("triton") else "triton is not installed; `make setup-megablocks` installs it"


@interpreter_works
def test_the_kernels_agree_with_float64_under_the_interpreter() -> None:
    need(MISSING)
    run("kernel_checks.py", TRITON_INTERPRET="1")


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    need(MISSING)
    run("kernel_compiles.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
