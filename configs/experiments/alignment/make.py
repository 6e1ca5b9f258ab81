"""Writes the experiment's text: two numbers, of which the larger is the answer; no pair stands in two files.

    python configs/experiments/alignment/make.py

What a small model learns in a minute, and a program can check. The files are part of the declaration: `files` of
experiment.yaml hashes them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

LINES = {"chats": 800, "pairs": 480, "prompts": 1600}


def main() -> None:
    pairs = [(first, second) for first in range(10, 100) for second in range(10, 100) if first != second]
    random.Random(0).shuffle(pairs)
    for name, count in LINES.items():
        lines = [json.dumps(_line(name, *pairs.pop())) for _ in range(count)]
        Path(__file__).with_name(f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(name: str, first: int, second: int) -> dict[str, str]:
    prompt, right, wrong = f"{first} {second} > ", str(max(first, second)), str(min(first, second))
    if name == "chats":
        return {"prompt": prompt, "completion": right}
    if name == "pairs":
        return {"prompt": prompt, "chosen": right, "rejected": wrong}
    return {"prompt": prompt, "answer": right}


if __name__ == "__main__":
    main()
