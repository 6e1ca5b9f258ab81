"""Runs that were stored before a plugin gained an option are of the variant that its default makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from later_keys import later
from moelab_plugins.routers.softmax_topk import SoftmaxTopKOptions
from moelab_tools.compare.comparison import Comparison, compare
from moelab_tools.compare.runs import read_runs

MakeRun = Callable[..., Path]


def compared(make_run: MakeRun, router: str, **options: object) -> Comparison:
    """Two seeds of one router, of which the second one's config names these options too."""
    paths = [make_run(f"{router}_seed{seed}", router=router, seed=seed) for seed in (0, 1)]
    path = paths[1] / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["moe"]["router"] |= options
    path.write_text(yaml.safe_dump(config))
    return compare(read_runs(paths), allow_different_data=True)


@pytest.mark.parametrize(("value", "differing"), [([3], {}), ([4], {"model.moe.router.later_option": [[3], [4]]})])
def test_an_option_that_came_later_stands_at_its_default_where_it_is_not_named(
    make_run: MakeRun, value: list[int], differing: dict[str, object]
) -> None:
    with later(SoftmaxTopKOptions, "later_option", "tuple", (3,)):
        comparison = compared(make_run, "softmax_topk", later_option=value)
    assert {key: row for key, row in comparison.config.items() if key != "seed"} == differing
    assert len(comparison.lines) == len(differing) + 1


def test_of_a_plugin_that_is_not_installed_it_is_told_that_they_are_compared_as_written(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    comparison = compared(make_run, "of_nobody", later_option=3)
    assert len(comparison.lines) == 2
    assert caplog.messages == [
        "router 'of_nobody' is not installed here, so runs that don't name its option later_option are compared as "
        "they were written"
    ]
