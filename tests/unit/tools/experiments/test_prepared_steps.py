"""Steps that are no weights of pre-training: a corpus that all seeds read, and stages of post-training, one a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelab.errors import ConfigError
from moelab_tools.experiments.arms import Arms
from moelab_tools.experiments.conduct import ExperimentRequest, run_experiment
from moelab_tools.experiments.declaration import read_declaration
from moelab_tools.experiments.prepared import Preparation
from moelab_tools.sweep.launch import Outcome, launch
from sweeping import ROOT, TINY, InProcess, quiet

DECISION = dict.fromkeys(("better", "worse", "negligible", "not resolved"), "x")
LICENCE = f'[{{name: text, paths: [{ROOT / "LICENSE"}], separator: "\\n\\n"}}]'
CORPUS = [f"sources={LICENCE}", "stages=[{name: normalise}]", "tags=[{name: size, borders: [300]}]",
          "deduplicate.near=null", "tokens.tokenizer=bytes", "tokens.validation_fraction=0.2", "workers=1"]  # fmt: skip
READS = ["data.source={name: tokenised, domain_by: [size]}", "data.source.path=@corpus/tokens"]
DECLARED: dict[str, Any] = {
    "question": "Do equal shares matter?",
    "configs": [*TINY, *READS],
    "prepare": [{"name": "corpus", "data": CORPUS}],
    "variants": {"natural": [], "equal": ["data.mixer={name: balanced}"]},
    "baseline": "natural", "seeds": "0..2", "decision": DECISION,
}  # fmt: skip


def declare(folder: Path, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(DECLARED | changed, sort_keys=False))
    return folder


def run(folder: Path, worker: InProcess, seeds: list[int], **given: Any) -> dict[str, Outcome]:
    """Preparation and all variants of these seeds, without looks and findings."""
    out, declaration = folder.parent / "out", read_declaration(folder)
    arms = Arms(declaration, out, Preparation(declaration, out, **given), **given)
    return launch(arms.tasks(seeds), worker, quiet(), at_once=1)


def test_a_corpus_is_made_once_before_all_seeds_and_another_is_not_read_in_its_place(tmp_path: Path) -> None:
    """One of the runs is enough to see that it is read; of the others there are plans alone."""
    really = ("corpus", "equal_seed1")
    folder, worker = declare(tmp_path / "mixtures"), InProcess(before=lambda name: None if name in really else 0)
    run(folder, worker, [0, 1])
    runs = [f"{variant}_seed{seed}" for seed in (0, 1) for variant in ("natural", "equal")]
    assert worker.started == ["corpus", *runs]
    corpus = tmp_path / "out/prepared/corpora/corpus/tokens"
    for name in runs:
        config = yaml.safe_load((tmp_path / f"out/configs/{name}.yaml").read_text())
        assert config["data"]["source"]["path"] == str(corpus)
    summary = json.loads((tmp_path / "out/runs/equal_seed1/summary.json").read_text())
    assert summary["status"] == "finished"
    assert set(summary["data"]["mixture"]) == {"0-299", "300+"}
    again = InProcess(before=lambda name: 0)
    run(folder, again, [1])
    assert again.started == ["natural_seed1"]
    declare(folder, prepare=[{"name": "corpus", "data": [*CORPUS, "deduplicate.exact=false"]}])
    found = run(folder, again, [1])
    assert "was made of something else; give --force" in found["corpus"].why
    assert not found["natural_seed1"].well
    assert again.started == ["natural_seed1"]


CHATS = [{"messages": [{"role": "user", "content": f"{n} + 1"}, {"role": "assistant", "content": f"{n + 1}"}]}
         for n in range(8)]  # fmt: skip
PAIRS = [{"prompt": f"{n} + 1", "chosen": f"{n + 1}", "rejected": f"{n}"} for n in range(8)]
STAGED: dict[str, Any] = {
    "question": "Does a frozen router matter?",
    "configs": ["train.init_from=@chat", "alignment=[{stage: dpo, data: pairs.jsonl, epochs: 1}]"],
    "files": ["chats.jsonl", "pairs.jsonl"],
    "prepare": [
        {"name": "base", "train": TINY},
        {"name": "chat", "align": ["train.init_from=@base", "alignment=[{stage: sft, data: chats.jsonl, epochs: 1}]"]},
    ],
    "variants": {"learns": [], "frozen": ["alignment.0.router=freeze"]},
    "baseline": "learns",
}


def test_stages_of_post_training_are_made_for_each_seed_from_the_step_before_and_so_are_variants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned of what weights will be, none of which is there; nothing is trained."""
    (tmp_path / "stages").mkdir()
    for name, lines in (("chats", CHATS), ("pairs", PAIRS)):
        (tmp_path / "stages" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder, worker = declare(tmp_path / "stages", **STAGED), InProcess(before=lambda name: 0)
    monkeypatch.chdir(folder)
    run(folder, worker, [1])
    assert worker.started == ["base_seed1", "chat_seed1", "learns_seed1", "frozen_seed1"]
    assert [command[0] for command in worker.commands] == ["train", "align", "align", "align"]
    chat, frozen = (yaml.safe_load(Path(worker.commands[n][1]).read_text()) for n in (1, 3))
    assert chat["train"]["init_from"] == str(tmp_path / "out/prepared/runs/base_seed1")
    assert frozen["train"]["init_from"] == str(tmp_path / "out/prepared/runs/chat_seed1")
    orders = [(one["seed"], one["data"]["order_seed"]) for one in (chat, frozen)]
    assert orders == [(1, 1001), (1, None)], "of its own seed, not that of the run that it starts from"


def test_what_is_wrong_in_the_config_of_a_corpus_is_told_before_anything_runs(tmp_path: Path) -> None:
    folder = declare(tmp_path / "mixtures", prepare=[{"name": "corpus", "data": [*CORPUS, "deduplicate.nere=0.5"]}])
    with pytest.raises(ConfigError, match=r"deduplicate\.nere: .*did you mean 'near'.*in the step corpus of"):
        run_experiment(ExperimentRequest(folder, out=tmp_path / "out"), quiet(), InProcess())
    assert not (tmp_path / "out").exists()
