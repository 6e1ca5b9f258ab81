"""`moelab.runs` as a pandas DataFrame: the extra `notebook`."""

from __future__ import annotations

from pathlib import Path

import pytest

import moelab
from run_folders import finished_run, write_run

pandas = pytest.importorskip("pandas", reason="needs pandas: pip install 'moelab[notebook]'")


def test_runs_are_a_frame_with_a_column_for_each_key_that_differs(tmp_path: Path) -> None:
    finished_run(tmp_path / "a", 3.0, alarms=[{"name": "dead_fraction", "layer": 1, "on": True}])
    finished_run(tmp_path / "b", 2.0, {"model": {"moe": {"router": {"name": "switch"}}}, "seed": 1})
    write_run(tmp_path / "c", {"model": {"moe": None}}, summary={"status": "failed"})
    frame = moelab.runs(f"{tmp_path}/*", sort_by="loss")
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["name"]) == ["b", "a", "c"]
    assert list(frame["model.moe.router.name"].fillna("none")) == ["switch", "softmax_topk", "none"]
    assert frame.groupby("seed")["loss"].min().to_dict() == {0: 3.0, 1: 2.0}
    assert list(frame["alarms"]) == ["", "dead_fraction in layer 1", ""]
    assert str(frame["updated"].dt.tz) == "UTC"
    assert "run_dir" not in frame
    assert frame.loc[0, "config"]["seed"] == 1


def test_no_runs_are_an_empty_frame(tmp_path: Path) -> None:
    frame = moelab.runs(tmp_path)
    assert len(frame) == 0
    assert {"path", "state", "loss"} <= set(frame.columns)
