"""The order of reading: pure in (seed, step), every token once an epoch, domains held out fairly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moelab.data.batches import Batch, TrainBatches, ValidationBatches, read_windows
from moelab.data.corpus import TokenStream
from moelab.errors import DataError


def stream(lengths: list[int], domains: list[int] | None = None) -> TokenStream:
    """Token i is the number i, so that a batch shows where it was read."""
    total = sum(lengths)
    return TokenStream(
        tokens=np.arange(total, dtype=np.int32),
        document_starts=np.cumsum([0, *lengths]),
        document_domain=np.array(domains or [0] * len(lengths)),
        document_names=[f"d{n}" for n in range(len(lengths))],
        token_bytes=np.arange(total, dtype=np.uint16),
    )


def equal(left: Batch, right: Batch) -> bool:
    return torch.equal(left.input_ids, right.input_ids) and torch.equal(left.targets, right.targets)


def test_targets_stand_one_to_the_right() -> None:
    batch = TrainBatches(stream([50, 51]), batch_size=4, sequence_length=10, seed=0).batch(0)
    assert batch.input_ids.shape == batch.targets.shape == (4, 10)
    assert batch.input_ids.dtype == batch.targets.dtype == batch.domain_id.dtype == torch.int64
    assert torch.equal(batch.targets, batch.input_ids + 1)
    assert batch.attention_mask is None


def test_each_epoch_reads_every_target_once_in_an_order_of_its_own() -> None:
    batches = TrainBatches(stream([101]), batch_size=5, sequence_length=10, seed=0)
    assert batches.tokens_per_epoch == 100
    epochs = [torch.cat([batches.batch(2 * epoch + half).targets for half in (0, 1)]) for epoch in (0, 1)]
    for epoch in epochs:
        assert torch.equal(epoch.flatten().sort().values, torch.arange(1, 101))
    assert not torch.equal(epochs[0], epochs[1])


def test_nothing_repeats_when_an_epoch_ends_inside_a_batch() -> None:
    batches = TrainBatches(stream([71]), batch_size=3, sequence_length=10, seed=4)  # seven windows
    order = np.concatenate([batches.window_ids(step) for step in range(7)])
    for epoch in range(3):
        assert sorted(order[7 * epoch : 7 * epoch + 7]) == list(range(7))


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    text = stream([1000])
    walked = TrainBatches(text, 4, 16, seed=3)
    for step in range(20):
        last = walked.batch(step)
    assert equal(last, TrainBatches(text, 4, 16, seed=3).batch(19))
    assert not equal(last, TrainBatches(text, 4, 16, seed=4).batch(19))


def test_the_same_tokens_follow_in_the_same_order_whatever_the_batch_size() -> None:
    text = stream([1000])
    large, small = TrainBatches(text, 8, 16, seed=3), TrainBatches(text, 2, 16, seed=3)
    assert torch.equal(large.batch(1).input_ids, torch.cat([small.batch(step).input_ids for step in range(4, 8)]))


def test_every_token_carries_its_document_and_domain() -> None:
    text = stream([3, 4, 94], [1, 0, 2])
    batch = read_windows(text, np.array([0]), 10, measure=True)
    assert batch.document_id.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]]
    assert batch.domain_id.tolist() == [[1, 1, 1, 0, 0, 0, 0, 2, 2, 2]]
    assert batch.target_document_id is not None
    assert batch.target_document_id.tolist() == [[0, 0, 1, 1, 1, 1, 2, 2, 2, 2]]
    assert batch.target_bytes is not None
    assert torch.equal(batch.target_bytes, batch.targets.double())


def test_split_and_to_keep_every_field_that_is_there() -> None:
    whole = read_windows(stream([101]), np.arange(5), 10, measure=True)
    pieces = whole.split(2)
    assert [len(piece.input_ids) for piece in pieces] == [2, 2, 1]
    for name in ("input_ids", "targets", "document_id", "domain_id", "target_document_id", "target_bytes"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(whole, name))
    moved = whole.to("meta")
    assert moved.target_bytes is not None
    assert moved.target_bytes.device.type == moved.input_ids.device.type == "meta"
    assert moved.attention_mask is None


def test_held_out_windows_never_overlap_and_never_change() -> None:
    text = stream([301])
    batches = ValidationBatches(text, sequences=7, sequence_length=10, batch_size=3)
    first, again = list(batches), list(batches)
    assert [len(batch.input_ids) for batch in first] == [3, 3, 1]
    assert len(batches) == 3
    targets = torch.cat([batch.targets.flatten() for batch in first])
    assert len(targets.unique()) == 70
    assert all(equal(left, right) for left, right in zip(first, again, strict=True))
    assert np.array_equal(batches.windows, np.array([0, 4, 8, 12, 17, 21, 25]))  # evenly over thirty


def test_domains_share_the_held_out_windows_and_take_turns() -> None:
    """A small domain gives all it has; the large ones share the rest equally."""
    text = stream([1000, 20, 500], [0, 1, 2])
    batches = ValidationBatches(text, sequences=20, sequence_length=10, batch_size=20)
    (batch,) = batches
    domain = batch.domain_id[:, 5]
    assert torch.bincount(domain).tolist() == [9, 2, 9]
    assert domain[:6].tolist() == [0, 1, 2, 0, 1, 2]


def test_windows_of_some_domains_alone_are_chosen_as_if_there_were_no_others() -> None:
    text = stream([1000, 20, 500, 300], [0, 1, 2, 1])
    batches = ValidationBatches(text, 20, 10, batch_size=20, among=np.array([False, True, True]))
    (batch,) = batches
    domain = batch.domain_id[:, 5]
    assert torch.bincount(domain).tolist() == [0, 10, 10]
    assert domain[:4].tolist() == [1, 2, 1, 2]
    assert batches.documents_scored()[0] == np.False_
    every = ValidationBatches(text, 20, 10, batch_size=20, among=np.ones(3, bool))
    assert np.array_equal(every.windows, ValidationBatches(text, 20, 10, batch_size=20).windows)
    with pytest.raises(DataError, match=r"evaluation\.domains: none of the held-out windows"):
        ValidationBatches(stream([100, 3], [0, 1]), 20, 10, batch_size=4, among=np.array([False, True]))


def test_all_windows_are_read_when_more_are_asked_for() -> None:
    batches = ValidationBatches(stream([50, 51], [0, 1]), sequences=99, sequence_length=10, batch_size=4)
    assert sorted(batches.windows) == list(range(10))


def test_byte_counts_can_come_from_the_vocabulary_or_be_unknown() -> None:
    tokens = np.array([0, 1, 2, 1, 2, 0], np.uint16)
    starts, domain = np.array([0, 6]), np.zeros(1, np.int64)
    known = TokenStream(tokens, starts, domain, ["d"], id_bytes=np.array([0.0, 4.5, 2.0]))
    (batch,) = ValidationBatches(known, 1, 5, 1)
    assert batch.target_bytes is not None
    assert batch.target_bytes.tolist() == [[4.5, 2.0, 4.5, 2.0, 0.0]]
    (batch,) = ValidationBatches(TokenStream(tokens, starts, domain, ["d"]), 1, 5, 1)
    assert batch.target_bytes is None


def test_a_text_shorter_than_a_sequence_is_refused_with_the_longest_that_fits() -> None:
    assert TrainBatches(stream([11]), 1, 10, 0).windows == 1
    with pytest.raises(DataError, match=r"training text has 10 tokens.*at most 9"):
        TrainBatches(stream([10]), 1, 10, 0)
    with pytest.raises(DataError, match=r"held-out text.*validation_fraction"):
        ValidationBatches(stream([10]), 1, 10, 1)


def test_a_memmap_of_a_billion_tokens_is_only_sliced(tmp_path: Path) -> None:
    """A sparse file: reading it whole would take minutes and more memory than there is."""
    size = 2**32
    tokens = np.memmap(tmp_path / "tokens.bin", np.uint16, "w+", shape=(size,))
    text = TokenStream(tokens, np.array([0, size]), np.zeros(1, np.int64), ["d"])
    batches = TrainBatches(text, 8, 512, seed=0)
    assert batches.tokens_per_epoch == (size - 1) // 512 * 512
    assert batches.batch(10**6).input_ids.shape == (8, 512)
    assert np.diff(np.sort(batches.window_ids(0))).max() > 2**16  # spread over all of it
