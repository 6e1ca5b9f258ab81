"""Copies and near copies go; texts that only share short lines stay."""

from __future__ import annotations

from dataclasses import dataclass

from moelab.data.deduplicate import novel


@dataclass(frozen=True)
class Text:
    text: str


LICENCE = "\n".join(f"Condition {n} of this licence says that you may copy it." for n in range(20))


def kept(*texts: str) -> list[str]:
    return [document.text for document in novel(map(Text, texts))]


def test_the_first_of_equal_documents_stays() -> None:
    assert kept("a", "b", "a") == ["a", "b"]


def test_a_licence_with_another_holder_and_layout_is_a_copy() -> None:
    other = "Copyright 2024 Somebody Else, all rights reserved.\n" + LICENCE.replace(" of", "   OF")
    assert kept(LICENCE, other) == [LICENCE]


def test_a_file_under_a_known_banner_stays() -> None:
    code = "\n".join(f"value_{n} = compute_something_unlike_the_others({n * 7919})" for n in range(40))
    assert len(kept(LICENCE, LICENCE + "\n" + code)) == 2


def test_short_lines_are_no_evidence() -> None:
    assert len(kept("return x\n" * 50, "return x\n" * 49)) == 2


def test_lines_repeated_inside_one_document_count_once() -> None:
    line = "a line that is long enough to be counted here\n"
    assert len(kept(line, line * 100 + "another line, just as long, that nobody else has written\n")) == 2
