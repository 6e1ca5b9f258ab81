"""Rows come to the file as the plan says, whichever way they are put together."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dense_checkpoints import Tiny, recipe_config, write_dense
from moelab.hf.files import StoredTensor
from moelab.initialisers import MATRICES, NO_SOURCE, NeuronPlan, redrawn_of
from moelab_upcycling.assembly import Scratch, assembled, made_rows
from moelab_upcycling.convert import prepare, registry_of
from moelab_upcycling.initialisers.experts.drop import DropExperts
from moelab_upcycling.initialisers.experts.svd import SVDExperts
from moelab_upcycling.maker import Maker
from moelab_upcycling.source import DenseSource

DENSE, WIDTH = 300, 260  # two slabs of rows and more, and two of columns and more


def joined(pieces: Any) -> Any:
    """A piece may be overwritten by the next."""
    return np.concatenate([piece.copy() for piece in pieces])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("order", ["shuffled", "in order, then new ones", "backwards, then new ones"])
def test_planned_rows_are_the_dense_ones_and_the_new_ones_in_their_places(order: str, share: float, turned: bool):
    random = np.random.default_rng(3)
    values = random.integers(0, 1 << 16, (DENSE, WIDTH)).astype(np.uint16)
    if order == "shuffled":
        source = random.permutation(DENSE)[:290].astype(np.int32)
        source[random.random(290) < 0.1] = NO_SOURCE
        redrawn = random.random(290) < share
    else:
        kept = np.arange(DENSE) if order.startswith("in") else np.arange(DENSE)[::-1]
        source = np.concatenate([kept, np.full(round(100 * share), NO_SOURCE)]).astype(np.int32)
        redrawn = source == NO_SOURCE
    plan = NeuronPlan(source, dict.fromkeys(MATRICES, redrawn))
    changed = redrawn | (source == NO_SOURCE)
    new = random.integers(0, 1 << 16, (int(changed.sum()), WIDTH)).astype(np.uint16)
    expected = values[source]
    expected[changed] = new
    wanted = expected.T if turned else expected
    made = joined(assembled(plan, "up", values, new, turned=turned, scratch=Scratch()))
    assert made.dtype == values.dtype
    assert np.array_equal(made, wanted)
    assert np.array_equal(joined(made_rows(expected, turned=turned, scratch=Scratch())), wanted)


def test_who_overrides_materialise_alone_is_asked_for_whole_matrices():
    class Louder(DropExperts):
        def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: Any) -> Any:
            return super().materialise(plan, expert, matrix, dense) * 2

    assert redrawn_of(DropExperts.__new__(DropExperts)) is not None
    assert redrawn_of(Louder.__new__(Louder)) is None
    assert redrawn_of(SVDExperts.__new__(SVDExperts)) is None


def test_a_layer_goes_with_its_matrices_when_the_next_one_is_begun(tmp_path: Path):
    """By counting references alone: a matrix that waits for the collector of cycles is 136 MB at 7B's width."""
    source = write_dense(tmp_path / "dense", Tiny(layers=2))
    config = recipe_config(source)
    registry = registry_of(config)
    plan = prepare(config, registry)
    maker = Maker(plan, registry, [DenseSource(source, registry)])
    layers: list[weakref.ref[Any]] = []
    gc.disable()
    try:
        for shard in plan.shards:
            for tensor in shard.tensors:
                for _ in maker.make(tensor):
                    pass
            if maker._layer is not None and (not layers or layers[-1]() is not maker._layer):
                layers.append(weakref.ref(maker._layer))
        assert len(layers) == 2
        assert layers[0]() is None
    finally:
        gc.enable()


def test_a_matrix_is_gone_before_the_next_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_dense(tmp_path / "dense", Tiny(layers=1))
    config = recipe_config(source)
    registry = registry_of(config)
    maker = Maker(prepare(config, registry), registry, [DenseSource(source, registry)])
    held: list[weakref.ref[Any]] = []
    read = DenseSource._read_rows

    def watched(self: DenseSource, tensor: StoredTensor, *rest: Any) -> None:
        assert ".mlp." not in tensor.name or all(one() is None for one in held), tensor.name
        read(self, tensor, *rest)

    monkeypatch.setattr(DenseSource, "_read_rows", watched)
    gc.disable()
    try:
        for tensor in [one for one in maker.plan.shards[0].tensors if one.role in ("expert", "shared")]:
            for _ in maker.make(tensor):
                pass
            assert maker._layer is not None
            matrix = maker._layer._held[0][1]
            if not held or held[-1]() is not matrix:
                held.append(weakref.ref(matrix))
            del matrix
    finally:
        gc.enable()
    assert len(held) == 3
