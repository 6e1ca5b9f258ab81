"""`moelab chat` and `moelab generate` with a file: what is asked, what is written, and what a folder's settings do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import moelab
from moelab.config.model import ModelConfig
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.errors import UserError
from moelab.hf.save import save_hf
from moelab.nn.generate import generate
from moelab.nn.sampling import Sampling
from moelab_tools.cli import moelab as program
from moelab_tools.cli import run
from moelab_tools.talking import Talk

MODEL = ModelConfig(
    vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=4096, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_hf(moelab.build(MODEL), tmp_path / "hf", dtype=torch.float32, extra_files=ByteTokenizer().files())
    return tmp_path / "hf"


def test_a_turn_follows_what_was_said_and_is_remembered(folder: Path):
    talk = Talk.open(folder, {"max_new_tokens": 12, "temperature": 0.0}, system="Be brief.")
    first = "".join(talk.answer("<|endoftext|>hello"))
    assert [turn["role"] for turn in talk.messages] == ["system", "user", "assistant"]
    assert talk.messages[-1]["content"] == first
    rendered = talk.template.render(talk.messages, add_generation_prompt=True)
    assert (rendered.ids == 256).sum() == 7, "what is typed is no control token"
    ids = talk.template.render(talk.messages[:2], add_generation_prompt=True).ids.tolist()
    sampling = Sampling(12, temperature=0.0, end_token_ids=(256,))
    said = [i for i in generate(talk.model, ids, sampling) if i != 256]
    assert first == ByteTokenizer().decode(said)
    talk.begin()
    assert "".join(talk.answer("<|endoftext|>hello")) == first


def test_lines_of_the_input_are_turns(folder: Path):
    arguments = ["chat", str(folder), "--temperature", "0", "--tokens", "5"]
    found = CliRunner().invoke(program, arguments, input="hello\n/new\nhello\n\nnot read\n")
    assert found.exit_code == 0
    assert "the built-in ChatML" in found.stderr
    first, second = found.stdout.splitlines()
    assert first == second


def test_input_that_is_no_text_is_refused(folder: Path):
    found = CliRunner().invoke(program, ["chat", str(folder)], input=b"\xff\xfe\n")
    assert isinstance(found.exception, UserError)
    assert "stdin: can't be read" in str(found.exception)


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_an_answer_has_at_least_one_token(command: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    for tokens in ("0", "-1"):
        assert run([command, str(folder), "--tokens", tokens]) == 2
        told = capsys.readouterr()
        assert "--tokens" in told.err and "x>=1" in told.err and "template" not in told.err


def test_a_file_of_prompts_becomes_a_file_of_texts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [{"prompt": "def ", "answer": 5}, {"messages": [{"role": "user", "content": "hi"}]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["generate", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--tokens", "6", "--samples", "2"]
    assert run([*arguments, "--out", str(tmp_path / "o.jsonl")]) == 0
    assert "4 texts to 2 prompts" in capsys.readouterr().err
    found = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [(one["sample"], one.get("answer")) for one in found] == [(0, 5), (1, 5), (0, None), (1, None)]
    assert found[0]["text"] != found[1]["text"]
    assert found[2]["prompt"] == "<|endoftext|>user\nhi<|endoftext|>\n<|endoftext|>assistant\n"
    assert run([*arguments, "--batch-size", "1"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "p.jsonl", "--prompt", "x"], "--prompts: a file of prompts and --prompt at once"),
        (["--prompts", "p.jsonl"], r"p.jsonl:1: must hold either"),
        (["--temperature", "-1"], "temperature must be 0 (greedy) or more, not -1.0"),
        (["--samples", "0"], "samples and batch_size must be at least 1"),
        (["--top-p", "0"], "top_p must be in 0 .. 1"),
    ],
)
def test_what_has_no_sense_is_refused(
    arguments: list[str],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(folder.parent)
    Path("p.jsonl").write_text('{"question": 1}\n')
    assert run(["generate", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_says_how_it_wants_to_be_drawn_from(folder: Path, capsys: pytest.CaptureFixture[str]):
    """do_sample false is greedy; an option is above the file; a value without sense is named with the file."""

    def text(*options: str) -> str:
        assert run(["generate", str(folder), "--tokens", "9", "--json", *options]) == 0
        written: str = json.loads(capsys.readouterr().out)[0]["text"]
        return written

    greedy = text("--temperature", "0")
    assert text() != greedy
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9}')
    assert text() == greedy
    assert text("--temperature", "1.0") != greedy
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 1}')
    assert text() == greedy
    (folder / "generation_config.json").write_text('{"top_k": "many"}')
    assert run(["generate", str(folder)]) == 2
    assert "generation_config.json: top_k" in capsys.readouterr().err
