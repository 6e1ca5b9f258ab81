"""The command line itself: quick help, exit codes, near misses."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from moelab.plugin_faults import PluginPart
from moelab_tools.cli import COMMANDS, run


def test_help_imports_neither_torch_nor_transformers(root: Path) -> None:
    code = (
        "import sys; from moelab_tools.cli import run; code = run(['--help']); "
        "heavy = {'torch', 'numpy', 'transformers', 'tensorboard', 'omegaconf'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    outcome = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    for name in COMMANDS:
        assert name in outcome.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Example:" in shown
    assert f"moelab {name}" in shown


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_80_columns(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run([*name.split(), "--help"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


def test_an_unknown_option_is_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--stepz"]) == 2
    assert "--stepz" in capsys.readouterr().err


def test_no_arguments_show_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train"]) == 2
    assert "CONFIG" in capsys.readouterr().err


def test_a_warning_is_one_marked_line_on_stderr(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here a router that one normalised expert a token cuts off from the text."""
    single = "model.moe.layout.num_experts_per_tok=1"
    sizes = [
        "train.steps=1",
        "train.batch_size=2",
        "train.sequence_length=32",
        "evaluation.sequences=2",
        "observers=[]",
    ]
    source = f'data.source={{name: text, paths: [{root / "LICENSE"}], separator: "\\n\\n"}}'
    config = ["configs/train/tiny_moe.yaml", *sizes, source, single, "data.validation_fraction=0.1"]
    base = [str(root / config[0]), *config[1:]]
    for index, (norm, expected) in enumerate((("true", 1), ("false", 0))):
        run_dir = f"run_dir={tmp_path / str(index)}"
        assert run(["train", *base, run_dir, f"model.moe.router.norm_topk_prob={norm}"]) == 0
        lines = capsys.readouterr().err.splitlines()
        found = [line for line in lines if line.startswith("warning: ") and "gradient" in line]
        assert len(found) == expected, lines
    assert not any(type(handler).__name__ == "_Warnings" for handler in logging.getLogger("moelab").handlers)


def test_memory_that_ends_in_any_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy(*rest: object, **options: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5000000000 bytes.")

    monkeypatch.setattr("moelab_tools.cli.moelab.main", greedy)
    assert run(["doctor"]) == 1
    assert capsys.readouterr().err == "failed: too little memory: 5.0 GB more were asked for\n"


def test_a_strangers_plugin_that_raises_in_any_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found in the traceback: the layer that calls the part says whose it is."""

    class Router:
        def route(self) -> None:
            raise KeyError("nowhere")

    class Layer:
        router = Router()

        def plugin_parts(self) -> list[tuple[PluginPart, object]]:
            return [(PluginPart("router", "bad", __name__, "model.moe.router", 3), self.router)]

        def forward(self) -> None:
            self.router.route()

    layer = Layer()
    monkeypatch.setattr("moelab_tools.cli.moelab.main", lambda *rest, **options: layer.forward())
    assert run(["doctor"]) == 2
    told = capsys.readouterr().err
    line = Router.route.__code__.co_firstlineno + 1
    assert told.startswith(f"error: model.moe.router: router 'bad' of {__name__}, layer 3: raised KeyError: ")
    assert told.endswith(f"test_cli.py:{line})\n")


def test_under_torchrun_what_is_not_shared_is_done_by_one_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several would write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(["explain", "no such file"]) == 0
    assert run(["train", "--no-such-option"]) == 2  # all of them find it, and one tells it
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert run(["explain", "--no-such-option"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("warning: explain is done by one of the 2 processes that torchrun started")
    assert run(["train", "--no-such-option"]) == 2
    assert capsys.readouterr().err.count("No such option") == 1
