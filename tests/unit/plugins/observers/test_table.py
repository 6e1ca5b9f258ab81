"""The table of a run's numbers: a row a step, whatever was logged when, and once however often a run was resumed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from moelab.errors import ConfigError
from moelab.hookspecs import OBSERVERS
from moelab.registry import Registry

ROWS = [
    {"step": 0, "tokens": 0, "eval/loss": 5.5},
    {"step": 1, "tokens": 64, "train/loss": 5.0},
    {"step": 2, "tokens": 128, "train/loss": 4.0, "moe/layer_00/mine": 1.0,
     "alarms": [{"name": "overload", "layer": 3, "value": 4.5}, {"name": "not_finite", "layer": None, "value": 1.0}]},
    {"step": 2, "tokens": 128, "eval/loss": 4.5},
]  # fmt: skip


def observer(folder: Path, **options: Any) -> Any:
    built: Any = Registry(entry_points=False).build(OBSERVERS, {"name": "table", **options}, folder, "observers.0")
    built.on_train_begin(run_dir=folder, config={}, facts={})
    return built


def test_lines_of_one_step_are_one_row_and_a_number_that_is_not_there_is_empty(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    observer(tmp_path).on_train_end(step=2, summary={}, error=None)
    header, *rows = csv.reader((tmp_path / "metrics.csv").read_text().splitlines())
    assert header == ["step", "tokens", "eval/loss", "train/loss", "moe/layer_00/mine", "alarms"]
    assert rows == [
        ["0", "0", "5.5", "", "", ""],
        ["1", "64", "", "5.0", "", ""],
        ["2", "128", "4.5", "4.0", "1.0", "overload layer 3, not_finite"],
    ]


def test_it_is_there_from_the_first_checkpoint_on_and_follows_the_log_of_a_resumed_run(tmp_path: Path) -> None:
    """Which has dropped what was logged beyond its checkpoint."""
    log = tmp_path / "metrics.jsonl"
    built = observer(tmp_path)
    for rows in (ROWS, ROWS[:2]):
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        built.on_save(step=1)
        assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + len({row["step"] for row in rows})


def test_a_run_that_failed_before_it_began_has_no_table(tmp_path: Path) -> None:
    built: Any = Registry(entry_points=False).build(OBSERVERS, {"name": "table"}, tmp_path, "observers.0")
    built.on_train_end(step=0, summary={}, error=ValueError())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "package", "extra", "options"),
    [
        ("wandb", "wandb", "wandb", {}),
        ("trackio", "trackio", "trackio", {}),
        ("table", "pyarrow", "parquet", {"format": "parquet"}),
    ],
)
def test_a_missing_client_is_named_with_its_extra_before_a_run_begins(
    name: str, package: str, extra: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=rf"observers\.0.*needs the package {package}.*moelab\[{extra}\]"):
        Registry(entry_points=False).build(OBSERVERS, {"name": name, **options}, tmp_path, "observers.0")
