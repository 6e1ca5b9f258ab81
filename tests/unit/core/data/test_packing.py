"""Packed sequences hold whole documents where they fit, and a packed document is the same as one alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.data.batches import TrainBatches, ValidationBatches
from moelab.data.corpus import TokenStream
from moelab.data.mixed_batches import MixedBatches
from moelab.data.mixing import Mixer, Phase
from moelab.data.packing import PACKINGS, BestFitBatches, ConcatBatches, PackedBatches
from moelab.errors import DataError
from moelab.nn.transformer import TokenContext

LENGTHS = [9, 4, 21, 6, 3, 7, 10, 2, 5, 13]  # 80 tokens
SIZE = 10
REGISTRY = moelab.Registry(entry_points=False)


def stream(lengths: list[int] = LENGTHS) -> TokenStream:
    """Tokens 1, 2, 3, ...: each tells its place."""
    count = len(lengths)
    starts = np.cumsum([0, *lengths]).astype(np.int64)
    return TokenStream(np.arange(1, starts[-1] + 1), starts, np.arange(count) % 2, [f"d{i}" for i in range(count)])


def epoch(batches: Any) -> Any:
    return batches.batch(0)


@pytest.mark.parametrize("kind", [ConcatBatches, BestFitBatches])
def test_an_epoch_reads_each_token_once(kind: type[PackedBatches]) -> None:
    windows = kind(stream(), 1, SIZE, 3).windows
    batches = kind(stream(), windows, SIZE, 3)
    for step in (0, 1):
        batch = batches.batch(step)
        real = batch.input_ids if batch.attention_mask is None else batch.input_ids[batch.attention_mask]
        assert sorted(real.flatten().tolist()) == list(range(1, 81))
    assert not torch.equal(batches.batch(0).input_ids, batches.batch(1).input_ids)
    assert torch.equal(batches.batch(1).input_ids, kind(stream(), windows, SIZE, 3).batch(1).input_ids)


def test_best_fit_cuts_only_what_is_too_long() -> None:
    """21 and 13 tokens leave 1 and 3 behind full sequences; of those that fit every one is whole."""
    batches = BestFitBatches(stream(), 1, SIZE, 0)
    pieces = [piece for row in batches.sequences for piece in row]
    for document, length in enumerate(LENGTHS):
        parts = sorted(end - begin for which, begin, end in pieces if which == document)
        assert parts == ([length] if length <= SIZE else sorted([*[10] * (length // 10), length % 10]))
    rows = sorted(sum(end - begin for _, begin, end in row) for row in batches.sequences)
    assert rows == [10] * 8  # 80 tokens, and not a place is left
    fill = batches.fill
    assert (fill.fill_rate, fill.documents_cut, fill.tokens_left_out) == (1.0, 2, 0.0)
    assert fill.tokens_cut_off == (11 + 3) / 80


def test_concat_is_full_and_says_what_it_cuts() -> None:
    batches = ConcatBatches(stream([*LENGTHS, 7]), 2, SIZE, 5)
    fill = batches.fill
    assert (batches.windows, fill.fill_rate) == (8, 1.0)
    assert fill.tokens_left_out == pytest.approx(7 / 87)
    whole = sum(
        any(piece == (d, begin, begin + length) for place in range(8) for piece in batches.pieces_of(0, place))
        for d, (begin, length) in enumerate(zip(batches.stream.document_starts, [*LENGTHS, 7], strict=False))
    )
    assert fill.documents_cut == 11 - whole


@pytest.mark.parametrize("kind", [ConcatBatches, BestFitBatches])
@pytest.mark.parametrize("apart", [False, True])
def test_a_target_is_the_token_that_follows(kind: type[PackedBatches], apart: bool) -> None:
    """In its document, also where the sequence ends before it; behind a document the next one's, or none."""
    lengths = [6, 3, 8, 2, 12]
    text, ends = stream(lengths), set(np.cumsum(lengths).tolist())
    for row in range(kind(text, 1, SIZE, 1).windows):
        batch = kind(text, 1, SIZE, 1, apart=apart).batch(row)
        ids, targets = batch.input_ids[0].tolist(), batch.targets[0].tolist()
        real = SIZE if batch.attention_mask is None else int(batch.attention_mask.sum())
        for place in range(SIZE):
            follows = ids[place + 1] if place + 1 < real else -100
            expected = ids[place] + 1 if ids[place] not in ends else -100 if apart else follows
            assert targets[place] == (expected if place < real else -100)
        assert (batch.attention_id is not None) == apart


