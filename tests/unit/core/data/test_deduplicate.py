"""Copies and near copies go; texts that share a template or short lines stay; nothing stands on both sides."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from moelab.data.deduplicate import COPY, LEAK, LEAKED, NEAR_COPY, TEMPLATE_DOCUMENTS, sort_out
from moelab.data.identity import text_identity


@dataclass(frozen=True)
class Text:
    text: str

    @property
    def identity(self) -> int:
        return text_identity(self.text)


LICENCE = "\n".join(f"Condition {n} of this licence says that you may copy it." for n in range(20))
PROMPT = "Below is an instruction that describes a task; write a response that completes it.\n" * 1 + (
    "Answer truthfully, in one paragraph, and say so where you do not know the answer.\n### Instruction:\n"
)


def kept(*texts: str) -> list[str]:
    return [document.text for document in sort_out([], [Text(text) for text in texts]).train]


def lines(name: str, count: int) -> str:
    return "\n".join(f"value_{n} of {name} = compute_something_unlike_the_others({n * 7919})" for n in range(count))


def test_the_first_of_equal_documents_stays_whatever_case_and_white_space() -> None:
    assert kept("a b", "c", "a b", "A  B\n") == ["a b", "c"]


def test_a_licence_with_another_holder_and_layout_is_a_copy() -> None:
    other = "Copyright 2024 Somebody Else, all rights reserved.\n" + LICENCE.replace(" of", "   OF")
    assert kept(LICENCE, other) == [LICENCE]


@pytest.mark.parametrize("holders", [2, TEMPLATE_DOCUMENTS, 5 * TEMPLATE_DOCUMENTS])
def test_a_licence_is_a_copy_however_many_holders_it_has(holders: int) -> None:
    """Its lines are those of a template then; what is a holder's own is a small part of it."""
    assert len(kept(*(f"Copyright {n}, holder number {n * 7919}\n{LICENCE}" for n in range(holders)))) == 1


@pytest.mark.parametrize("rows", [TEMPLATE_DOCUMENTS, 500])
def test_rows_under_one_prompt_are_no_copies_though_it_is_longer_than_they(rows: int) -> None:
    texts = [f"{PROMPT}{lines(str(n), 1)}\n### Response:\n{lines(f'answer {n}', 1)}" for n in range(rows)]
    assert len(PROMPT) > 0.5 * len(texts[0])
    assert len(kept(*texts)) == rows


def test_of_rows_under_one_prompt_those_that_say_the_same_are_copies() -> None:
    rows = [f"{PROMPT}{lines(str(n), 3)}" for n in range(30)]
    again = f"{rows[0]}\nwith one more line that is its own, of forty"
    assert len(kept(*rows, again)) == 30


def test_a_file_under_a_known_banner_stays() -> None:
    assert len(kept(LICENCE, LICENCE + "\n" + lines("code", 40))) == 2


def test_short_lines_are_no_evidence() -> None:
    assert len(kept("return x\n" * 50, "return x\n" * 49)) == 2


def test_lines_repeated_inside_one_document_count_once() -> None:
    line = "a line that is long enough to be counted here\n"
    assert len(kept(line, line * 100 + "another line, just as long, that nobody else has written\n")) == 2


@pytest.mark.parametrize("deduplicate", [True, False])
def test_what_repeats_a_held_out_document_is_not_trained_on(deduplicate: bool) -> None:
    held, longer, other = lines("held", 10), lines("held", 11), lines("other", 10)
    found = sort_out([Text(held)], [Text(longer), Text(other), Text(held.upper())], deduplicate=deduplicate)
    assert [document.text for document in found.held_out] == [held]
    assert [document.text for document in found.train] == [other]
    assert [cause for cause, _ in found.dropped] == [LEAK, LEAK]


@pytest.mark.parametrize("deduplicate", [True, False])
def test_a_held_out_part_of_a_longer_training_document_is_not_scored(deduplicate: bool) -> None:
    part, other = lines("whole", 4), lines("other", 4)
    found = sort_out([Text(part), Text(other)], [Text(lines("whole", 40))], deduplicate=deduplicate)
    assert [document.text for document in found.held_out] == [other]
    assert len(found.train) == 1
    assert found.dropped == [(LEAKED, Text(part))]


def test_without_deduplication_copies_on_one_side_stay() -> None:
    copies = [Text(lines("same", 5)), Text(lines("same", 5)), Text(lines("same", 6))]
    assert sort_out([], copies, deduplicate=False).train == copies
    assert [cause for cause, _ in sort_out([], copies).dropped] == [COPY, NEAR_COPY]
