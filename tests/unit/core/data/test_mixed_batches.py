"""The order of a mixture: shares as asked at any step, each domain in epochs of its own, of seed and step alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from moelab.data.corpus import TokenStream
from moelab.data.mixed_batches import MixedBatches
from moelab.data.mixing import CYCLE, Mixer, Phase
from moelab.errors import ConfigError, DataError

NAMES = ["code", "maths", "prose"]
LENGTHS = np.random.default_rng(0).integers(5, 60, 90)
DOMAIN = np.arange(90) % 7 % 3  # documents of several domains lie between each other


def stream() -> TokenStream:
    """Token n at position n, so that a batch says where it was read."""
    total = int(LENGTHS.sum())
    return TokenStream(
        tokens=np.arange(total, dtype=np.int32),
        document_starts=np.cumsum([0, *LENGTHS]).astype(np.int64),
        document_domain=DOMAIN.astype(np.int64),
        document_names=[f"d{n}" for n in range(len(LENGTHS))],
    )


def mixed(*phases: Phase, seed: int = 1, batch_size: int = 6, sequence_length: int = 8) -> MixedBatches:
    return MixedBatches(stream(), NAMES, Mixer(phases), batch_size, sequence_length, seed)


def text_of(domain: int) -> np.ndarray:
    starts = np.cumsum([0, *LENGTHS])
    return np.concatenate([np.arange(starts[d], starts[d + 1]) for d in np.flatnonzero(domain == DOMAIN)])


WEIGHTS: Mapping[str, float] = {"code": 0.5, "maths": 0.2, "prose": 0.3}


def test_every_window_is_a_piece_of_one_domains_text_with_its_targets_one_to_the_right() -> None:
    batches = mixed(Phase(WEIGHTS))
    for step in range(40):
        batch = batches.batch(step)
        assert batch.input_ids.shape == batch.targets.shape == (6, 8)
        for row in range(6):
            (domain,) = batch.domain_id[row].unique().tolist()
            read = torch.cat([batch.input_ids[row], batch.targets[row, -1:]]).numpy()
            assert torch.equal(batch.input_ids[row, 1:], batch.targets[row, :-1])
            text = text_of(domain)
            begin = int(np.flatnonzero(text == read[0])[0])
            assert np.array_equal(read, text[begin : begin + 9]) and begin % 8 == 0
        expected = stream().document_of(batch.input_ids.numpy())
        assert np.array_equal(batch.document_id.numpy(), expected)


def test_the_shares_are_kept_at_every_step_to_the_windows_that_do_not_divide() -> None:
    batches = mixed(Phase(WEIGHTS))
    counted = np.zeros(3, np.int64)
    for step in range(1, 500):
        counted += np.bincount(batches.windows_of(step - 1)[0], minlength=3)
        assert np.array_equal(counted, batches.dealt(step))
        assert np.abs(counted - 6 * step * np.array([0.5, 0.2, 0.3])).max() <= 2
    assert batches.account(499)["maths"]["read"] == pytest.approx(0.2, abs=0.001)


def test_an_odd_share_is_met_over_a_cycle_and_the_smallest_is_not_lost() -> None:
    wanted = {"code": 1 / 3, "maths": 1e-9, "prose": 2 / 3}
    dealt = mixed(Phase(wanted), batch_size=100).dealt(3 * CYCLE // 100)
    assert dealt.sum() == 3 * CYCLE and dealt[1] == 3
    assert np.abs(dealt / dealt.sum() - np.array([1 / 3, 0, 2 / 3])).max() <= 1e-4


def test_each_domain_is_read_in_epochs_of_its_own_in_another_order_each_time() -> None:
    batches = mixed(Phase(WEIGHTS))
    windows: list[list[int]] = [[], [], []]
    for step in range(250):
        for domain, window in zip(*batches.windows_of(step), strict=True):
            windows[domain].append(int(window))
    for domain, read in enumerate(windows):
        size = batches.windows[domain]
        epochs = [read[begin : begin + size] for begin in range(0, len(read) - size + 1, size)]
        assert len(epochs) >= 2 and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]
        assert batches.epochs(250)[domain] == len(read) / size


def test_an_account_of_later_steps_leaves_out_what_was_read_before_them() -> None:
    batches = mixed(Phase({"code": 1.0}, until=10), Phase({"code": 1.0, "prose": 3.0}))
    late = batches.account(30, first=20)
    assert late["code"]["asked"] == pytest.approx(0.25)
    assert late["prose"]["read"] == pytest.approx(0.75, abs=0.05)
    whole, early = batches.account(30), batches.account(20)
    assert late["code"]["epochs"] == pytest.approx(whole["code"]["epochs"] - early["code"]["epochs"])


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    walked = mixed(Phase(WEIGHTS))
    for step in range(20):
        last = walked.batch(step)
    assert torch.equal(last.input_ids, mixed(Phase(WEIGHTS)).batch(19).input_ids)
    assert not torch.equal(last.input_ids, mixed(Phase(WEIGHTS), seed=2).batch(19).input_ids)


def test_phases_follow_each_other_and_a_domain_goes_on_where_it_was() -> None:
    first, second = {"code": 1.0}, {"code": 1.0, "prose": 3.0}
    batches = mixed(Phase(first, until=3), Phase(second))
    assert set(batches.windows_of(2)[0]) == {0} and set(batches.windows_of(3)[0]) == {0, 2}
    assert batches.dealt(3).tolist() == [18, 0, 0]
    assert batches.dealt(103).sum() == 618 and abs(batches.dealt(103)[2] - 450) <= 2
    assert batches.asked(103) == pytest.approx([(3 + 100 * 0.25) / 103, 0, 75 / 103])
    alone = mixed(Phase(first))
    read = [w for step in range(30) for d, w in zip(*batches.windows_of(step), strict=True) if d == 0]
    unbroken = [w for step in range(30) for w in alone.windows_of(step)[1]]
    assert read == unbroken[: len(read)]


@pytest.mark.parametrize("steps", [0, 1, 4, 30])
def test_the_documents_that_were_read_are_those_of_which_a_token_was_in_a_batch(steps: int) -> None:
    batches = mixed(Phase(WEIGHTS, until=2), Phase({"prose": 1.0}))
    seen = np.zeros(len(LENGTHS), bool)
    for step in range(steps):
        batch = batches.batch(step)
        tokens = torch.cat([batch.input_ids, batch.targets[:, -1:]], 1).numpy()
        seen[np.unique(stream().document_of(tokens))] = True
    assert np.array_equal(batches.documents_read(steps), seen)


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([Phase({"cod": 1.0})], "no domain 'cod' in the training text, did you mean 'code'"),
        ([Phase({"code": -1.0})], "the weight of 'code' is -1.0"),
        ([Phase({"code": float("nan")})], "the weight of 'code' is nan"),
        ([Phase({"code": 0.0})], "every weight is 0"),
        ([], "the last one, and no other, goes on to the end"),
        ([Phase({"code": 1.0}, until=4)], "the last one, and no other, goes on to the end"),
        ([Phase({"code": 1.0}, 4), Phase({"code": 1.0}, 4), Phase({"code": 1.0})], "each ends later than"),
    ],
)  # fmt: skip
def test_what_can_not_be_served_is_refused_by_name(phases: list[Phase], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        mixed(*phases)


def test_a_domain_without_one_whole_window_is_refused_where_it_is_asked_for() -> None:
    length = len(text_of(2))
    assert length < min(len(text_of(0)), len(text_of(1)))
    mixed(Phase({"code": 1.0}), sequence_length=length)
    with pytest.raises(DataError, match=f"domain 'prose' is asked for and has {length} training tokens"):
        mixed(Phase(WEIGHTS), sequence_length=length)


def test_shares_recounted_from_the_tokens_are_those_asked_for_whatever_step_is_asked_for_first() -> None:
    """Eight domains of uneven sizes and weights, two phases, 1,000 steps; windows come many steps together."""
    chance, names = np.random.default_rng(0), [f"d{n}" for n in range(8)]
    lengths = chance.integers(30, 400, 160)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    text = TokenStream(np.arange(starts[-1]), starts, np.arange(160) % 8, [f"{n}" for n in range(160)])
    first, then = ({name: 1 / (n + 1.3) ** power for n, name in enumerate(names)} for power in (1, -1))
    mixer = Mixer([Phase(first, until=333), Phase(then)])
    batches = MixedBatches(text, names, mixer, 6, 8, 0)
    counted = np.zeros(8)
    for step in range(1000):
        counted += np.bincount(text.document_domain[text.document_of(batches.batch(step).input_ids.numpy())].ravel(),
                               minlength=8)  # fmt: skip
    assert np.abs(counted / counted.sum() - batches.asked(1000)).max() < 0.005
    for step in (999, 332, 333, 0, 64, 700, 320):
        fresh = MixedBatches(text, names, mixer, 6, 8, 0)
        assert all(np.array_equal(a, b) for a, b in zip(fresh.windows_of(step), batches.windows_of(step), strict=True))
