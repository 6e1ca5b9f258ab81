"""Flip one bit of a checkpoint, ask every command that reads it, put the bit back; and again.

    python benchmarks/bit_flips.py --flips 200 --seed 0

A tiny run is trained; then each flip hits a random bit of a random file, of a file of tensors a random bit of its
header or of a random tensor. `generate`, `evaluate`, `export`, `verify` and `train --resume` are run as from a
terminal, in this process. Noticed means: exit code 2 (verify: 1), the file named, the tensor named if the bit lies in
one, and nothing written. The run has one checkpoint, so there is no earlier one to go on from.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from moelab.checkpoint import newest_checkpoint
from moelab.manifest import MANIFEST
from moelab_tools import cli

SETTINGS = [
    "configs/train/tiny_moe.yaml", "model.num_hidden_layers=2", "train.steps=3", "train.batch_size=2",
    "train.sequence_length=32", "train.save_every=0", "train.threads=1", "evaluation.sequences=2",
    "evaluation.sample_tokens=0", "data.source.domains=[code_py]", "data.source.max_bytes_per_domain=40000",
    "observers=[]",
]  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent


def command(arguments: list[str]) -> tuple[int, str]:
    """(exit code, all that was said)."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.run(arguments)
    return code, said.getvalue()


def places(folder: Path) -> list[tuple[str, str, int, int]]:
    """(file, tensor or nothing, first byte, bytes): what a flip may hit."""
    found = [(MANIFEST, "", 0, (folder / MANIFEST).stat().st_size)]
    for name, said in json.loads((folder / MANIFEST).read_bytes())["files"].items():
        found.append((name, "", 0, said.get("header", said)["bytes"]))
        found += [(name, tensor, it["offset"], it["bytes"]) for tensor, it in said.get("tensors", {}).items()]
    return found


def flip(path: Path, byte: int, bit: int) -> None:
    """In place."""
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 1 << bit]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    noticed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        run, output = Path(place) / "run", Path(place) / "out"
        settings = [str(ROOT / SETTINGS[0]), *SETTINGS[1:], f"run_dir={run}"]
        code, said = command(["train", *settings])
        checkpoint = newest_checkpoint(run)
        assert code == 0, said
        assert checkpoint is not None
        commands = {
            "generate": ["generate", str(run), "--tokens", "1"],
            "evaluate": ["evaluate", str(run)],
            "export": ["export", str(run), str(output)],
            "verify": ["verify", str(run)],
            "resume": ["train", *settings, "--resume"],
        }
        targets, hit = places(checkpoint), set()
        for number in range(options.flips):
            file = chance.choice(sorted({target[0] for target in targets}))
            name, tensor, begin, size = chance.choice([target for target in targets if target[0] == file])
            byte, bit = begin + chance.randrange(size), chance.randrange(8)
            hit.add((name, tensor))
            flip(checkpoint / name, byte, bit)
            before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
            for label, arguments in commands.items():
                code, said = command(arguments)
                named = f"{name}: " in said and tensor in said
                untouched = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
                right = code == (1 if label == "verify" else 2) and named and untouched and not output.exists()
                noticed[label] += right
                if not right:
                    print(f"flip {number}, {name} {tensor} byte {byte} bit {bit}: {label} {code}: {said}", flush=True)
            flip(checkpoint / name, byte, bit)
        for label, arguments in commands.items():
            code, said = command(arguments)
            assert code == 0, (label, said)
    for label in commands:
        print(f"{label}: {noticed[label]} of {options.flips} noticed")
    print(f"in {len({name for name, _ in hit})} files, {len({place for place in hit if place[1]})} different tensors")
    sys.exit(any(noticed[label] != options.flips for label in commands))


if __name__ == "__main__":
    main()
