"""Hashes of content: what is equal, what differs, and that a piece at a time gives the same."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from moelab.data import identity
from moelab.data.identity import split_value, text_identity, token_identities


def test_the_identity_is_the_start_of_the_sha256_of_the_normalised_text() -> None:
    expected = int.from_bytes(hashlib.sha256(b"one two").digest()[:8], "big")
    assert text_identity("one two") == text_identity(" One\n\tTWO ") == expected
    assert text_identity("one, two") != expected


def test_split_values_are_uniform_and_independent_between_seeds() -> None:
    """4000 texts: 400 +- 19 (one standard deviation) fall below 0.1, 40 +- 6.3 of them under both seeds."""
    identities = [text_identity(f"text {n}") for n in range(4000)]
    below = [{i for i in identities if split_value(i, seed) < 0.1} for seed in (0, 1)]
    assert all(320 < len(found) < 480 for found in below)
    assert 10 < len(below[0] & below[1]) < 75


def documents(*rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([i for row in rows for i in row], np.uint16), np.cumsum([0, *map(len, rows)])


def test_token_documents_are_equal_wherever_they_stand_and_whether_ended_or_not() -> None:
    found = token_identities(*documents([1, 2, 3, 9], [3, 2, 1, 9], [1, 2, 3, 9], [2, 3, 9], [1, 2, 3]), 9)
    assert found[0] == found[2] == found[4]
    assert len(set(found.tolist())) == 3


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8])
def test_reading_by_pieces_changes_no_token_hash(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = documents([5, 6, 7, 8, 9], [5, 9], [9], [7, 7, 7, 7, 7, 7, 7, 9], [1])
    whole = token_identities(*given, 9)
    monkeypatch.setattr(identity, "CHUNK", chunk)
    assert token_identities(*given, 9).tolist() == whole.tolist()
