"""Texts held against what lm-evaluation-harness asks, by a task of its own kind that needs no network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moelab import ConfigError, Document, FilterContext, Places, Registry, Rejected
from moelab.hookspecs import TEXT_FILTERS

if not os.environ.get("MOELAB_REQUIRE_EXTRAS"):
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval: make test-extras")

TASK = """task: roads
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_text: '{{question}}'
doc_to_target: '{{answer}}'
"""


def test_what_a_task_asks_is_found_in_a_text(tmp_path: Path) -> None:
    question = "How many roads must a man walk down before you call him one of those?"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": question, "answer": "forty two"}) + "\n")
    (tmp_path / "roads.yaml").write_text(TASK.replace("ROWS", str(tmp_path / "rows.jsonl")))
    registry, context = Registry(entry_points=False, points=[TEXT_FILTERS]), FilterContext(Places(search=(tmp_path,)))
    part = {"name": "decontaminate", "tasks": ["roads.yaml"]}
    apply = registry.build(TEXT_FILTERS, part, context, "stages.0")
    held = apply(Document(f"She asked: {question.upper()} He did not know.", "d", "n"))
    assert isinstance(held, Rejected) and held.measured.startswith("roads: 'how many roads must a man")
    assert isinstance(apply(Document("The answer is forty two.", "d", "n")), Document)


def test_a_name_that_lm_eval_has_not_is_one_line() -> None:
    registry = Registry(entry_points=False, points=[TEXT_FILTERS])
    with pytest.raises(ConfigError, match="lm-eval has no task 'no_such_task'"):
        registry.build(TEXT_FILTERS, {"name": "decontaminate", "tasks": ["no_such_task"]}, FilterContext(), "stages.0")
