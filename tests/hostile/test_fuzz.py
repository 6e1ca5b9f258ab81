"""500 damaged inputs in CI, the same ones everywhere; thousands by hand: tests/hostile/fuzz.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fuzz import Input, answer, fuzz, inputs_of
from fuzz_judge import judge_command, judge_readers
from fuzz_kinds import KINDS
from fuzz_mutate import fresh_copy
from fuzz_world import make_world
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.errors import ConfigError
from moelab_tools.cli import COMMANDS

# What takes no folder of anybody's, and what starts `moelab train` on configs of the user's own.
NO_FOLDER = {"doctor", "sweep", "experiment", "demo", "new"}
PLANTED = ("triton", "colorama", "gmpy2", "tabulate", "IPython", "sitecustomize", "numpy", "yaml", "json", "torch")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "world"
    folder.mkdir()
    make_world(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_read_or_refused_by_one_message(kind: str, world: Path, tmp_path: Path) -> None:
    """50 of each kind, most through the readers behind the commands; by hand half of them are whole commands."""
    found = fuzz(inputs_of(0, 50, [kind], forks=0.1), world, tmp_path / "scratch")
    assert not found, "\n".join(found.values())


def test_an_input_is_the_same_wherever_it_is_made(world: Path, tmp_path: Path) -> None:
    one = Input("config_json", 3, 4, forks=0.0)
    assert answer(one, world, tmp_path / "a") == answer(one, world, tmp_path / "b")
    made = [(tmp_path / name / "hf" / "config.json").read_bytes() for name in ("a", "b")]
    assert made[0] == made[1]


def _raises(folder: Path) -> None:
    raise KeyError("x")


def _loops(folder: Path) -> None:
    raise ConfigError("x" * 5000)


def test_the_judge_sees_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each planted fault is told; a message is short however long it was made."""
    assert "KeyError" in (judge_readers((_raises,), tmp_path) or "")
    assert judge_readers((_loops,), tmp_path) is None
    inside = tmp_path / "inside"
    inside.mkdir()
    faults = {
        "traceback": lambda words: 1 / 0,
        "watched": lambda words: (tmp_path / "elsewhere").write_text("x") and 0,
        "control character": lambda words: print("\x1b[31m") or 0,
        "runs": lambda words: exec(compile("1", str(inside / "planted.py"), "exec")) or 0,
        "starts": lambda words: subprocess.run(["true"], check=True).returncode,
        "exit code": lambda words: 3,
        "0 messages": lambda words: 2,
        "2 messages": lambda words: print("error: x\nfailed: y") or 2,
        "message of": lambda words: print("error: " + "x" * 3000) or 2,
    }
    for told, fault in faults.items():
        monkeypatch.setattr("fuzz_judge.run", fault)
        assert told in (judge_command((), inside, inside) or ""), told


def test_no_command_imports_from_a_strangers_folder(world: Path, tmp_path: Path) -> None:
    """Under an audit hook that sees code of the folder run, with names of libraries planted everywhere."""
    every = [(kind, command) for kind in KINDS for group in KINDS[kind].groups for command in group.commands]
    commands = {command[:2]: (kind, command) for kind, command in every}  # one of each command and folder
    assert {command[0] for command in commands} == set(COMMANDS) - NO_FOLDER
    for number, (kind, command) in enumerate(sorted(commands.values())):
        scratch = tmp_path / str(number)
        fresh_copy(world, KINDS[kind].parts, scratch)
        for folder in [scratch, *(path for path in scratch.rglob("*") if path.is_dir())]:
            for name in PLANTED:
                (folder / f"{name}.py").write_text("raise SystemExit('a stranger ran')\n")
        if kind == "data":
            (scratch / "text" / "numpy.py").unlink()
        wrong = judge_command(command, scratch, scratch)
        assert wrong is None, (command, wrong)


SCALARS = st.integers() | st.text(max_size=5) | st.none() | st.booleans()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner))
KEYS = ("model", "model.moe.layers.0", "data.source", "train.steps", "observers", "plugins", "optimizer.betas")


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.sampled_from(KEYS), st.text() | VALUES.map(repr))
def test_an_override_of_any_value_is_taken_or_refused(key: str, value: str) -> None:
    config = str(Path(__file__).resolve().parents[2] / "configs/train/tiny_moe.yaml")
    assert judge_readers((lambda folder: load_config([config, f"{key}={value}"], RunConfig),), Path()) is None
