"""What `moelab align` says of examples that are held out: TRL's numbers, as an independent computation has them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl", reason="needs TRL: pip install 'moelab[align]'")

import moelab
from moelab.alignment.examples import Examples, Shaping, read_examples
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.chat import ChatTemplate

TEXT = "".join(f"line {number} says {number * number} and no more.\n" for number in range(200))


def _pair(a: int, b: int) -> dict[str, Any]:
    ask = [{"role": "user", "content": f"{a}+{b}?"}]
    said = [[{"role": "assistant", "content": text}] for text in (str(a + b), "no " * (a + 1) + str(b))]
    return {"messages": ask + said[0], "prompt": ask, "chosen": said[0], "rejected": said[1]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    for name in "ab":
        (folder / f"{name}.txt").write_text(TEXT.replace("says", f"tells {name}"))
    for name, ranged in (("learned", range(4)), ("held_out", range(4, 9))):
        rows = [_pair(a, a + 1) for a in ranged] + [_pair(a, 1) for a in ranged]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    moelab.train(
        "configs/train/tiny_moe.yaml", f"run_dir={folder}/base",
        f"data.source={{name: text, paths: [{folder}/a.txt, {folder}/b.txt]}}", "data.validation_fraction=0.5",
        "train.steps=2", "train.sequence_length=32", "train.threads=1", "evaluation.sequences=2",
        "evaluation.sample_tokens=0", "observers=[]", progress=False,
    )  # fmt: skip
    return folder


def align(base: Path, out: Path, stage: str, *more: str) -> moelab.TrainedRun:
    one = f"{{stage: {stage}, data: {base}/learned.jsonl, steps: 3, sequence_length: 64}}"
    (run,) = moelab.align(
        f"run_dir={out}", f"train.init_from={base}/base", "train.batch_size=4",
        "train.threads=1", "optimizer.lr=0.01", "evaluation.sample_tokens=0", "evaluation.every=2", "observers=[]",
        "train.log_every=1", f"alignment=[{one}]", *more, progress=False,
    )  # fmt: skip
    return run


def examples(base: Path, stage: str) -> Examples:
    return read_examples(base / "held_out.jsonl", Shaping(stage, ChatTemplate.chatml(ByteTokenizer()), 64))


def held_out(run: moelab.TrainedRun) -> list[dict[str, float]]:
    """What was said of what is held out, by evaluation."""
    rows = [{k: v for k, v in row.items() if k.startswith("eval_align/")} for row in run.metrics]
    return [row for row in rows if row]


def _weights(run: moelab.TrainedRun) -> dict[str, torch.Tensor]:
    return dict(load_file(max((run.run_dir / "checkpoints").iterdir()) / "model.safetensors"))


@torch.no_grad()
def _log_probability(model: Any, answer: Any) -> float:
    """Of the learned tokens of one answer, alone in its batch."""
    ids = torch.from_numpy(answer.ids).long()
    scores = model(ids[None]).logits[0].double().log_softmax(-1)
    own = scores[:-1].gather(1, ids[1:, None])[:, 0]
    return float(own[torch.from_numpy(answer.learned[1:])].sum())


def test_of_preferences_loss_margins_and_accuracy_are_those_of_each_pair_alone(base: Path, tmp_path: Path) -> None:
    """10 pairs in batches of 4: the last one counts as much as it holds."""
    run = align(base, tmp_path / "out", "dpo", f"alignment.0.validation={base}/held_out.jsonl", "alignment.0.beta=0.3")
    first, *_, last = held_out(run)
    assert first["eval_align/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval_align/rewards/margins"] == pytest.approx(0, abs=1e-6)
    policy, reference = moelab.load(run.run_dir).eval(), moelab.load(base / "base").eval()
    gains = [
        [0.3 * (_log_probability(policy, side) - _log_probability(reference, side)) for side in row.answers]
        for row in examples(base, "dpo").rows
    ]
    margins = torch.tensor([chosen - rejected for chosen, rejected in gains], dtype=torch.float64)
    assert margins.abs().max() > 0.01
    assert last["eval_align/rewards/margins"] == pytest.approx(float(margins.mean()), abs=2e-4)
    assert last["eval_align/loss"] == pytest.approx(float(-margins.sigmoid().log().mean()), abs=2e-4)
    assert last["eval_align/rewards/accuracies"] == pytest.approx(float((margins > 0).double().mean()))
    assert run.summary["final"]["eval_align/loss"] == last["eval_align/loss"]
    assert run.summary["alignment"]["held_out"]["lines"] == 10


def test_of_a_reward_they_are_those_of_its_head(base: Path, tmp_path: Path) -> None:
    run = align(base, tmp_path / "out", "reward", f"alignment.0.validation={base}/held_out.jsonl")
    judge = moelab.as_classifier(moelab.load(run.run_dir))
    checkpoint = max((run.run_dir / "checkpoints").iterdir())
    with torch.no_grad():
        judge.score.weight.copy_(load_file(checkpoint / "training.safetensors")["head/score.weight"])
        scores = [
            [float(judge.eval()(torch.from_numpy(side.ids).long()[None]).logits[0, 0]) for side in row.answers]
            for row in examples(base, "reward").rows
        ]
    margins = torch.tensor(scores, dtype=torch.float64) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    last = held_out(run)[-1]
    assert last["eval_align/accuracy"] == pytest.approx(float((margins > 0).double().mean()))
    assert last["eval_align/margin"] == pytest.approx(float(margins.mean()), abs=2e-4)
    assert last["eval_align/loss"] == pytest.approx(float(-margins.sigmoid().log().mean()), abs=2e-4)


def test_of_conversations_the_loss_is_a_mean_over_learned_tokens(base: Path, tmp_path: Path) -> None:
    run = align(base, tmp_path / "out", "sft", f"alignment.0.validation={base}/held_out.jsonl")
    model = moelab.load(run.run_dir).eval()
    answers = [row.answers[0] for row in examples(base, "sft").rows]
    nats = -sum(_log_probability(model, answer) for answer in answers)
    tokens = sum(int(answer.learned[1:].sum()) for answer in answers)
    assert held_out(run)[-1]["eval_align/loss"] == pytest.approx(nats / tokens, abs=1e-4)


def test_a_look_at_what_is_held_out_changes_no_weight(base: Path, tmp_path: Path) -> None:
    plain, looked = (
        _weights(align(base, tmp_path / name, "dpo", *more))
        for name, more in (("plain", ()), ("looked", (f"alignment.0.validation={base}/held_out.jsonl",)))
    )
    assert all(torch.equal(looked[name], tensor) for name, tensor in plain.items())


def test_what_is_drawn_of_the_data_is_not_learned_and_what_is_learned_too_is_told(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = align(base, tmp_path / "share", "dpo", "alignment.0.validation_share=0.4")
    assert 0 < run.summary["alignment"]["held_out"]["lines"] < 8
    assert held_out(run)
    assert "are learned" not in caplog.text
    align(base, tmp_path / "same", "dpo", f"alignment.0.validation={base}/learned.jsonl")
    assert "8 of 8 lines are in" in caplog.text


def test_online_preferences_are_judged_by_a_file_of_pairs(base: Path, tmp_path: Path) -> None:
    run = align(
        base, tmp_path / "out", "online_dpo", f"alignment.0.validation={base}/held_out.jsonl",
        "alignment.0.reward={name: length, most: 2, slack: 40}", "alignment.0.samples=3",
        "alignment.0.max_new_tokens=6",
    )  # fmt: skip
    assert held_out(run)[0]["eval_align/loss"] == pytest.approx(math.log(2), abs=1e-6)
