"""Checksums: the published function, and the same value in whatever pieces the bytes come."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from moelab.checksums import checksum, checksum_of_span, running


def test_it_is_xxh3_with_128_bits() -> None:
    """The value of no bytes that xxHash publishes (xxhsum -H2 of an empty file)."""
    assert checksum(b"") == "99aa06d3014798d86001c324468d497f"


@pytest.mark.parametrize("keep_cached", [True, False])
@pytest.mark.parametrize(("offset", "size"), [(0, 0), (0, 5), (3, 1 << 20), (7, (2 << 20) + 11)])
def test_a_span_of_a_file_has_the_checksum_of_its_bytes(
    tmp_path: Path, offset: int, size: int, keep_cached: bool
) -> None:
    data = np.random.default_rng(0).integers(0, 256, (3 << 20) + 5, dtype=np.uint8).tobytes()
    (tmp_path / "file").write_bytes(data)
    pieces = running()
    for byte in range(offset, offset + size, 70_001):
        pieces.update(data[byte : min(byte + 70_001, offset + size)])
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        found = checksum_of_span(descriptor, offset, size, keep_cached=keep_cached)
        beyond = checksum_of_span(descriptor, len(data) - 5, 100)
    finally:
        os.close(descriptor)
    assert found == checksum(data[offset : offset + size]) == pieces.hexdigest()
    assert beyond == checksum(data[-5:])