@pytest.mark.parametrize("name", PACKINGS)
def test_what_was_read_is_what_the_batches_held(name: str) -> None:
    text = stream([*LENGTHS, 7])
    batches = PACKINGS[name](text, 3, SIZE, 2)
    held: set[int] = set()
    for step in range(7):
        read = set(np.flatnonzero(batches.documents_read(step)).tolist())
        assert read >= held if name == "stream" else read == held
        held |= set(batches.batch(step).document_id.flatten().tolist())


def test_one_document_can_not_be_packed() -> None:
    with pytest.raises(DataError, match=r"data.packing: the training text is one document.*data.packing=stream"):
        BestFitBatches(stream([80]), 1, SIZE, 0)


def test_windows_apart_have_no_target_across_a_border() -> None:
    text = stream()
    batch = TrainBatches(text, 7, SIZE, 0, apart=True).batch(0)
    first = set(text.document_starts.tolist())
    ids = batch.input_ids
    assert torch.equal(
        batch.targets, torch.where(torch.tensor([[int(i) in first for i in r] for r in ids]), -100, ids + 1)
    )
    assert batch.attention_id is not None
    known = TokenStream(text.tokens, text.document_starts, text.document_domain, text.document_names, np.full(80, 3))
    for held in ValidationBatches(known, 4, SIZE, 4, apart=True):
        assert held.target_bytes is not None
        assert torch.equal(held.target_bytes, torch.where(held.targets >= 0, 3.0, 0.0).double())


def test_a_mixer_deals_windows_alone() -> None:
    """It says so of packing, and keeps documents apart like the rest."""
    text = stream()
    mixer = Mixer((Phase({"a": 0.5, "b": 0.5}),))
    batch = MixedBatches(text, ["a", "b"], mixer, 4, SIZE, 0, apart=True).batch(0)
    assert batch.attention_id is not None
    assert torch.equal(batch.attention_id, batch.document_id)
    ends = set((text.document_starts[1:]).tolist())
    assert [[int(i) in ends for i in row] for row in batch.input_ids] == (batch.targets < 0).tolist()


def model(attention: Any, router: str) -> Any:
    moe = MoEConfig(
        layout={"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        router={"name": router},
    )
    config = ModelConfig(
        vocab_size=90, hidden_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8, rope_theta=100.0, initializer_range=0.3, moe=moe,
        attention=attention,
    )  # fmt: skip
    return moelab.build_model(config, REGISTRY, seed=2).eval()


ATTENTIONS = [None, {"name": "sliding_window", "window": 4}, {"name": "dual_chunk"}]


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS, ids=["full", "sliding_window", "dual_chunk"])
def test_packed_losses_are_those_of_each_document_alone(attention: Any) -> None:
    text, net = stream(), model(attention, "softmax_topk")
    batches = BestFitBatches(text, 8, 24, 0, apart=True)
    batch = batches.batch(0)
    context = TokenContext(batch.document_id, attention_id=batch.attention_id)
    packed = net(batch.input_ids, batch.attention_mask, targets=batch.targets, tokens=context).token_loss
    assert batch.attention_mask is not None
    for row, pieces in enumerate(batches.rows(0)[: batches.windows]):
        at = 0
        for _, begin, end in pieces:
            ids = torch.from_numpy(text.tokens[begin:end])[None]
            if end - begin > 1:
                alone = net(ids[:, :-1], targets=ids[:, 1:]).token_loss[0]
                torch.testing.assert_close(packed[row, at : at + end - begin - 1], alone, atol=2e-5, rtol=1e-4)
            at += end - begin


DROPLESS = ["softmax_topk", "sigmoid_topk", "top_p", "hash", "remoe", "null_experts"]


@torch.no_grad()
@pytest.mark.parametrize("router", DROPLESS)
def test_a_document_is_the_same_whatever_lies_beside_it(router: str) -> None:
    for attention in ATTENTIONS:
        net = model(attention, router)
        ids = torch.randint(0, 90, (1, 30), generator=torch.Generator().manual_seed(7))
        context = TokenContext(attention_id=torch.tensor([[0] * 13 + [1] * 9 + [2] * 8]))
        before = net(ids, tokens=context).logits
        ids[:, 13:22] = (ids[:, 13:22] + 17) % 90
        after = net(ids, tokens=context).logits
        assert (after[:, 13:22] - before[:, 13:22]).abs().max() > 1e-3
        # Experts get other numbers of rows, whose products round otherwise; a leak moves as much as the change does.
        torch.testing.assert_close(after[:, :13], before[:, :13], atol=5e-5, rtol=0)
        torch.testing.assert_close(after[:, 22:], before[:, 22:], atol=5e-5, rtol=0)
