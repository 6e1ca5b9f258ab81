"""Damages every kind of input that moelab reads, and tells what is answered badly.

    python tests/hostile/fuzz.py --inputs 20000 --seed 7 --jobs 2 --out DIR     goes on where DIR says it stopped
    python tests/hostile/fuzz.py --seed 7 --only config_json:1234                one input again; its folder is kept

An input is its kind, the seed and a number: the same three make the same input anywhere. What fails is tried again with
fewer of its mutations, and each distinct failure is told once, with the fewest that still show it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fuzz_judge import judge_command, judge_readers
from fuzz_kinds import KINDS
from fuzz_mutate import fresh_copy, mutate
from fuzz_world import make_world

FORKS = 0.5  # of the inputs by hand go through a whole command


@dataclass(frozen=True)
class Input:
    """`steps`: which of its mutations are made; None: all."""

    kind: str
    seed: int
    number: int
    forks: float = FORKS
    steps: tuple[int, ...] | None = None

    def chance(self, purpose: object) -> random.Random:
        return random.Random(f"{self.seed}/{self.kind}/{self.number}/{purpose}")

    @property
    def count(self) -> int:
        return self.chance("count").choice((1, 1, 1, 2, 3))


def answer(one: Input, world: Path, scratch: Path) -> tuple[str | None, list[str]]:
    """(what is wrong or None, what was done) of one input; its folder is left in `scratch`."""
    kind, done = KINDS[one.kind], []
    fresh_copy(world, kind.parts, scratch)
    chance = one.chance("who reads")
    group = chance.choice(kind.groups)
    command = chance.choice(group.commands)
    for step in range(one.count) if one.steps is None else one.steps:
        own = one.chance(step)
        if kind.arguments is not None:
            command, said = kind.arguments(command, own)
        else:
            files = sorted(path for path in scratch.glob(own.choice(group.damaged)))
            said = mutate(own.choice(files), own) if files else "nothing is left"
        done.append(said)
    forked = not group.readers or chance.random() < one.forks
    wrong = (
        judge_command(command, scratch, scratch.parent if kind.own else scratch)
        if forked
        else judge_readers(group.readers, scratch)
    )
    return wrong, [*done, f"moelab {' '.join(ascii(word)[:80] for word in command)}" if forked else "readers"]


def minimal(one: Input, wrong: str, world: Path, scratch: Path) -> tuple[Input, list[str]]:
    """The same failure by fewer mutations."""
    steps = tuple(range(one.count))
    for step in steps:
        fewer = Input(one.kind, one.seed, one.number, one.forks, tuple(s for s in steps if s != step))
        if len(steps) > 1 and fewer.steps and signature(answer(fewer, world, scratch)[0]) == signature(wrong):
            steps = fewer.steps
    least = Input(one.kind, one.seed, one.number, one.forks, steps)
    return least, answer(least, world, scratch)[1]


def signature(wrong: str | None) -> str:
    """What makes a failure distinct: its kind and place, not the values in its message."""
    return "" if wrong is None else ":".join(wrong.split(":")[:3])[:120]


def fuzz(inputs: Iterator[Input], world: Path, scratch: Path, out: Path | None = None) -> dict[str, str]:
    """Try all of these; -> {signature: how to see it again}. Prints as it goes; `out` gets a line an input."""
    tried, bad, found, begun = Counter[str](), Counter[str](), dict[str, str](), time.monotonic()
    for one in inputs:
        wrong, _ = answer(one, world, scratch)
        tried[one.kind] += 1
        if wrong is not None:
            bad[one.kind] += 1
            if signature(wrong) not in found:
                least, done = minimal(one, wrong, world, scratch)
                steps = ",".join(map(str, least.steps or ()))
                told = f"{wrong}\n    --seed {one.seed} --only {one.kind}:{one.number}:{steps}  {'; '.join(done)}"
                found[signature(wrong)] = told
                print(f"BAD {told}", flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps([one.kind, one.number, wrong]) + "\n")
        if sum(tried.values()) % 500 == 0:
            print(f"{sum(tried.values())} tried, {sum(bad.values())} bad, {time.monotonic() - begun:.0f} s", flush=True)
    for kind in tried:
        print(f"{kind:12} {tried[kind]:6} tried {bad[kind]:4} bad")
    print(f"{sum(tried.values())} tried, {sum(bad.values())} bad, {len(found)} distinct", flush=True)
    return found


def inputs_of(
    seed: int, count: int, kinds: list[str], forks: float, share: tuple[int, int] = (0, 1)
) -> Iterator[Input]:
    """`count` inputs, the kinds in turn; `share`: (k, n) is every n-th from the k-th on."""
    for place in range(share[0], count, share[1]):
        yield Input(kinds[place % len(kinds)], seed, place // len(kinds), forks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--forks", type=float, default=FORKS, help="share of inputs that go through a whole command")
    parser.add_argument("--out", type=Path, help="a folder that keeps what was tried, and goes on from it")
    parser.add_argument("--only", help="KIND:NUMBER or KIND:NUMBER:STEPS, as a failure is told")
    asked = parser.parse_args()
    logging.getLogger("moelab").addHandler(logging.NullHandler())
    place = Path(tempfile.mkdtemp(prefix="moelab-fuzz-"))
    (place / "world").mkdir()
    make_world(place / "world")
    if asked.only:
        kind, number, *steps = asked.only.split(":")
        chosen = tuple(map(int, steps[0].split(","))) if steps else None
        print(
            *answer(Input(kind, asked.seed, int(number), asked.forks, chosen), place / "world", place / "one"), sep="\n"
        )
        print(place / "one")
        return 0
    children = []
    for job in range(asked.jobs):
        child = os.fork()
        if child == 0:
            found = fuzz(_rest(asked, job), place / "world", place / f"job{job}", _record(asked, job))
            os._exit(1 if found else 0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def _record(asked: argparse.Namespace, job: int) -> Path | None:
    if asked.out is None:
        return None
    asked.out.mkdir(parents=True, exist_ok=True)
    return Path(asked.out) / f"seed{asked.seed}-job{job}of{asked.jobs}.jsonl"


def _rest(asked: argparse.Namespace, job: int) -> Iterator[Input]:
    record = _record(asked, job)
    done = set()
    if record is not None and record.exists():
        done = {tuple(json.loads(line)[:2]) for line in record.read_text().splitlines()}
    every = inputs_of(asked.seed, asked.inputs, asked.kind or list(KINDS), asked.forks, (job, asked.jobs))
    return (one for one in every if (one.kind, one.number) not in done)


if __name__ == "__main__":
    sys.exit(main())
