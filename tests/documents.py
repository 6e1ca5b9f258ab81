"""What the documentation shows: code blocks of Markdown, the commands in them and in tables, those named in a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHELL = ("bash", "sh", "console")  # a block of this language holds nothing but commands and their comments
# What a block begins with that is to be typed into a shell and doesn't say its language: all its lines are commands.
PROGRAMS = (
    "moelab", "torchrun", "python", "python3", "pip", "make", "bash", "tensorboard", "docker", "hf", "git", "sbatch",
    ".", "source", "eval", "export", "cd", "conda", "uv", "wandb", "trackio", "jupyter", "vllm", "llama-cli", "ollama",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A code block; `language` is empty for one without, and for an indented one."""

    document: str
    line: int  # where its text begins, counted from 1
    language: str
    text: str


@dataclass(frozen=True)
class Shown:
    """A command as a document shows it, on one line and without its comment."""

    document: str
    line: int
    text: str


def blocks(path: Path, name: str) -> Iterator[Block]:
    """The fenced and indented code blocks of a Markdown file, in order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        fence = re.match(r"(\s*)```(\S*)", lines[at])
        if fence:
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
            yield Block(name, at + 2, fence[2], "\n".join(lines[at + 1 : end]))
            at = end + 1
        elif lines[at].startswith("    ") and (at == 0 or not _continues(lines[at - 1])):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            yield Block(name, at + 1, "", "\n".join(line[4:] for line in lines[at:end]).rstrip())
            at = end
        else:
            at += 1


def _continues(before: str) -> bool:
    """Whether an indented line after this one is a list item's or a paragraph's, and no code."""
    return bool(before.strip()) and not before.lstrip().startswith("#")


def commands(path: Path, name: str) -> Iterator[Shown]:
    """Every line to be typed into a shell; one that ends in a backslash goes on in the next.

    Then the cells of tables that are nothing but a command.
    """
    for block in blocks(path, name):
        first = (block.text.split() or [""])[0]
        if block.language not in SHELL and (block.language or first not in PROGRAMS):
            continue
        joined = ""
        for offset, line in enumerate(block.text.splitlines()):
            joined += line.rstrip()
            if joined.endswith("\\"):
                joined = joined[:-1].rstrip() + " "
                continue
            text = _command(joined)
            if text:
                yield Shown(name, block.line + offset, text)
            joined = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for typed in re.findall(r"(?<=\|) `([^`]+)` (?=\|)", line):
            if line.startswith("|") and " " in typed and typed.split()[0] in PROGRAMS:
                yield Shown(name, number, typed)


def _command(line: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"(^|\s+)#\s.*", "", line.strip().removeprefix("$ ")))


def named(path: Path) -> Iterator[str]:
    """Commands of ours within a line, between backticks: `moelab verify RUN`."""
    prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for span in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", prose):
        if re.match(r"moelab\s", span):
            yield " ".join(span.split())
