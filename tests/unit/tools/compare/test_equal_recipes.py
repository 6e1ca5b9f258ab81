"""Run folders of equal recipes through the whole of compare: few are called different, and none from one seed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from moelab_tools.compare import sentences
from moelab_tools.compare.comparison import Comparison, compare
from moelab_tools.compare.runs import read_runs

MakeRun = Callable[..., Path]
FALSE = {"better", "worse", "best"}


def null(make_run: MakeRun, number: int, seeds: tuple[tuple[int, ...], ...], *, named: bool) -> Comparison:
    """Variants that differ in nothing but their names and what their luck is drawn from."""
    paths = [
        make_run(f"r{number}v{v}_seed{seed}", router=f"x{v}", seed=seed, steps=40, eval_every=10, documents=30,
                 wobble=0.006, taste=0.006)
        for v, one in enumerate(seeds) for seed in one
    ]  # fmt: skip
    return compare(read_runs(paths), f"r{number}v0_seed{seeds[0][0]}" if named else None, practical=0.0)


def false_words(comparison: Comparison) -> set[str]:
    words = {line.verdict for line in comparison.lines}
    return FALSE & (words | {found.verdict for line in comparison.lines for found in line.at_equal.values()})


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("seeds", [((0,), (0,)), ((0,), (1,)), ((0, 1, 2), (0,)), ((0, 1, 2), (7,)), ((0, 1), (0, 1))])
def test_fewer_than_three_pairs_are_never_called_different(
    make_run: MakeRun, seeds: tuple[tuple[int, ...], ...], named: bool
) -> None:
    for number in range(5):
        comparison = null(make_run, number, seeds, named=named)
        assert not false_words(comparison)
        assert not re.search(r"\\b(better|worse|best)\\b", " ".join(sentences.headlines(comparison)))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [((0, 1, 2), (0, 1, 2)), ((0, 1, 2), (3, 4, 5)), ((0, 1, 2),) * 3])
def test_equal_recipes_are_rarely_called_different(make_run: MakeRun, seeds: tuple[tuple[int, ...], ...]) -> None:
    """60 comparisons, nominal 5 %: more than 8 would be a chance of one in a hundred."""
    false = sum(bool({line.verdict for line in null(make_run, number, seeds, named=True).lines} & FALSE)
                for number in range(60))  # fmt: skip
    assert false <= 8
