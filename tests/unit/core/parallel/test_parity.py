"""On 2 and 4 processes a step does what it does on one: losses, norms, counts, metrics and weights.

One test a world, since starting processes is what takes time. Faults that others have published show in it: an
auxiliary loss whose gradient is off by the number of expert-parallel ranks, experts' gradients scaled by another mesh
than the dense ones' (SGD hides neither, as Adam would), a clipping norm that leaves out a mesh (all norms here exceed
the bound), padding that counts in bias updates (a third of some sequences is).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import parallel_grid as grid
from processes import run_on

CLOSE = 2e-6  # sums of the same fp32 numbers in another order, over a few steps
EVERY = tuple(grid.MODELS)
FEW = (
    "quantile",
    "top_p",
    "weights",
    "densemixer",
)  # one of each kind: of a layout that others differ from in one thing


@pytest.mark.parametrize(
    ("world", "layouts", "checkpointing"),
    [
        (2, {"replicate2": EVERY, "shard2_micro": EVERY, "expert2": EVERY, "shard2": FEW, "shard2_kept": FEW}, False),
        (4, dict.fromkeys(("expert4", "shard4_expert2", "shard4_expert2_kept", "replicate2_expert2"), FEW), True),
    ],
    ids=["2 processes", "4 processes, layers checkpointed"],
)
def test_several_processes_do_what_one_does(
    world: int, layouts: dict[str, tuple[str, ...]], checkpointing: bool, tmp_path: Path
) -> None:
    ranks = run_on(world, grid.run_layouts, tmp_path, layouts, str(tmp_path), checkpointing)
    asked = {(name, grid.LAYOUTS[layout][1]) for layout, models in layouts.items() for name in models}
    wanted = {(name, micro): grid.steps(name, None, micro) for name, micro in sorted(asked)}
    for layout, models in layouts.items():
        for name in models:
            key, alone = f"{layout}-{name}", wanted[name, grid.LAYOUTS[layout][1]]
            assert all(rank[key] == ranks[0][key] for rank in ranks), f"{key}: ranks disagree"
            for found, expected in zip(ranks[0][key]["steps"], alone["steps"], strict=True):
                assert found["served"] == expected["served"], key
                assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=1e-6), key
                assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5), key
                assert found["routers"] == pytest.approx(expected["routers"], rel=1e-4, abs=1e-7), key
                assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-5), key
                for term, norms in expected["shares"].items():
                    assert found["shares"][term] == pytest.approx(norms, rel=1e-4, abs=1e-7), (key, term)
            weights = load_file(tmp_path / f"{key}.safetensors")
            assert weights.keys() == alone["weights"].keys()
            for tensor, value in alone["weights"].items():
                off = float((weights[tensor] - value).abs().max())
                assert off <= CLOSE, f"{key}: {tensor} differs by {off}"


ROUNDED = ("expert2", "softmax_global")


@pytest.fixture(scope="module")
def small_things(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[Any]], Path]:
    """(what each of 2 processes found of what takes no time beside starting them, where weights lie)."""
    folder = tmp_path_factory.mktemp("two")
    layout, name = ROUNDED
    asked = [
        ("run_layouts", [{layout: (name,)}, str(folder), False, "bfloat16"]),
        ("reductions", [[(4, "whole"), (1, "whole"), (1, "pieces")]]),
        ("poisoned_steps", [{"shard": 2, "expert": 2}]),
        ("refusals", []),
    ]
    return run_on(2, grid.several, folder, asked), folder


def test_in_bfloat16_processes_round_as_one_does(small_things: tuple[list[list[Any]], Path]) -> None:
    """Where experts are elsewhere a row is rounded before its weight is applied: as far off, and not the same."""
    (layout, name), (ranks, folder) = ROUNDED, small_things
    found = ranks[0][0]
    one, exact = (grid.steps(name, None, 2, dtype=dtype) for dtype in ("bfloat16", "float32"))
    rounding = _apart(one["weights"], exact["weights"])
    assert rounding > 10 * CLOSE  # it did compute in bfloat16
    assert _apart(load_file(folder / f"{layout}-{name}.safetensors"), exact["weights"]) <= 2 * rounding
    losses = zip(found[f"{layout}-{name}"]["steps"], one["steps"], strict=True)
    assert all(ours["losses"] == pytest.approx(theirs["losses"], rel=5e-3) for ours, theirs in losses)


def _apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max(float((ours[key] - value).abs().max()) for key, value in theirs.items())


def test_gradients_are_reduced_once_a_step_however_many_micro_batches(
    small_things: tuple[list[list[Any]], Path],
) -> None:
    whole, split, pieces = small_things[0][0][1]
    units = 2 + 1  # the layers and the root
    assert (whole, split, pieces) == (units, units, 4 * units)


def test_a_fault_of_one_process_is_told_by_all(small_things: tuple[list[list[Any]], Path]) -> None:
    found = [rank[2] for rank in small_things[0]]
    assert found[0] == found[1]
    forward, backward = found[0]
    assert "NaN or Inf at step 0; it first appears in the output of" in forward
    assert "(rank 1)" in forward
    assert "NaN or Inf at step 0; it first appears in the gradient of layers.0.self_attn." in backward


def test_what_does_not_divide_is_refused(small_things: tuple[list[list[Any]], Path]) -> None:
    told = [rank[3] for rank in small_things[0]]
    assert told[0] == told[1]
    chunks, undealt, mesh, expert, count, part = told[0]
    assert chunks.startswith("model.moe.expert_chunk: expert backend 'densemixer'")
    assert undealt.startswith("parallel.expert: expert backend 'auto'")
    assert mesh.startswith("parallel: replicate 3 x shard 1 is 3, and 2 processes run")
    assert expert == "parallel.expert: 2 does not divide parallel.shard 1, of which it is a part"
    assert count.startswith("parallel.expert: 2 does not divide the 3 experts of layer 0")
    assert part.startswith("parallel: router 'softmax_topk'")
    assert part.endswith("declares that it can't be laid over several processes")
