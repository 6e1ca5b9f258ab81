"""`moelab align`: a stage's run is a run, exact in resuming, and its router does what its policy says."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl", reason="needs TRL: pip install 'moelab[align]'")

import moelab
from moelab.alignment import run as alignment_run
from moelab.errors import ConfigError
from moelab.training.format import without_clock

ROUTER = {"name": "sigmoid_topk", "bias_update_rate": 0.01}
TEXT = "".join(f"line {number} says {number * number} and no more.\n" for number in range(400))


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _sum(a: int, b: int) -> dict[str, Any]:
    ask = [{"role": "user", "content": f"{a}+{b}?"}]
    said = [[{"role": "assistant", "content": text}] for text in (str(a + b), f"{a + b + 1}, I think")]
    return {"messages": ask + said[0], "prompt": ask, "chosen": said[0], "rejected": said[1]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on text, conversations and preferences."""
    folder = tmp_path_factory.mktemp("base")
    for name in "ab":
        (folder / f"{name}.txt").write_text(TEXT.replace("says", f"tells {name}"))
    _lines(folder / "sums.jsonl", [_sum(a, b) for a in range(4) for b in range(4)])
    moelab.train(
        "configs/train/tiny_moe.yaml", f"run_dir={folder}/base", f"model.moe.router={json.dumps(ROUTER)}",
        f"data.source={{name: text, paths: [{folder}/a.txt, {folder}/b.txt]}}", "data.validation_fraction=0.5",
        "train.steps=2", "train.sequence_length=32", "train.threads=1", "evaluation.sequences=2",
        "evaluation.sample_tokens=0", "observers=[]", progress=False,
    )  # fmt: skip
    return folder


def align(base: Path, out: Path, stages: str, *more: str, **how: Any) -> list[moelab.TrainedRun]:
    said = (
        f"run_dir={out}", f"train.init_from={base}/base", "train.batch_size=4", "train.log_every=1", "train.threads=1",
        "optimizer.lr=0.003", "evaluation.sample_tokens=0", "observers=[]", f"alignment={stages}",
    )  # fmt: skip
    return moelab.align(*said, *more, progress=False, **how)


def _stage(base: Path, stage: str, **more: Any) -> str:
    said = {"stage": stage, "data": f"{base}/sums.jsonl", "steps": 3, "sequence_length": 64} | more
    return "{" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in said.items()) + "}"


def _model(run: moelab.TrainedRun) -> dict[str, str]:
    return {"name": "reward_model", "run": str(run.run_dir)}


def _rows(run: moelab.TrainedRun, tag: str) -> list[float]:
    return [row[tag] for row in run.metrics if tag in row]


def _checkpoint(run: moelab.TrainedRun) -> Path:
    return max((run.run_dir / "checkpoints").iterdir())


