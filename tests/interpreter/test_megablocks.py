"""The real MegaBlocks and stk without a GPU, each way in a process of its own.

`make setup-megablocks` installs them beside torch. Where MOELAB_REQUIRE_MEGABLOCKS=1 (CI), missing ones fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from moelab_plugins.expert_backends._megablocks_install import missing
from triton_process import interpreter_works, need, run

pytestmark = pytest.mark.interpreter


@interpreter_works
def test_the_kernels_agree_with_the_reference_under_the_interpreter() -> None:
    need(missing())
    run("interpreted_checks.py", TRITON_INTERPRET="1")


def test_every_kernel_compiles_for_hopper_without_16_bit_index_products(tmp_path: Path) -> None:
    need(missing())
    run("compile_checks.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
