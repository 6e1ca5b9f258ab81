"""The marks that transformers' own tests carry, known here where they are run (test_transformers_mixins.py)."""

from __future__ import annotations

import os

import pytest

THEIRS = (
    "accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "flash_attn_all_test", "generate",
    "torch_compile_test", "torch_export_test", "training_ci", "tensor_parallel_ci", "not_device_test", "order",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if "MOELAB_TRANSFORMERS_CHECKOUT" in os.environ:
        for name in THEIRS:
            config.addinivalue_line("markers", f"{name}: of transformers' own tests")
