"""`torchrun -m moelab train`: the run of one process, on several, through its checkpoints, and through its mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moelab.checkpoint import MODEL, TRAINING, stored_tensors
from moelab_tools.cli import run

NEWEST = "checkpoints/step_00000006"
# AdamW divides the rounding of a gradient that is truly 0 by its own size: softmax is blind to the keys' bias.
BLIND = "k_proj.bias"
UNLIKE = ("perf/", "seconds")


@pytest.fixture
def arguments(tmp_path: Path, root: Path) -> list[str]:
    text = tmp_path / "a.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {n} says {n * n} " * 8}) + "\n" for n in range(60)))
    return [
        str(root / "configs/train/tiny_moe.yaml"), f"data.source={{name: jsonl, paths: [{text}]}}",
        "data.validation_fraction=0.3", "train.steps=6", "train.batch_size=8", "train.micro_batch_size=2",
        "train.sequence_length=32", "train.log_every=2", "train.save_every=3", "train.keep_checkpoints=0",
        "evaluation.every=3", "evaluation.sequences=9", "evaluation.batch_size=2", "evaluation.sample_tokens=4",
    ]  # fmt: skip


def torchrun(world: int, arguments: list[str], *flags: str, wait: bool = True, script: Path | None = None) -> Any:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *flags]
    command += [*(["-m", "moelab"] if script is None else [str(script)]), "train", *arguments]
    if wait:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def same(one: Path, other: Path) -> None:
    """Weights, moments and every number that both logged."""
    for name in (MODEL, TRAINING):
        ours, theirs = stored_tensors(one / NEWEST, name), stored_tensors(other / NEWEST, name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            close = 6 * 3e-3 if BLIND in key else 1e-5  # its own bound: steps times rate
            torch.testing.assert_close(
                ours[key].read(), theirs[key].read(), rtol=0, atol=close, msg=lambda m, k=key: f"{k}: {m}"
            )
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for ours, theirs in zip(*rows, strict=True):
        for key in set(ours) & set(theirs):
            if isinstance(ours[key], float) and not any(part in key for part in UNLIKE):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), (ours["step"], key)


@pytest.mark.processes
def test_a_run_is_the_same_on_any_number_of_processes_and_goes_on_on_any(tmp_path: Path, arguments: list[str]) -> None:
    one, two, four, back, again = (tmp_path / name for name in ("one", "two", "four", "back", "again"))
    assert run(["train", *arguments, f"run_dir={one}"]) == 0
    found = torchrun(2, [*arguments, f"run_dir={two}", "parallel.shard=2", "parallel.expert=2"])
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("done:") + found.stderr.count("done:") == 1  # told by one of them
    same(one, two)
    logged = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["moe/layer_00/rank_violation"] <= 1 for row in logged if "train/loss" in row)

    for folder, source in ((four, two), (back, two), (again, two)):
        shutil.copytree(source, folder)
        shutil.rmtree(folder / NEWEST)
        (folder / "summary.json").unlink()
    mesh = ["parallel.replicate=2", "parallel.shard=2"]
    found = torchrun(4, [*arguments, f"run_dir={four}", *mesh, "--resume"])
    assert found.returncode == 0, found.stderr
    same(one, four)
    assert run(["train", *arguments, f"run_dir={back}", "--resume"]) == 0
    same(one, back)
    found = torchrun(2, [*arguments, f"run_dir={again}", "parallel.shard=2", "parallel.expert=2", "--resume"])
    assert found.returncode == 0, found.stderr
    files = sorted((two / NEWEST).glob("*-of-00002.safetensors"))  # on the same mesh bit for bit
    assert len(files) == 4
    for path in files:
        assert (again / NEWEST / path.name).read_bytes() == path.read_bytes(), path.name


def wait_for_a_checkpoint(process: Any, folder: Path) -> None:
    """Raises what was said where it ended before one."""
    deadline = time.monotonic() + 200
    while not list((folder / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)


# Each step waits for nothing but time: what starts beside it gets the processors.
UNHURRIED = """
import time
import moelab.training.trainer as trainer
from moelab_tools.cli import main

