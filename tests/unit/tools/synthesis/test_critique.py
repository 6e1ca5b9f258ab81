"""Answers, critiques and revisions: what is asked, what becomes a line or a pair, and that nothing hangs on batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import scripted_generator
from moelab import Question, Reply
from moelab.alignment.examples import Shaping, read_examples
from moelab.config.load import load_config
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.chat import ChatTemplate
from moelab.data.generating import Guarded
from moelab.errors import ConfigError, DataError, UserError
from moelab.plugin_faults import PluginPart
from moelab_tools.cli import moelab as program
from moelab_tools.synthesis.asking import Asker, Memory
from moelab_tools.synthesis.declaration import CritiqueConfig
from moelab_tools.synthesis.steps import critique

PRINCIPLES = "principles: [{name: kind, follow: Be kind., avoid: Be rude.}, {follow: Be short.}]\n"
SCRIPTED = ["plugins=[scripted_generator]", "generator.name=scripted", "entry_points=false"]


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    scripted_generator.BATCHES.clear()
    scripted_generator.SCRIPTS.clear()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(folder: Path, prompts: list[Any]) -> Path:
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    (folder / "principles.yaml").write_text(PRINCIPLES)
    return path


def make(folder: Path, prompts: list[Any], *more: str, output: str = "out") -> Path:
    asked(folder, prompts)
    arguments = [str(folder / "principles.yaml"), "data=[asked.jsonl]", f"output={folder / output}", *SCRIPTED, *more]
    return critique(load_config(arguments, CritiqueConfig))[1]


def by_role(question: Question) -> Reply:
    """A better answer each time, and a critique that quotes what it is about."""
    last, turns = question.messages[-1]["content"], len(question.messages)
    if "specific ways" in last:
        return Reply(f"critique of {question.messages[-2]['content']}")
    return Reply("first answer" if turns == 1 else f" revision after {turns} turns ")


def test_a_revision_is_learned_and_preferred_to_the_answer_with_where_it_is_from(tmp_path: Path) -> None:
    scripted_generator.SCRIPTS["by_role"] = by_role
    out = make(tmp_path, ["Say hello."], "generator.script=by_role", "principles=[{name: kind, follow: Be kind.}]")
    (learned,), (pair,) = rows_of(out / "sft.jsonl"), rows_of(out / "pairs.jsonl")
    user = [{"role": "user", "content": "Say hello."}]
    revision = [{"role": "assistant", "content": "revision after 5 turns"}]
    assert (learned["prompt"], learned["completion"]) == (user, revision)
    assert (pair["prompt"], pair["chosen"]) == (user, revision)
    assert pair["rejected"] == [{"role": "assistant", "content": "first answer"}]
    source = pair["source"]
    assert source["step"] == "constitution" and source["from"] == f"{tmp_path}/asked.jsonl:1"
    assert source["principles"] == ["kind"] and source["critiques"] == ["critique of first answer"]
    assert source["generator"]["name"] == "scripted" and source["seed"] == 0
    critique_asked, revision_asked = (batch[0].messages for batch in scripted_generator.BATCHES[1:])
    assert "Be kind." in critique_asked[-1]["content"] and "Be kind." in revision_asked[-1]["content"]
    assert [turn["role"] for turn in revision_asked] == ["user", "assistant", "user", "assistant", "user"]


def test_each_revision_starts_from_the_last_and_all_of_them_are_learned(tmp_path: Path) -> None:
    scripted_generator.SCRIPTS["count"] = lambda q: Reply(f"{len(scripted_generator.BATCHES)}")
    out = make(tmp_path, ["a"], "generator.script=count", "revisions=3", "critique=false")
    answers = [row["completion"][0]["content"] for row in rows_of(out / "sft.jsonl")]
    (pair,) = rows_of(out / "pairs.jsonl")
    assert answers == ["2", "3", "4"]
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("4", "1")
    assert len(pair["source"]["principles"]) == 3 and "critiques" not in pair["source"]
    assert [batch[0].messages[1]["content"] for batch in scripted_generator.BATCHES[1:]] == ["1", "2", "3"]


def test_an_answer_that_keeps_to_a_principle_is_preferred_to_one_told_to_break_it(tmp_path: Path) -> None:
    def obeys(question: Question) -> Reply:
        return Reply("bad" if "breaks a principle" in question.messages[0]["content"] else "good")

    scripted_generator.SCRIPTS["obeys"] = obeys
    system = [{"role": "system", "content": "You are a clerk."}, {"role": "user", "content": "Hello?"}]
    out = make(tmp_path, ["Hello?", system], "generator.script=obeys", "method=contrast")
    pairs = rows_of(out / "pairs.jsonl")
    said = [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs]
    assert said == [("good", "bad")] * 2
    assert pairs[1]["prompt"] == system, "the rule is not part of what is learned"
    follow = scripted_generator.BATCHES[0][1].messages
    assert follow[0]["content"].startswith("You are a clerk.\n\nKeep to this principle") and len(follow) == 2


def test_what_was_cut_off_empty_or_not_changed_is_counted_and_makes_no_pair(tmp_path: Path) -> None:
    def fails(question: Question) -> Reply:
        first = question.messages[0]["content"]
        if first == "cut" and len(question.messages) > 1:
            return Reply("half", ended=False)
        return Reply({"empty": " ", "same": "same"}.get(first, str(len(question.messages))))

    scripted_generator.SCRIPTS["fails"] = fails
    out = make(tmp_path, ["cut", "empty", "same", "fine", "fine"], "generator.script=fails", "critique=false")
    account = json.loads((out / "synthesis.json").read_text())
    counts = {"prompts": 4, "repeated": 1, "cut": 2, "unchanged": 1, "sft": 2, "pairs": 1}
    assert counts.items() <= account.items()
    assert [row["prompt"][0]["content"] for row in rows_of(out / "sft.jsonl")] == ["same", "fine"]
    assert not any(q.messages[0]["content"] == "empty" for q in scripted_generator.BATCHES[1]), "asked in vain"


def test_neither_batches_nor_the_order_of_prompts_change_a_line(tmp_path: Path) -> None:
    prompts = [f"question {number}" for number in range(7)]
    made = []
    for number, (size, order) in enumerate([(1, prompts), (3, prompts), (32, prompts[::-1])]):
        (tmp_path / str(number)).mkdir()
        out = make(tmp_path / str(number), order, f"batch_size={size}", "revisions=2")
        rows = [json.dumps(row).replace(f"{tmp_path / str(number)}/", "") for row in rows_of(out / "pairs.jsonl")]
        made.append(rows)
    assert made[0] == made[1]
    assert {row["chosen"][0]["content"] for row in map(json.loads, made[0])} == {
        row["chosen"][0]["content"] for row in map(json.loads, made[2])
    }
    (tmp_path / "alone").mkdir()
    (alone,) = rows_of(make(tmp_path / "alone", prompts[3:4], "revisions=2") / "pairs.jsonl")
    whole = json.loads(made[0][3])
    assert (alone["chosen"], alone["rejected"]) == (whole["chosen"], whole["rejected"])
    assert len(set(made[0])) == 7
    drawn = {row["source"]["principles"][0] for row in map(json.loads, made[0])}
    assert drawn == {"kind", "principle 2"}
    assert made[0] != [json.dumps(row) for row in rows_of(make(tmp_path, prompts, "seed=1") / "pairs.jsonl")]


def test_what_another_generator_said_before_a_stop_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    prompts = [f"question {number}" for number in range(5)]
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, prompts, "batch_size=2", "generator.stop_after=4")
    assert (tmp_path / ".out.replies").is_dir() and not (tmp_path / "out").exists()
    scripted_generator.BATCHES.clear()
    make(tmp_path, prompts, "batch_size=2", "generator.stop_after=98")
    assert sum(map(len, scripted_generator.BATCHES)) == 15


def test_the_same_words_with_another_seed_are_another_question(tmp_path: Path) -> None:
    asked = [Question([{"role": "user", "content": "Draw."}], seed) for seed in (1, 2, 1)]
    guarded = Guarded(lambda some: [Reply(str(one.seed)) for one in some], PluginPart("generator", "x", "y"))
    ask = Asker(guarded, {}, Memory(tmp_path / "memory"), batch_size=8)
    assert [reply.text for reply in ask(asked, "drawing")] == ["1", "2", "1"]
    assert ask.asked == 2
    again = Asker(guarded, {}, Memory(tmp_path / "memory"), batch_size=8)
    assert [reply.text for reply in again(asked, "drawing")] == ["1", "2", "1"]
    assert again.asked == 0


def test_a_command_that_was_stopped_goes_on_to_the_same_bytes_and_asks_nothing_twice(tmp_path: Path) -> None:
    prompts = [f"question {number}" for number in range(5)]
    whole = make(tmp_path, prompts, "batch_size=2", output="whole")
    batches, calls = len(scripted_generator.BATCHES), 0

    def stops(question: Question) -> Reply:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return scripted_generator.echo(question)

    scripted_generator.SCRIPTS["echo"] = stops
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, prompts, "batch_size=2")
    assert not (tmp_path / "out").exists()
    memory = next((tmp_path / ".out.replies").iterdir())
    memory.write_bytes(memory.read_bytes()[:-9])  # killed in the middle of a line
    scripted_generator.SCRIPTS.clear()
    scripted_generator.BATCHES.clear()
    out = make(tmp_path, prompts, "batch_size=2")
    assert 0 < len(scripted_generator.BATCHES) < batches
    for name in ("sft.jsonl", "pairs.jsonl", "synthesis.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not (tmp_path / ".out.replies").exists()


def test_what_is_made_can_be_learned_from_as_it_is(tmp_path: Path) -> None:
    out = make(tmp_path, ["one", [{"role": "system", "content": "s"}, {"role": "user", "content": "two"}]])
    template = ChatTemplate.chatml(ByteTokenizer())
    for name, stage in (("sft", "sft"), ("pairs", "dpo"), ("pairs", "reward")):
        assert len(read_examples(out / f"{name}.jsonl", Shaping(stage, template, 5000)).rows) == 2


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (["principles=[]"], ConfigError, "principles: has none"),
        (["principles=[{follow: ' '}]"], ConfigError, r"principles\.0\.follow: is empty"),
        (["principles=[{follow: a, name: x}, {follow: b, name: x}]"], ConfigError, "two are called 'x'"),
        (["method=revised"], ConfigError, "method: must be revise or contrast"),
        (["revisions=0"], ConfigError, "revisions: must be at least 1"),
        (["generator.name=skripted"], ConfigError, r"generator\.name: no generator 'skripted', did you mean"),
        (["generator.name="], ConfigError, "generator: has no name"),
        (["data=[none.jsonl]"], DataError, "data: no file or folder 'none.jsonl'"),
        (["batch_size=0"], ConfigError, "batch_size: must be at least 1"),
    ],
)
def test_what_cant_be_asked_is_told_and_nothing_is_written(
    tmp_path: Path, more: list[str], kind: type[UserError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make(tmp_path, ["a"], *more)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.jsonl", "principles.yaml"]
    assert not scripted_generator.BATCHES


def test_a_prompt_that_ends_with_an_answer_is_told_with_its_line(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"asked\.jsonl:2: messages: ends with a turn of assistant"):
        make(tmp_path, ["fine", turns])


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (lambda q: "text", r"generator: generator 'scripted' of scripted_generator: returned a str among its replies"),
        (
            lambda q: 1 / 0,
            r"generator 'scripted' of scripted_generator: raised ZeroDivisionError: .*scripted_generator",
        ),
    ],
)
def test_a_strangers_generator_that_breaks_its_promise_is_named(tmp_path: Path, script: Any, message: str) -> None:
    scripted_generator.SCRIPTS["odd"] = script
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, ["a"], "generator.script=odd")
    assert not (tmp_path / "out").exists()


def test_the_command_tells_what_became_of_the_prompts_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(tmp_path, ["a", "b", "a"])
    monkeypatch.chdir(tmp_path)
    arguments = ["critique", "principles.yaml", "data=[asked.jsonl]", "output=out", *SCRIPTED]
    found = CliRunner().invoke(program, arguments)
    assert found.exit_code == 0, found.output
    assert "2 prompts, 1 more came again" in found.output and "2 lines to learn from, 2 pairs" in found.output
    again = CliRunner().invoke(program, arguments)
    assert isinstance(again.exception, ConfigError) and "exists already" in str(again.exception)
