"""`moelab runs`: the table in 80 columns, what it leaves out, and the same as JSON."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import moelab
from moelab_tools.cli import run
from moelab_tools.run_list import age, print_runs
from run_folders import finished_run, kill_holder, row, write_run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        finished_run(Path(f"runs/softmax_{seed}"), 3.0 + seed, {"seed": seed})
    switch = {"model": {"moe": {"router": {"name": "switch"}}}}
    finished_run(Path("runs/sweep/switch"), 2.5, switch, alarms=[{"name": "dead_fraction", "layer": 1, "on": True}])
    kill_holder(write_run(Path("runs/sweep/gone"), rows=[row(12, {"train/loss": 1.0})]))
    return tmp_path


def _table(*places: str, width: int = 80) -> list[str]:
    file = io.StringIO()
    print_runs(moelab.run_records(*places), Console(file=file, width=width, force_terminal=True, color_system=None))
    return file.getvalue().splitlines()


def test_the_table_fits_80_columns_and_says_what_differs_below(runs: Path) -> None:
    lines = _table("runs")
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["run", "state", "step", "loss", "bits/byte", "age"]
    at = next(i for i, line in enumerate(lines) if line.startswith("runs/sweep/switch"))
    assert lines[at].split()[1:5] == ["finished", "30", "2.5000", "1.2500"]
    assert lines[at + 1 : at + 3] == ["    router=switch", "    alarm: dead_fraction in layer 1"]
    assert any(line.startswith("runs/sweep/gone") and "killed    12/30" in line for line in lines)
    assert "where a key does not stand: router=softmax_topk" in " ".join(lines)
    assert lines[-1] == "5 runs: 4 finished, 1 killed"


def test_many_differences_are_folded_and_the_rest_counted(runs: Path) -> None:
    numbers = {"lr": 0.5, "eps": 1e-5, "weight_decay": 0.25}
    train = {"batch_size": 3, "sequence_length": 33, "grad_clip": 2.5, "dtype": "bfloat16", "threads": 7}
    finished_run(Path("runs/other"), 1.0, {"seed": 9, "optimizer": numbers, "train": train, "data": {"seed": 4}})
    lines = _table("runs/other", "runs/softmax_0")
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("    ") and line.endswith("and 2 more") for line in lines)


def test_a_wide_terminal_takes_one_line_a_run(runs: Path) -> None:
    at = next(line for line in _table("runs", width=200) if line.startswith("runs/softmax_2"))
    assert at.endswith("seed=2")


def test_a_strangers_names_act_on_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished_run(Path("runs/odd\x1b[2J"), 3.0, {"model": {"moe": {"router": {"name": "a\x1b[31m\u202e"}}}})
    assert run(["runs"]) == 0
    assert not {"\x1b", "\u202e"} & set(capsys.readouterr().out)


def test_json_is_everything_and_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished_run(Path("runs/nan"), float("nan"))
    assert run(["runs", "--json", "--where", "router=switch"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["path"] for one in found] == ["runs/sweep/switch"]
    assert found[0]["alarms"] == [{"name": "dead_fraction", "layer": 1}]
    assert found[0]["config"]["model"]["moe"]["router"] == {"name": "switch"}
    assert run(["runs", "runs/nan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["loss"] is None


def test_order_limit_and_states(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["runs", "--sort", "-loss", "--limit", "1", "--state", "finished"]) == 0
    shown = capsys.readouterr()
    assert "softmax_2" in shown.out
    assert shown.out.splitlines()[-1] == "1 run: 1 finished"
    assert "3 more are left out by --limit" in shown.err
    assert run(["runs", "--state", "done"]) == 2
    assert "running, finished, stopped, failed" in capsys.readouterr().err
    assert run(["runs", "--state", "running"]) == 0
    assert "no runs of which this holds in runs" in capsys.readouterr().out
    assert run(["runs", "elsewhere"]) == 2


def test_the_table_needs_no_torch(runs: Path) -> None:
    code = "import sys; from moelab_tools.cli import run; assert run(['runs']) == 0; assert 'torch' not in sys.modules"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize(
    ("seconds", "told"), [(-3, "0 s"), (59, "59 s"), (60, "1 min"), (7_199, "1 h"), (200_000, "2 d")]
)
def test_an_age_is_rounded_down(seconds: float, told: str) -> None:
    assert age(seconds) == told
