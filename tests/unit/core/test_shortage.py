"""Whoever says that memory or disk ran out, and in whatever words, it is told in one line."""

from __future__ import annotations

import errno
import subprocess
import sys

import numpy as np
import pytest
import torch

from moelab.errors import CheckpointError
from moelab.shortage import DISK, FILE_SIZE, MEMORY, THREADS, Shortage, shortage, size


def _raised(call: object) -> BaseException:
    try:
        call()  # type: ignore[operator]
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (MemoryError(), Shortage(MEMORY)),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
            Shortage(MEMORY, 20 << 30),
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), Shortage(MEMORY)),
        (RuntimeError("can't start new thread"), Shortage(THREADS)),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), Shortage(DISK, file="a/b")),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), Shortage(DISK)),
        (OSError(errno.EFBIG, "File too large"), Shortage(FILE_SIZE)),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Shortage(MEMORY)),
        (ValueError("I/O error: No space left on device (os error 28)"), Shortage(DISK)),
        (OSError(errno.ENOENT, "No such file"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("x"), None),
    ],
    ids=repr,
)
def test_what_ran_out_is_known(error: BaseException, found: Shortage | None) -> None:
    assert shortage(error) == found


def test_torch_and_numpy_say_what_they_asked_for() -> None:
    """Their own words, not ours: 2^55 bytes, which no machine has."""
    assert shortage(_raised(lambda: torch.empty(1 << 53))) == Shortage(MEMORY, 1 << 55)
    found = shortage(_raised(lambda: np.empty(1 << 55, np.uint8)))
    assert found is not None
    assert found.asked == 1 << 55


def test_an_error_raised_from_a_shortage_is_one() -> None:
    error = CheckpointError("can't be written")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert shortage(error) == Shortage(DISK)


def test_it_needs_no_torch() -> None:
    code = "import sys, moelab.shortage; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sizes_have_few_digits() -> None:
    assert [size(count) for count in (900, 1.5e6, 2.34e9, 7e13)] == ["0.9 kB", "1.5 MB", "2.3 GB", "70.0 TB"]
