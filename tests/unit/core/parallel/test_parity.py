"""On 2 and 4 processes a step does what it does on one: losses, norms, counts, metrics and weights.

One test a world, since starting processes is what takes time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

import parallel_grid as grid
from processes import run_on

CLOSE = 2e-6  # sums of the same fp32 numbers in another order, over 4 steps


@pytest.mark.parametrize(
    ("world", "layouts", "models", "checkpointing"),
    [
        (2, ["replicate2", "shard2", "shard2_micro", "expert2"], list(grid.MODELS), False),
        (4, ["expert4", "shard4_expert2", "replicate2_expert2"], ["softmax_global", "quantile", "top_p"], True),
    ],
    ids=["2 processes", "4 processes, layers checkpointed"],
)
def test_several_processes_do_what_one_does(
    world: int, layouts: list[str], models: list[str], checkpointing: bool, tmp_path: Path
) -> None:
    ranks = run_on(world, grid.run_layouts, tmp_path, layouts, models, str(tmp_path), checkpointing)
    wanted = {
        (name, micro): grid.steps(name, None, micro)
        for name in models
        for micro in {grid.LAYOUTS[layout][1] for layout in layouts}
    }
    for layout in layouts:
        for name in models:
            key, alone = f"{layout}-{name}", wanted[name, grid.LAYOUTS[layout][1]]
            assert all(rank[key] == ranks[0][key] for rank in ranks), f"{key}: ranks disagree"
            for found, expected in zip(ranks[0][key]["steps"], alone["steps"], strict=True):
                assert found["served"] == expected["served"], key
                assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=1e-6), key
                assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5), key
                assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-5), key
            weights = load_file(tmp_path / f"{key}.safetensors")
            assert weights.keys() == alone["weights"].keys()
            for tensor, value in alone["weights"].items():
                off = float((weights[tensor] - value).abs().max())
                assert off <= CLOSE, f"{key}: {tensor} differs by {off}"


def test_a_fault_of_one_process_is_told_by_all(tmp_path: Path) -> None:
    found = run_on(2, grid.poisoned_step, tmp_path, {"shard": 2, "expert": 2})
    assert found[0] == found[1]
    assert "NaN or Inf at step 0; it first appears in the output of" in found[0]
    assert "(rank 1)" in found[0]


def test_what_does_not_divide_is_refused(tmp_path: Path) -> None:
    told = run_on(2, grid.refusals, tmp_path)
    assert told[0] == told[1]
    mixed, mesh, expert, count, part = told[0]
    assert mixed.startswith("parallel: expert backend 'densemixer'")
    assert mesh.startswith("parallel: replicate 3 x shard 1 is 3, and 2 processes run")
    assert expert == "parallel.expert: 2 does not divide parallel.shard 1, of which it is a part"
    assert count.startswith("parallel.expert: 2 does not divide the 3 experts of layer 0")
    assert part.startswith("parallel: router 'softmax_topk'")
    assert part.endswith("declares that it can't be laid over several processes")
