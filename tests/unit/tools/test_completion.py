"""What Tab offers: asked as a shell asks it, through the words of its environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ASK = (
    "import sys; from moelab_tools.cli import main\n"
    "try: main()\n"
    "finally: assert 'torch' not in sys.modules"
)  # fmt: skip


def _ask(shell: str, words: list[str], at: int) -> list[str]:
    told = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(at), "_MOELAB_COMPLETE": f"{shell}_complete"}
    outcome = subprocess.run(
        [sys.executable, "-c", ASK], env=os.environ | told, capture_output=True, text=True, check=False
    )
    assert not outcome.stderr, outcome.stderr
    return outcome.stdout.split()


SOURCES = ("datasets", "debian", "embedded", "jsonl", "parquet", "text", "tokenised", "tokens")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("moelab ru", ["plain,runs"]),
        ("moelab train optimizer.lr", ["plain,optimizer.lr="]),
        ("moelab train a.yaml model.moe.ro", ["plain,model.moe.router.name="]),
        ("moelab train a.yaml model.moe.router.name = sig", ["plain,sigmoid_topk"]),  # bash cuts at the =
        ("moelab train a.yaml data.source.name =", [f"plain,{n}" for n in SOURCES]),
        ("moelab train a.yaml resume = t", ["plain,true"]),
        ("moelab train conf", ["file,conf"]),
        ("moelab upcycle recipe.experts.name = dr", ["plain,drop"]),
        ("moelab plugins softm", ["plain,softmax_topk"]),
        ("moelab config --keys optimizer.w", ["plain,optimizer.weight_decay"]),
    ],
)
def test_bash_is_offered(line: str, offered: list[str]) -> None:
    words = line.split()
    assert _ask("bash", words, len(words) - 1) == offered


def test_a_shell_that_keeps_the_word_whole_is_offered_whole_words() -> None:
    told = _ask("zsh", ["moelab", "train", "model.moe.router.name=sig"], 2)
    assert "model.moe.router.name=sigmoid_topk" in told


def test_no_space_is_put_behind_a_key() -> None:
    source = subprocess.run(
        [sys.executable, "-c", ASK], env=os.environ | {"_MOELAB_COMPLETE": "bash_source"}, capture_output=True,
        text=True, check=False,
    ).stdout  # fmt: skip
    assert "if [[ $value == *= ]]; then compopt -o nospace; fi" in source
