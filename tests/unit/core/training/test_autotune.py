"""`train.autotune`: when it measures, what is kept where, and that a run goes on as it began."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from moelab import hookimpl, load_config
from moelab.config.run import RunConfig
from moelab.errors import ConfigError
from moelab.nn.linear import WHOLLY
from moelab.registry import Registry
from moelab.training import autotune
from moelab.training.setup import prepare
from moelab.training.trainer import train
from moelab.ways import Found, Measuring, Ways, active, choose
from moelab.ways_file import keep, machine_facts, place_of, read_kept

SMALL = [
    "train.steps=6", "train.batch_size=4", "train.sequence_length=64", "train.save_every=2", "train.log_every=2",
    "train.threads=1", "evaluation.sequences=4", "evaluation.sample_tokens=0", "model.hidden_size=192",
    "data.source.domains=[code_py]", "data.source.max_bytes_per_domain=60000",
]  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO)


def _config(root: Path, run: Path, *more: str) -> RunConfig:
    return load_config(root / "configs/train/tiny_moe.yaml", *SMALL, f"run_dir={run}", *more)


def _here() -> Path:
    path = place_of(machine_facts(1, CPU))
    assert path is not None
    return path


def _bytes(run: Path) -> bytes:
    return (run / "checkpoints" / "step_00000006" / "model.safetensors").read_bytes()


def _state(run: Path, step: int = 6) -> dict[str, Any]:
    return dict(json.loads((run / "checkpoints" / f"step_{step:08d}" / "state.json").read_text()))


def _other_way_round(path: Path) -> dict[str, str]:
    """The file says of every problem that it goes another way than before; -> the ways that it says."""
    content = json.loads(path.read_text())
    for found in content["problems"].values():
        found["way"] = next(way for way in found["seconds"] if way != found["way"])
    path.write_text(json.dumps(content))
    return {problem: found["way"] for problem, found in content["problems"].items()}


def test_what_is_measured_is_kept_for_the_next_run_and_stands_in_checkpoint_and_summary(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(_config(root, tmp_path / "first", "train.autotune=true"))
    found = read_kept(_here(), machine_facts(1, CPU))
    kinds = {problem.split()[0] for problem in found}
    assert kinds == {"linear", "attention", "experts"}
    assert _state(tmp_path / "first")["ways"] == {problem: each.way for problem, each in found.items()}
    assert json.loads((tmp_path / "first" / "summary.json").read_text())["ways"] == _state(tmp_path / "first")["ways"]
    assert any(f"{len(found)} choices, {len(found)} of them measured now" in line for line in caplog.messages)

    turned = _other_way_round(_here())
    answering: list[dict[str, str]] = []

    class Looks:
        @hookimpl
        def on_log(self, step: int) -> None:
            ways = active()
            answering.append(ways.chosen if ways else {})

    train(_config(root, tmp_path / "second", "train.autotune=true"), observers=[Looks()])
    assert answering and all(ways == turned for ways in answering)
    assert _state(tmp_path / "second")["ways"] == turned  # taken as it stands there
    assert any(f"{len(found)} choices, 0 of them measured now" in line for line in caplog.messages)
    assert active() is None


def test_a_run_goes_on_by_the_ways_that_it_began_with(root: Path, tmp_path: Path) -> None:
    class Stops:
        @hookimpl
        def on_save(self, step: int) -> None:
            if step == 4:
                raise KeyboardInterrupt

    train(_config(root, tmp_path / "whole", "train.autotune=true"))
    with pytest.raises(KeyboardInterrupt):
        train(_config(root, tmp_path / "stopped", "train.autotune=true"), observers=[Stops()])
    began = _state(tmp_path / "stopped", 4)["ways"]
    _other_way_round(_here())
    train(_config(root, tmp_path / "stopped", "train.autotune=false", "resume=true"))
    assert _state(tmp_path / "stopped")["ways"] == began
    assert _bytes(tmp_path / "stopped") == _bytes(tmp_path / "whole")


def test_a_run_without_ways_goes_on_without_them(root: Path, tmp_path: Path) -> None:
    train(_config(root, tmp_path / "run", "train.steps=4", "schedule.name=constant"))
    train(_config(root, tmp_path / "run", "schedule.name=constant", "resume=true", "train.autotune=true"))
    assert _state(tmp_path / "run")["ways"] == {} and not _here().exists()


def test_short_runs_and_those_that_say_no_are_left_to_constants(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ways(*more: str) -> Ways | None:
        config = _config(root, tmp_path / "run", *more)
        return autotune.find_ways(prepare(config, Registry(config.plugins)), {})

    assert ways() is None
    monkeypatch.setitem(autotune.LONG, "cpu", 1e8)  # as if the run had more steps
    monkeypatch.setattr(autotune, "_measured", lambda setup: Ways({}))
    assert ways() is not None
    assert ways("train.autotune=false") is None
    assert ways("train.memory_budget=8 GB") is None  # the plan is of the constants' ways
    assert ways("train.memory_budget=8 GB", "train.autotune=true") is not None
    monkeypatch.setitem(autotune.LONG, "cpu", 1e15)
    assert ways() is None


def test_measuring_leaves_the_run_as_it_was(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is faster by another way, weights, plugin state and random numbers end as without a look."""
    monkeypatch.setattr("moelab.ways.MARGIN", 0.99)
    noisy = ("model.moe.router.name=noisy_topk",)
    train(_config(root, tmp_path / "looked", "train.autotune=true", *noisy))
    train(_config(root, tmp_path / "plain", "train.autotune=false", *noisy))
    assert _bytes(tmp_path / "looked") == _bytes(tmp_path / "plain")


