"""`moelab data` on text with planted copies: rate, memory, kills, and how many copies it finds.

    python benchmarks/curate.py --work DIR [--mb 4000] [--kills 20] [--workers 2] [--tokenizer bytes] [--seed 0]
        [--out benchmarks/results]

Documents are drawn word by word; a share of them are written again with some words changed, and their similarity is
computed exactly. The command is run once in peace and once killed by SIGKILL at random moments and started again; the
folders are compared byte for byte. Memory is the largest sum of resident sets of the command and its processes,
looked at ten times a second.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from report import machine, markdown_table, write_results

WORDS, LEAST, MOST = 50_000, 150, 900  # different words; of a document
COPIES = 0.05  # of the documents
SHINGLE = 5
LOOK = 0.1  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=4000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="a folder with room for three times the text")
    parser.add_argument("--tokenizer", help="tokenise too: bytes, or a tokenizer.json")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    planted = write_text(options.work / "text.jsonl", options.mb * 1e6, options.seed)
    command = [
        sys.executable, "-m", "moelab", "data", f"sources=[{{name: jsonl, paths: [{options.work / 'text.jsonl'}]}}]",
        "stages=[{name: normalise}, {name: length, min_words: 50}, {name: repetition}]", f"workers={options.workers}",
        *([f"tokens.tokenizer={options.tokenizer}"] if options.tokenizer else []),
    ]  # fmt: skip
    seconds, peak = watch([*command, f"output={options.work / 'peace'}"])
    chance, killed = random.Random(options.seed), 0
    while killed < options.kills:
        # on the whole as much time as it needs in peace: what was begun and lost makes room for the last kills
        moment = chance.uniform(0, 2 * seconds / (options.kills + 1))
        if watch([*command, f"output={options.work / 'killed'}"], moment)[1]:
            break  # it ended before the moment came
        killed += 1
    if not (options.work / "killed/account.json").exists():
        watch([*command, f"output={options.work / 'killed'}"])
    same = texts(options.work / "peace") == texts(options.work / "killed")
    result = {
        "mb": options.mb, "seconds": seconds, "mb_per_second": options.mb / seconds, "peak_gb": peak / 1e9,
        "kills": killed, "same_bytes": same, **found(options.work / "peace", planted),
    }  # fmt: skip
    table = markdown_table(["figure", "value"], [[key, f"{value:.4g}" if isinstance(value, float) else str(value)]
                                                 for key, value in result.items()])  # fmt: skip
    print(table)
    if options.out:
        write_results(options.out, "curate", machine() | {"workers": options.workers}, result, [table])
    sys.exit(0 if same else 1)


def write_text(path: Path, size: float, seed: int) -> dict[str, float]:
    """JSON lines of about `size` bytes -> {name of a copy: its exact similarity to what it copies}."""
    numbers, written, planted = np.random.default_rng(seed), 0, {}
    words = np.array([f"{'bcdfgklmnprst'[n % 13]}{'aeiou'[n % 5]}{n:x}" for n in range(WORDS)])
    with path.open("w") as file:
        number = 0
        while written < size:
            number += 1
            drawn = (WORDS * numbers.random(numbers.integers(LEAST, MOST)) ** 3).astype(int)  # few words are common
            text = " ".join(words[drawn])
            written += file.write(json.dumps({"text": text}) + "\n")
            if numbers.random() < COPIES:
                number += 1
                other = drawn.copy()
                places = numbers.integers(0, len(drawn), numbers.integers(0, max(2, len(drawn) // 25)))
                other[places] = numbers.integers(0, WORDS, len(places))
                planted[f"{path.name}:{number}"] = similarity(drawn, other)
                written += file.write(json.dumps({"text": " ".join(words[other])}) + "\n")
    return planted


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Exact Jaccard similarity of the sets of SHINGLE words in a row."""
    a, b = ({tuple(words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1)} for words in (one, other))
    return len(a & b) / len(a | b)


def watch(command: list[str], kill_after: float | None = None) -> tuple[float, int]:
    """-> (seconds, largest resident bytes of all its processes); (seconds, 0) where it was killed."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None:
        if kill_after is not None and time.perf_counter() - began > kill_after:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return time.perf_counter() - began, 0
        peak = max(peak, resident(process.pid))
        time.sleep(LOOK)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - began, max(peak, 1)


def resident(group: int) -> int:
    """Bytes that the processes of a process group share or own in memory (Pss, which counts shared pages once)."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[2]) != group:
                continue
            told = (status.parent / "smaps_rollup").read_text()
        except (OSError, ValueError):
            continue  # it is gone
        total += int(re.findall(r"^Pss:\s+(\d+)", told, re.MULTILINE)[0]) * 1024
    return total


def texts(folder: Path) -> dict[str, str]:
    """{file: sha256} of all but the account, which names the output."""
    files = [path for part in ("kept", "tokens") for path in sorted((folder / part).glob("*"))]
    found = {}
    for path in files:
        with path.open("rb") as content:
            found[str(path.relative_to(folder))] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def found(folder: Path, planted: dict[str, float]) -> dict[str, Any]:
    """Which planted copies are gone, by their similarity, and how many others."""
    kept = set()
    for path in sorted((folder / "kept").iterdir()):
        with gzip.open(path, "rt") as lines:
            kept |= {json.loads(line)["name"] for line in lines}
    account = json.loads((folder / "account.json").read_text())["account"]
    read, near = sum(account["documents"].values()), [name for name, share in planted.items() if share >= 0.8]
    gone = read - len(kept)
    copies = sum(name not in kept for name in planted)
    return {
        "documents": read,
        "near_copies_planted": len(near),
        "near_copies_found": sum(name not in kept for name in near) / max(1, len(near)),
        "others_dropped": (gone - copies) / max(1, read - len(planted)),
    }


if __name__ == "__main__":
    main()
