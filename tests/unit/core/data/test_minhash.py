"""MinHash: estimates that are what they estimate, copies found, others left, whatever their order on disk."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest

from moelab.data.minhash import ROOM, SIZE, near_copies, signature

RANDOM = random.Random(5)
VOCABULARY = [f"w{number}" for number in range(4000)]


def text(words: int = 300) -> str:
    return " ".join(RANDOM.choice(VOCABULARY) for _ in range(words))


def shingles(of: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", of.lower())
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


def jaccard(a: str, b: str) -> float:
    one, other = shingles(a), shingles(b)
    return len(one & other) / len(one | other)


def changed(of: str, places: int) -> str:
    words = of.split()
    for place in RANDOM.sample(range(len(words)), places):
        words[place] = "other"
    return " ".join(words)


def test_equal_entries_estimate_the_similarity_of_the_shingles() -> None:
    """Each entry is equal with probability J: over 200 pairs the mean of SIZE entries is within 5 standard errors."""
    gaps, variance = [], 0.0
    for _ in range(200):
        one = text()
        other = changed(one, RANDOM.randrange(1, 30))
        exact = jaccard(one, other)
        gaps.append(float((signature(one) == signature(other)).mean()) - exact)
        variance += exact * (1 - exact) / SIZE
    assert abs(sum(gaps)) < 5 * variance**0.5


def test_planted_copies_are_found_and_others_are_left() -> None:
    """What the data side promises: 95 % of those with a similarity of 0.8 and more, and under 1 % of the rest."""
    originals = [text() for _ in range(300)]
    copies = [changed(one, RANDOM.randrange(0, 7)) for one in originals]
    near = np.array([jaccard(*pair) >= 0.8 for pair in zip(originals, copies, strict=True)])
    strangers = [text() for _ in range(1000)]
    signatures = np.stack([signature(one) for one in (*originals, *strangers, *copies)])
    dropped = near_copies(signatures, 0.8, np.ones(len(signatures), bool))
    assert near.sum() > 200 and not dropped[:300].any()
    assert dropped[1300:][near].mean() >= 0.75  # at 0.8 itself the estimate falls below it half of the time
    assert near_copies(signatures, 0.7, np.ones(len(signatures), bool))[1300:][near].mean() >= 0.95
    assert dropped[300:1300].mean() < 0.01


def test_the_first_of_a_group_stays_and_a_chain_does_not_take_all() -> None:
    chain = [text(400)]
    for _ in range(12):
        words = chain[-1].split()
        chain.append(" ".join([*words[20:], *text(20).split()]))
    signatures = np.stack([signature(one) for one in (*chain, chain[0])])
    dropped = near_copies(signatures, 0.8, np.ones(len(signatures), bool))
    assert not dropped[0] and dropped[1] and dropped[-1]
    assert not dropped[:-1].all() and jaccard(chain[0], chain[12]) < 0.5
    alive = np.ones(len(signatures), bool)
    alive[0] = False
    assert not near_copies(signatures, 0.8, alive)[1]  # what is gone already takes none with it


def test_case_and_punctuation_say_nothing_and_short_texts_are_looked_at_whole() -> None:
    assert np.array_equal(signature("One, two. THREE four five six"), signature("one two three FOUR five six!"))
    assert np.array_equal(signature("a b"), signature("A, b.")) and not np.array_equal(signature("a b"), signature("a"))
    assert signature("").shape == (SIZE,)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_signatures_on_disk_are_looked_through_without_being_held(tmp_path: Path) -> None:
    """Three times as many as are held at once: 110 MB of them, of which less than half is mapped in the end."""
    count = 3 * ROOM
    numbers = np.random.default_rng(0).integers(0, 1 << 32, (count, SIZE), np.uint32)
    numbers[count - 1] = numbers[5]
    held = np.memmap(tmp_path / "signatures", np.uint32, "w+", shape=numbers.shape)
    held[:] = numbers
    before = _mapped()
    dropped = near_copies(held, 0.8, np.ones(count, bool))
    assert dropped.nonzero()[0].tolist() == [count - 1]
    assert before - _mapped() > numbers.nbytes / 2
    assert np.array_equal(held, numbers)


def _mapped() -> int:
    """Bytes of files that this process has in memory."""
    told = Path("/proc/self/status").read_text()
    return sum(int(re.findall(rf"{kind}:\s+(\d+)", told)[0]) << 10 for kind in ("RssFile", "RssShmem"))


def test_scripts_without_spaces_are_compared_by_characters_and_signs_by_themselves() -> None:
    clauses = [
        "".join(RANDOM.choice("山里有座庙前从个老和尚在讲故事天地玄黄宇宙洪荒") for _ in range(12)) for _ in range(40)
    ]
    one = "，".join(clauses)
    other = one.replace(clauses[7], clauses[7][:6] + "新" + clauses[7][7:]).replace(clauses[30], clauses[30][:3] + "旧")
    assert (signature(one) == signature(other)).mean() > 0.8
    assert (signature("+--+ |  | +--+") != signature("*** === ***")).all()
    assert (signature("+--+ |  | +--+") == signature(" +--+\n|  | +--+")).all()