@pytest.mark.parametrize(("ratio", "taken"), [(0.9, True), (0.995, False), (1.7, False)])
def test_what_is_faster_alone_is_taken_only_where_whole_passes_are(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, taken: bool
) -> None:
    """As bf16 products were: a quarter faster when the same shapes came again and again, slower in a step."""
    config = _config(root, tmp_path / "run")
    setup = prepare(config, Registry(config.plugins))
    monkeypatch.setattr("moelab.ways.measure", lambda calls: {way: float(way == "mkl") + 1 for way in calls})

    def timed(setup: Any, ways: Ways, number: int) -> float:
        return ratio ** sum(way == WHOLLY for way in ways.chosen.values())

    monkeypatch.setattr(autotune, "_pass", timed)
    table = autotune.measure_ways(setup, {})
    linears = {problem: found for problem, found in table.found.items() if problem.startswith("linear")}
    assert linears and {found.way for found in linears.values()} == {WHOLLY if taken else "mkl"}
    assert [found.step for found in linears.values()] == pytest.approx([ratio] * len(linears))
    assert all(table.chosen[problem] == found.way for problem, found in table.found.items())


def test_measuring_leaves_buffers_and_random_numbers_as_they_were(root: Path, tmp_path: Path) -> None:
    config = _config(root, tmp_path / "run")
    setup = prepare(config, Registry(config.plugins))
    model = setup.model
    model.register_buffer("seen", torch.zeros(()))

    def count(*_: object) -> None:
        model.seen += 1 + torch.rand(())

    model.layers[0].register_forward_hook(count)
    torch.manual_seed(1)
    autotune.measure_ways(setup, {})
    assert float(model.seen) == 0
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(1)))


def test_a_pass_leaves_no_gradient(root: Path, tmp_path: Path) -> None:
    config = _config(root, tmp_path / "run")
    setup = prepare(config, Registry(config.plugins))
    assert autotune._pass(setup, Ways({}), 0) > 0
    assert all(parameter.grad is None for parameter in setup.model.parameters())


def test_each_stage_is_measured_and_the_model_is_in_its_first_one_afterwards(root: Path, tmp_path: Path) -> None:
    stages = "stages=[{name: short, steps: 3, sequence_length: 64}, {name: long, steps: 3, sequence_length: 128}]"
    config = _config(root, tmp_path / "run", "train.steps=6", stages)
    setup = prepare(config, Registry(config.plugins))
    table = autotune.measure_ways(setup, {})
    lengths = {problem.split(" x ")[2] for problem in table.found if problem.startswith("attention")}
    assert lengths == {"64", "128"}
    assert autotune._flops(setup) == pytest.approx(
        sum(stage.costs(setup.model)[0] * 4 * length * 3 for stage, length in zip(setup.stages, (64, 128), strict=True))
    )


