"""The demo's commands, and which folder it may replace."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelab import ConfigError
from moelab.config.files import find_config
from moelab_tools.cli import run
from moelab_tools.demo import MARK, demo_steps, run_demo


def test_every_config_of_the_demo_is_shipped() -> None:
    for step in demo_steps(Path("runs"), [0]):
        if step.arguments[0] in ("train", "upcycle"):
            assert find_config(step.arguments[1]).is_file()


def test_the_runs_of_a_variant_differ_in_seed_and_in_what_is_named_after_it() -> None:
    steps = demo_steps(Path("runs"), [3, 5], ["train.steps=1"])
    for variant in ("dense", "dense_continued", "dense_equal_flops", "upcycled", "upcycled_loss_free"):
        three, five = (step.arguments for step in steps if step.title.startswith(f"{variant}, seed"))
        renamed = tuple(
            word.replace("seed3", "seed5").replace("seed=3", "seed=5").replace("seed=103", "seed=105") for word in three
        )
        assert renamed == five
        assert five[-1] == "train.steps=1"


@pytest.mark.parametrize(("seeds", "baselines"), [([4], ["dense_continued_seed4", "dense_equal_flops_seed4"]),
                                                  ([0, 1], ["dense_continued", "dense_equal_flops"])])  # fmt: skip
def test_the_baseline_is_a_run_where_there_is_one_seed(seeds: list[int], baselines: list[str]) -> None:
    """compare names what differs in the seed alone after the variant, and a single run as it is called."""
    comparisons = [step.arguments for step in demo_steps(Path("runs"), seeds) if step.arguments[0] == "compare"]
    assert [words[words.index("--baseline") + 1] for words in comparisons] == baselines
    assert all(len([word for word in words if "_seed" in word and "/" in word]) == 3 * len(seeds)
               for words in comparisons)  # fmt: skip


def test_a_folder_that_holds_something_else_is_refused_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "runs" / "dense_seed0"
    mine.mkdir(parents=True)
    assert run(["demo", "--out", str(tmp_path / "runs")]) == 2
    assert "holds something that is no demo (dense_seed0); choose another --out" in capsys.readouterr().err
    assert [item.name for item in (tmp_path / "runs").iterdir()] == ["dense_seed0"]


def test_an_earlier_demo_goes_and_what_lies_beside_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dense_seed7", "upcycled_seed7_hf", "report_equal_flops", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / MARK).write_text("{}\n")
    monkeypatch.setattr("moelab_tools.demo.demo_steps", lambda *rest: [])
    assert run(["demo", "--out", str(tmp_path), "--seeds", "0 1"]) == 0
    assert f"replacing the demo in {tmp_path}" in capsys.readouterr().out
    assert sorted(item.name for item in tmp_path.iterdir()) == [MARK, "mine"]


@pytest.mark.parametrize("override", ["seed=3", "run_dir=x", " name=y", "train.init_from=z", "no_override"])
def test_what_the_demo_sets_itself_is_no_override_of_it(
    override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["demo", "--out", str(tmp_path / "demo"), override]) == 2
    assert "takes key=value for every training run, but none of run_dir" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError])
def test_a_demo_that_is_stopped_says_that_it_begins_anew(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training command says "--resume goes on from it", which `moelab demo` doesn't take."""

    def stopped(*_: object, **__: object) -> None:
        raise error("here")

    monkeypatch.setattr("moelab_tools.cli.moelab.main", stopped)
    with pytest.raises(error, match="here"):
        run_demo(tmp_path / "demo", [0], [])
    assert "begins anew" in capsys.readouterr().err