def test_stages_run_one_after_the_other_from_what_the_one_before_made(base: Path, tmp_path: Path) -> None:
    stages = f"[{_stage(base, 'sft', epochs=1, steps=None)}, {_stage(base, 'dpo', lr=0.0001)}]"
    sft, dpo = align(base, tmp_path / "out", stages)
    assert [run.run_dir.name for run in (sft, dpo)] == ["01_sft", "02_dpo"]
    assert sft.summary["steps"] == 4  # 16 conversations, 4 at once
    assert dpo.summary["init_from"] == str(sft.run_dir)
    losses = _rows(sft, "train/lm_loss")
    assert losses[-1] < losses[0]
    first = next(row for row in dpo.metrics if row.get("step") == 1 and "train/dpo_loss" in row)
    assert first["train/dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["align/rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first["moe/mean/route_agreement"] == 1.0
    assert 0 < first["moe/mean/chosen_rejected_load"] < 1
    assert {
        "train/load_balance",
        "moe/mean/max_violation",
        "moe/layer_00/router_drift",
        "align/entropy",
    } <= first.keys()
    assert dpo.summary["alignment"]["lines"] == 16
    # The held-out windows are the base run's, so that what a stage loses there can be told.
    base_rows, own = (
        [json.loads(line)["document"] for line in (folder / "evaluation_documents.jsonl").read_text().splitlines()]
        for folder in (base / "base", dpo.run_dir)
    )
    assert base_rows == own
    assert isinstance(dpo.model.generate("1+", max_new_tokens=2), str)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(base: Path, tmp_path: Path, stage: str) -> None:
    one = f"[{_stage(base, stage, steps=4)}]"
    (whole,) = align(base, tmp_path / "whole", one, "train.micro_batch_size=2")
    more = ("train.micro_batch_size=2", "train.save_every=2", "train.keep_checkpoints=0")
    (again,) = align(base, tmp_path / "again", one, *more)
    final = _checkpoint(again)
    before = {name: load_file(final / name) for name in ("model.safetensors", "training.safetensors")}
    for path in final.iterdir():
        path.unlink()
    final.rmdir()
    (resumed,) = align(base, tmp_path / "again", one, *more, resume=True)
    for name, tensors in before.items():
        for run in (whole, resumed):
            found = load_file(_checkpoint(run) / name)
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items()), name
    assert without_clock(resumed.metrics) == without_clock(whole.metrics)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_split_into_micro_batches_changes_no_update(base: Path, tmp_path: Path, stage: str) -> None:
    """Rows of other lengths in each micro-batch; AdamW's eps is large, so that rounding is not made to a whole step."""
    found = []
    for micro in (4, 1):
        more = (f"train.micro_batch_size={micro}", "optimizer.eps=0.001", f"run_dir={tmp_path}/{micro}")
        (run,) = align(base, tmp_path / "x", f"[{_stage(base, stage, steps=2)}]", *more)
        found.append(load_file(_checkpoint(run) / "model.safetensors"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=2e-6, rtol=1e-4, msg=name)


def test_a_frozen_router_keeps_its_weights_and_its_bias_while_the_others_learn(base: Path, tmp_path: Path) -> None:
    (run,) = align(base, tmp_path / "out", f"[{_stage(base, 'sft', router='freeze')}]")
    old, new = (load_file(_checkpoint(r) / "model.safetensors") for r in (moelab.TrainedRun(base / "base", None), run))  # type: ignore[arg-type]
    changed = {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}
    assert not any(".router." in name for name in changed)
    assert any(".experts." in name for name in changed)


def test_a_router_may_learn_at_a_rate_of_its_own_and_without_balance_losses(base: Path, tmp_path: Path) -> None:
    drifts = {}
    for name, how in {"train": {}, "slow": {"router": "lr_scale", "router_lr_scale": 0.01}}.items():
        (run,) = align(
            base, tmp_path / name, f"[{_stage(base, 'sft', reference=f'{base}/base', balance=False, **how)}]"
        )
        drifts[name] = _rows(run, "moe/layer_00/router_drift")[-1]
        assert not _rows(run, "train/load_balance")
    assert 0 < drifts["slow"] < 0.1 * drifts["train"]


def test_a_reward_learns_which_answer_is_chosen(base: Path, tmp_path: Path) -> None:
    (run,) = align(base, tmp_path / "out", f"[{_stage(base, 'reward', steps=12, lr=0.003)}]")
    assert _rows(run, "align/accuracy")[-1] == 1.0
    losses = _rows(run, "train/reward_loss")
    assert losses[0] == pytest.approx(math.log(2), abs=0.1) and losses[-1] < 0.5 * losses[0]
    assert load_file(_checkpoint(run) / "training.safetensors")["head/score.weight"].shape == (1, 64)


def test_sampled_pairs_raise_what_the_reward_likes_and_resume_exactly(base: Path, tmp_path: Path) -> None:
    """The reward has learned that short answers are better; ties are counted."""
    (reward,) = align(base, tmp_path / "reward", f"[{_stage(base, 'reward', steps=12)}]")
    one = _stage(base, "online_dpo", reward=_model(reward), samples=3, max_new_tokens=6, steps=4, beta=0.5)
    (whole,) = align(base, tmp_path / "whole", f"[{one}]")
    row = next(row for row in whole.metrics if "train/dpo_loss" in row)
    assert row["train/dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert 0 <= row["align/sampled/tied_share"] < 1 and row["align/sampled/distinct_share"] > 0.5
    assert row["align/sampled/reward_std"] > 0
    more = ("train.save_every=2", "train.keep_checkpoints=0")
    (again,) = align(base, tmp_path / "again", f"[{one}]", *more)
    shutil.rmtree(_checkpoint(again))
    (resumed,) = align(base, tmp_path / "again", f"[{one}]", *more, resume=True)
    assert without_clock(resumed.metrics) == without_clock(whole.metrics)


def test_rewards_by_rule_read_the_prompts_line_and_are_summed_by_weight(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{a}+{a}=", "answer": 2 * a} for a in range(8)]
    data = str(_lines(tmp_path / "prompts.jsonl", rows))
    rewards: list[dict[str, Any]] = [
        {"name": "exact_answer", "weight": 5, "take": "last_number"},
        {"name": "length", "most": 2, "slack": 8, "unit": "characters"},
    ]
    one = _stage(base, "online_dpo", data=data, reward=rewards, samples=6, max_new_tokens=6, steps=2)
    (run,) = align(base, tmp_path / "out", f"[{one}]")
    row = next(row for row in run.metrics if "train/dpo_loss" in row)
    parts = [row[f"align/sampled/{name}_mean"] for name in ("exact_answer", "length")]
    assert row["align/sampled/reward_mean"] == pytest.approx(5 * parts[0] + parts[1])
    stored = (run.run_dir / "config.yaml").read_text()
    assert "take: last_number" in stored and "slack: 8" in stored
    _lines(Path(data), [*rows[:-1], {"prompt": "9+9=", "question": 18}])
    with pytest.raises(moelab.DataError, match=r"prompts\.jsonl:8: has no answer, which reward 'exact_answer' reads"):
        align(base, tmp_path / "other", f"[{one}]")
    assert not (tmp_path / "other").exists() or not any((tmp_path / "other").iterdir())


@pytest.mark.parametrize("stage", ["dpo", "online_dpo"])
def test_replayed_routes_are_the_recorded_ones_however_the_router_moves(base: Path, tmp_path: Path, stage: str) -> None:
    """A router that learns alone, fast: its own choices leave the reference's, and the loss is of the recorded ones."""
    more: dict[str, Any] = {"replay": "reference"}
    if stage == "online_dpo":
        (reward,) = align(base, tmp_path / "reward", f"[{_stage(base, 'reward')}]")
        more = {"replay": "sampled", "reward": _model(reward), "samples": 3, "max_new_tokens": 6}
    freeze = "train.freeze=[embed_tokens.*, layers.*.self_attn.*, layers.*.mlp.experts.*, layers.*.norm*]"
    (run,) = align(
        base,
        tmp_path / "out",
        f"[{_stage(base, stage, lr=0.1, steps=4, **more)}]",
        freeze.replace(", layers.*.norm*", ""),
    )
    first, last = _rows(run, "train/dpo_loss")[0], _rows(run, "moe/mean/route_agreement")[-1]
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert _rows(run, "moe/mean/route_agreement")[0] > 0.99 and last < 0.99


def test_a_reward_that_is_none_or_says_nothing_is_told(base: Path, tmp_path: Path) -> None:
    one = _stage(base, "online_dpo", reward={"name": "reward_model", "run": f"{base}/base"}, steps=1, max_new_tokens=8)
    with pytest.raises(moelab.UserError, match=r"alignment\.0\.reward\.run: .*has no head for rewards"):
        align(base, tmp_path / "out", f"[{one}]")
    with pytest.raises(moelab.UserError, match=r"alignment\.0\.reward\.run: .*no such folder"):
        align(base, tmp_path / "out", f"[{one.replace(f'{base}/base', 'runs/nowhere')}]")


@pytest.mark.parametrize(
    ("stage", "more", "said"),
    [
        ("dpo", ["model.moe.router.capacity_factor=1.0", "model.moe.allow_noncausal=true",
                 "train.init_overrides=[model.moe]"], r"router 'sigmoid_topk'.*dpo compares these"),
        ("dpo", ["alignment.0.beta=0"], r"alignment\.0\.beta: must be positive"),
        ("sft", ["alignment.0.data=nowhere.jsonl"], r"alignment\.0\.data: no file or folder 'nowhere.jsonl'"),
        ("sft", ["alignment.0.sequence_length=5"], r"sums\.jsonl:1: .*hold nothing of an answer"),
        ("sft", ["alignment.0.reward={name: length, most: 3}"], r"alignment\.0\.reward: is of online_dpo"),
        ("online_dpo", [], r"alignment\.0\.reward: has no value"),
        ("dpo", ["alignment.0.validation=nowhere.jsonl"], r"alignment\.0\.validation: no file or folder"),
        ("dpo", ["alignment.0.validation_share=1.0"], r"alignment\.0\.validation_share: must be in 0 \.\. 1"),
        ("dpo", ["alignment.0.validation_share=0.001"], r"sums\.jsonl: .*leaves none to be held out"),
        ("reward", ["alignment.0.validation_share=0.5", "alignment.0.validation=x"], r"validation names a file"),
        ("sft", ["train.keep_best=true", "evaluation.every=1"], r"train\.keep_best"),
        ("dpo", ["alignment.0.reference=runs/nowhere"], r"alignment\.0\.reference: .*no such folder"),
        ("sft", ["train.init_from=null"], r"train\.init_from: has no value, and alignment begins with weights"),
        ("sft", ["alignment={stage: sft, data: x, steps: 1}"], r"alignment: is a list of stages"),
        ("sft", ["parallel.shard=2"], r"alignment: is for one process"),
    ],
)  # fmt: skip
def test_what_cant_be_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, stage: str, more: list[str], said: str
) -> None:
    with pytest.raises(moelab.UserError, match=said):
        align(base, tmp_path / "out", f"[{_stage(base, stage)}]", *more)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_stage_is_told_of_by_its_place_in_the_list(base: Path, tmp_path: Path) -> None:
    first = _stage(base, "sft")
    for second, said in (
        (_stage(base, "dpo", data="nowhere.jsonl"), r"alignment\.1\.data: no file or folder"),
        (_stage(base, "online_dpo", max_new_tokens=64, reward={"name": "length", "most": 3}),
         r"alignment\.1\.max_new_tokens: 64 leave no room"),
        (_stage(base, "online_dpo", max_new_tokens=8, reward={"name": "length", "mots": 3}), r"alignment\.1\.reward"),
    ):  # fmt: skip
        with pytest.raises(moelab.UserError, match=said):
            align(base, tmp_path / "out", f"[{first}, {second}]")
    assert not (tmp_path / "out").exists()


def _of_another_tokenizer(folder: Path, other: Path) -> Path:
    """A copy of a checkpoint, whose tokenizer has two bytes in each other's place."""
    shutil.copytree(folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    return other


def test_a_reference_or_a_judge_of_another_tokenizer_is_refused(base: Path, tmp_path: Path) -> None:
    (reward,) = align(base, tmp_path / "reward", f"[{_stage(base, 'reward', steps=1)}]")
    judge = _of_another_tokenizer(_checkpoint(reward), tmp_path / "judge")
    model = {"name": "reward_model", "run": str(judge)}
    with pytest.raises(ConfigError, match=r"alignment\.0\.reward.*another tokenizer than the policy"):
        align(base, tmp_path / "out", f"[{_stage(base, 'online_dpo', reward=model, max_new_tokens=6)}]")
    run = moelab.TrainedRun(base / "base", None)  # type: ignore[arg-type]
    other = _of_another_tokenizer(_checkpoint(run), tmp_path / "other")
    with pytest.raises(ConfigError, match=r"alignment\.0\.reference: .*another tokenizer"):
        align(base, tmp_path / "out", f"[{_stage(base, 'dpo', reference=str(other))}]")


def test_without_trl_there_is_one_message(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment_run, "find_spec", lambda name: None if name == "trl" else object())
    with pytest.raises(ConfigError, match=r"pip install 'moelab\[align\]'"):
        align(base, tmp_path / "out", f"[{_stage(base, 'sft')}]")


def test_moelab_train_hands_it_on(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run by `moelab align`"):
        moelab.train(
            f"run_dir={tmp_path}/out", f"train.init_from={base}/base", "train.steps=1",
            f"alignment=[{_stage(base, 'sft')}]", progress=False,
        )  # fmt: skip


def test_other_examples_are_refused_when_a_run_goes_on(base: Path, tmp_path: Path) -> None:
    data = _lines(tmp_path / "own.jsonl", [_sum(1, 2), _sum(2, 2), _sum(3, 1), _sum(0, 0)])
    one = f"[{_stage(base, 'sft', data=str(data), steps=2)}]"
    align(base, tmp_path / "out", one)
    _lines(data, [_sum(1, 2)])
    with pytest.raises(ConfigError, match=r"alignment\.0\.data: .*trained on other examples"):
        align(
            base,
            tmp_path / "out",
            one.replace('"steps": 2', "").replace("steps: 2", "steps: 4"),
            "schedule.rewarm_steps=0",
            resume=True,
        )