def test_a_choice_of_every_kind_is_asked_for_at_a_place_in_the_model(root: Path, tmp_path: Path) -> None:
    config = _config(root, tmp_path / "run", "train.dtype=bfloat16")
    table = autotune.measure_ways(prepare(config, Registry(config.plugins)), {})
    assert all("bfloat16" in problem for problem in table.found)  # a linear layer has one way there
    assert len(table.found) == 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "not an object"),
        ('{"machine": {}}', "is of another machine (vendor_id: '' there"),
        ('{"machine": {"cpu": "elsewhere"}, "problems": {}}', "is of another machine"),
        (None, "problems: is missing"),
    ],
)
def test_a_file_of_no_use_is_told_in_a_line_and_measured_anew(
    caplog: pytest.LogCaptureFixture, content: str | None, told: str
) -> None:
    machine = machine_facts(1, CPU) | {"vendor_id": "here"}
    path = place_of(machine)
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"machine": machine}) if content is None else content)
    assert read_kept(path, machine) == {}
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told in line and str(path) in line and line.endswith("it is measured anew") and "\n" not in line


def test_a_file_that_was_copied_from_another_machine_is_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    here = machine_facts(1, CPU)
    keep(place_of(here), here | {"model name": "another"}, {"p": Found("a", {"a": 1.0})})
    assert read_kept(place_of(here), here) == {}
    assert "model name: 'another' there" in caplog.text


def test_a_run_tells_of_a_damaged_file_once_and_writes_it_anew(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _here().parent.mkdir(parents=True)
    _here().write_text("{")
    train(_config(root, tmp_path / "run", "train.autotune=true"))
    assert sum("is not JSON" in line for line in caplog.messages) == 1
    assert _state(tmp_path / "run")["ways"].keys() == read_kept(_here(), machine_facts(1, CPU)).keys()


def test_threads_and_kernels_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = place_of(machine_facts(1, CPU)), place_of(machine_facts(2, CPU))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert len({one, two, place_of(machine_facts(1, CPU))}) == 3


def test_a_cache_that_cannot_be_written_is_told_and_the_run_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    train(_config(root, tmp_path / "run", "train.autotune=true"))
    assert _state(tmp_path / "run")["ways"]
    told = [record.getMessage() for record in caplog.records if "autotune: " in record.getMessage()]
    assert sum("can't be kept" in line for line in told) == 1


def test_a_user_without_a_home_folder_measures_for_this_run_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    train(_config(root, tmp_path / "run", "train.autotune=true"))
    assert _state(tmp_path / "run")["ways"] and "nothing is kept, without a home folder" in caplog.text


def test_a_state_that_no_run_wrote_is_refused(root: Path, tmp_path: Path) -> None:
    config = _config(root, tmp_path / "run")
    setup = prepare(config, Registry(config.plugins))
    for state in ({"ways": ["linear"]}, {"ways": {"linear": 3}}):
        with pytest.raises(Exception, match=r"state\.json.*ways"):
            autotune.find_ways(setup, state)


def test_two_runs_that_measure_at_once_end_with_one_answer(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(root, tmp_path / "run", "train.autotune=true")
    setup = prepare(config, Registry(config.plugins))
    machine, measured = machine_facts(1, CPU), autotune.measure_ways

    def meanwhile(setup: Any, known: Any) -> Measuring:
        table = measured(setup, known)
        other = {problem: Found(max(found.seconds), found.seconds) for problem, found in table.found.items()}
        keep(place_of(machine), machine, {**other, "of the other run": Found("a", {"a": 1.0})})
        return table

    monkeypatch.setattr(autotune, "measure_ways", meanwhile)
    ways = autotune.find_ways(setup, {})
    kept = read_kept(place_of(machine), machine)
    assert ways is not None and "of the other run" in kept
    assert ways.chosen == {problem: kept[problem].way for problem in ways.chosen}
    assert all(way == max(kept[problem].seconds) for problem, way in ways.chosen.items())


def test_it_is_for_one_process(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.autotune: is for one process, and parallel asks for 2"):
        _config(root, tmp_path / "run", "train.autotune=true", "parallel.replicate=2")


def test_evaluation_and_what_follows_a_run_are_not_left_in_its_table() -> None:
    assert choose("anything", "usual", lambda: {}) == "usual"
