"""Which lines are held out: whole prompts, by their own text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moelab.alignment.examples import Examples, Shaping, read_examples
from moelab.alignment.held_out import also_learned, apart
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.chat import ChatTemplate
from moelab.errors import DataError

SHAPING = Shaping("dpo", ChatTemplate.chatml(ByteTokenizer()), 100)


def read(path: Path, rows: list[dict[str, Any]]) -> Examples:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(path, SHAPING)


def pairs(prompts: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {number}", "chosen": f"yes {side}", "rejected": "no"}
        for number in range(prompts)
        for side in range(3)
    ]


def test_lines_of_a_prompt_stay_together_in_whatever_order_they_come(tmp_path: Path) -> None:
    rows = pairs(200)
    found = [apart(read(tmp_path / "a.jsonl", some), SHAPING, 0.3, 7) for some in (rows, rows[::-1])]
    drawn = [{row.prompt for row in held} for _, held in found]
    assert drawn[0] == drawn[1]
    for learned, held in found:
        assert not {row.prompt for row in learned.rows} & {row.prompt for row in held}
        assert len(learned.rows) + len(held) == 600
        assert 0.15 < len(held) / 600 < 0.45  # 5 standard deviations of 200 prompts
        assert also_learned(held, learned.rows) == 0
    assert drawn[0] != {row.prompt for row in apart(read(tmp_path / "a.jsonl", rows), SHAPING, 0.3, 8)[1]}


def test_what_is_learned_has_the_fingerprint_of_its_own_lines(tmp_path: Path) -> None:
    whole = read(tmp_path / "a.jsonl", pairs(40))
    learned, held = apart(whole, SHAPING, 0.5, 0)
    kept = [row for row in pairs(40) if row["prompt"] in {one.prompt for one in learned.rows}]
    assert learned.fingerprint == read(tmp_path / "b.jsonl", kept).fingerprint != whole.fingerprint
    assert also_learned(held, whole.rows) == len(held)


@pytest.mark.parametrize(("share", "lost"), [(0.0001, "to be held out"), (0.9999, "for learning")])
def test_a_share_that_leaves_nothing_is_told(tmp_path: Path, share: float, lost: str) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl: alignment\.0\.validation_share {share} of its 3 lines .*{lost}"):
        apart(read(tmp_path / "a.jsonl", pairs(1)), SHAPING, share, 0)