step = trainer.one_step
trainer.one_step = lambda *given: (time.sleep(0.2), step(*given))[1]
main()
"""


@pytest.mark.processes
def test_a_signal_ends_all_at_one_step_and_what_they_saved_goes_on(tmp_path: Path, arguments: list[str]) -> None:
    folder = tmp_path / "run"
    endless = ["parallel.shard=2", "train.steps=100000", "schedule.name=constant"]
    unhurried = tmp_path / "unhurried.py"
    unhurried.write_text(UNHURRIED)
    process = torchrun(2, [*arguments, f"run_dir={folder}", *endless], wait=False, script=unhurried)
    wait_for_a_checkpoint(process, folder)
    for again in ([], ["--resume"]):
        second = torchrun(2, [*arguments, f"run_dir={folder}", *endless, *again])
        assert second.stderr.count("is being written by process") == 1, second.stderr
        assert len(re.findall(r"exitcode +: 2 ", second.stderr)) == 2, second.stderr
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=120)[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted", told
    newest = max((folder / "checkpoints").glob("step_*"))
    assert json.loads((newest / "state.json").read_text())["step"] == summary["steps"]


# torchrun's SIGTERM comes while the failed process is still on its way out: what it says may not be cut off.
SLOW_TO_LEAVE = """
import sys, time
import torch.distributed as dist
from moelab_tools.cli import main

leave = dist.destroy_process_group
dist.destroy_process_group = lambda: (leave(), time.sleep(2))
main()
"""


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process of a rank through /proc")
def test_one_that_is_killed_is_named_and_a_launch_that_may_goes_on_by_itself(
    tmp_path: Path, arguments: list[str]
) -> None:
    folder = tmp_path / "run"
    mesh = ["parallel.shard=2", "train.steps=60", "evaluation.every=0"]
    slow = tmp_path / "slow.py"
    slow.write_text(SLOW_TO_LEAVE)
    process = torchrun(2, [*arguments, f"run_dir={folder}", *mesh], "--max-restarts=1", wait=False, script=slow)
    wait_for_a_checkpoint(process, folder)
    os.kill(_process_of_rank(1, folder), signal.SIGKILL)
    told = process.communicate(timeout=200)[0]
    assert process.returncode == 0, told
    assert re.search(r"failed: step \d+: rank 1 \(process \d+ on .*\) was killed", told), told
    assert told.count("torchrun starts it again (attempt 1)") == 1, told
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 60)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


LOSS = """
import os
from dataclasses import dataclass
from moelab import ConfigError, component, hookimpl

@dataclass
class Options:
    weight: float = 0.1

class Picky:
    needs_batch_counts = False
    def __init__(self, options, context):
        self.weight, self.calls = options.weight, 0
    def __call__(self, records, context):
        self.calls += 1
        if os.environ.get("RANK") == "1" and self.calls == 12:
            raise KeyError("a word that only one process met")
        return records[0].routing.weight.sum() * 0

@hookimpl
def moelab_balance_losses():
    return [component("picky", Options, Picky)]
"""


@pytest.mark.processes
def test_what_a_plugin_raises_on_one_process_ends_all_with_its_message(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "picky.py").write_text(LOSS)
    plugin = ["plugins=[picky]", f"search_path=[{tmp_path}]", "model.moe.balance_losses=[{name: picky}]"]
    endless = ["parallel.shard=2", "train.steps=100000", "schedule.name=constant"]
    found = torchrun(2, [*arguments, *plugin, *endless, f"run_dir={tmp_path / 'run'}"])
    assert found.returncode == 1
    assert found.stderr.count("a word that only one process met") == 1, found.stderr
    assert "(rank 1)" in found.stderr
    assert "picky" in json.loads((tmp_path / "run/summary.json").read_text())["error"]


def _process_of_rank(rank: int, folder: Path) -> int:
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                environment = (path / "environ").read_bytes().split(b"\0")
                command = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if f"RANK={rank}".encode() in environment and str(folder).encode() in command:
                return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.processes
def test_mistakes_are_told_once(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *arguments, f"run_dir={tmp_path / 'a'}", "parallel.shard=2"]) == 2
    assert "is 2, and 1 process runs; start it with torchrun --nproc-per-node 2" in capsys.readouterr().err
    assert run(["train", *arguments, f"run_dir={tmp_path / 'a'}", "parallel.shard=3"]) == 2
    assert "train.batch_size: 8 sequences don't divide" in capsys.readouterr().err
    assert run(["train", *arguments, f"run_dir={tmp_path / 'a'}", "parallel.shard=4", "parallel.expert=3"]) == 2
    assert "parallel.expert: 3 does not divide parallel.shard 4" in capsys.readouterr().err
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.yaml").write_text("name: x\n")
    found = torchrun(2, [*arguments, f"run_dir={taken}", "parallel.shard=2"], "--max-restarts=1")
    assert found.returncode == 1  # torchrun's own, whatever its processes say
    assert found.stderr.count("already holds a run") == 1  # by one of them, in one of two attempts
    assert len(re.findall(r"exitcode +: 2 ", found.stderr)) == 2, found.stderr
    assert sorted(path.name for path in taken.iterdir()) == ["config.yaml"]
