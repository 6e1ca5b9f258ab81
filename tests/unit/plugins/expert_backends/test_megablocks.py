"""What of the MegaBlocks backend needs neither triton nor a GPU. Its kernels: tests/interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moelab import BackendContext
from moelab.moe.contracts import ExpertProblem
from moelab.moe.layout import ExpertLayout
from moelab_plugins.expert_backends import megablocks
from moelab_plugins.expert_backends._megablocks_topology import BLOCK, bins, topology

COUNTS = [[5, 0, 300, 128], [0, 0, 1], [129], [0, 1, 0, 0]]
LAYER = ExpertProblem(64, 3584, 2560, 4096, 32768, torch.device("cuda"), torch.bfloat16)  # of Qwen2-57B-A14B


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> megablocks.MegaBlocksBackend:
    monkeypatch.setattr(megablocks, "missing", lambda: None)
    monkeypatch.setattr(megablocks, "interpreted", lambda: False)
    return megablocks.MegaBlocksBackend(
        megablocks.MegaBlocksOptions(), BackendContext(ExpertLayout(64, 8, 2560), 3584, 0, dict)
    )


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("across", [1, 3])
def test_the_topology_is_the_block_diagonal_drawn_by_hand(counts: list[int], across: int):
    bound = bins(torch.tensor(counts))
    rows = int(bound.padded_rows[-1])
    found = topology(bound.padded_rows, rows, across * BLOCK)
    heights = [-(-count // BLOCK) for count in counts]
    drawn, block_row = [], 0
    for expert, height in enumerate(heights):
        for _ in range(height):
            drawn += [(block_row, expert * across + j) for j in range(across)]
            block_row += 1
    assert list(zip(found.row.tolist(), found.column.tolist(), strict=True)) == drawn
    assert found.starts.tolist() == [sum(1 for r, _ in drawn if r < row) for row in range(rows // BLOCK + 1)]
    down = sorted(range(len(drawn)), key=lambda i: (drawn[i][1], drawn[i][0]))
    assert found.block_transposed.tolist() == down
    assert found.row_transposed.tolist() == [drawn[i][0] for i in down]
    columns = len(counts) * across
    assert found.starts_transposed.tolist() == [sum(1 for _, c in drawn if c < column) for column in range(columns + 1)]
    assert found.shape == (rows, columns * BLOCK)


def test_every_index_is_32_bits_wide():
    bound = bins(torch.tensor([5, 300]))
    found = topology(bound.padded_rows, int(bound.padded_rows[-1]), 256)
    indices = (found.row, found.column, found.starts, found.row_transposed, found.block_transposed)
    assert {t.dtype for t in (*indices, found.starts_transposed, *vars(bound).values())} == {torch.int32}


def test_the_57b_layer_is_served(backend: megablocks.MegaBlocksBackend):
    assert backend.supports(LAYER) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 3500}, "hidden_size must be a multiple of 128, not 3500; use auto or grouped_mm"),
        ({"moe_intermediate_size": 704}, "moe_intermediate_size must be a multiple of 128, not 704"),
        ({"device": torch.device("cpu")}, "needs a CUDA device, not cpu"),
        ({"dtype": torch.float64}, "not torch.float64; use loop"),
        ({"num_experts": 512}, "more than 2^31 numbers"),
        ({"num_assignments": 420_000}, "set model.moe.expert_chunk to at most 4"),
    ],
)
def test_a_refusal_says_why_and_what_would_do(
    backend: megablocks.MegaBlocksBackend, change: dict[str, object], says: str
):
    assert says in str(backend.supports(replace(LAYER, **change)))  # type: ignore[arg-type]


def test_the_chunk_that_a_refusal_names_is_accepted(backend: megablocks.MegaBlocksBackend):
    reason = str(backend.supports(replace(LAYER, num_assignments=420_000)))
    assert backend.supports(replace(LAYER, num_assignments=int(reason.rsplit(maxsplit=1)[-1]))) is None


def test_the_interpreter_is_refused_in_bf16(backend: megablocks.MegaBlocksBackend, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(megablocks, "interpreted", lambda: True)
    assert "wrong in torch.bfloat16" in str(backend.supports(LAYER))
    assert backend.supports(replace(LAYER, dtype=torch.float32)) is None


def test_a_missing_package_is_named_with_its_cure(
    backend: megablocks.MegaBlocksBackend, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "moelab_plugins.expert_backends._megablocks_install.importlib.util.find_spec",
        lambda name: None if name == "stk" else object(),
    )
    from moelab_plugins.expert_backends._megablocks_install import missing

    assert missing() == "stk is not installed; `make setup-megablocks` installs it"
