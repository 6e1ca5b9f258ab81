"""Whether what a text says could be checked by a program."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moelab import Component, Document, FilterContext, Tagger, component, hookimpl

# In this order: what is found first is said. Each on a line of its own, whose blanks alone are passed over: a pattern
# that passed over empty lines too would try each of a long gap anew.
KINDS = (
    ("doctest", re.compile(r"^[^\S\n]*>>> .+\n(?!\s*>>>|\s*$)", re.MULTILINE)),
    ("test", re.compile(r"^[^\S\n]*(assert\b|self\.assert\w+\(|EXPECT_\w+\(|ASSERT_\w+\()", re.MULTILINE)),
    ("proof", re.compile(r"^[^\S\n]*(\$[ap]\b|theorem\b|lemma\b|Qed\.|\\begin\{proof\})",
                         re.MULTILINE | re.IGNORECASE)),
    ("answer", re.compile(r"\\boxed\{|^[^\S\n]*#### -?[\d.,]+\s*$|^(final )?answer( is)?:? *\S+\.?\s*$",
                          re.MULTILINE | re.IGNORECASE)),
)  # fmt: skip


@dataclass
class VerifiableOptions:
    pass


def verifiable(options: VerifiableOptions, context: FilterContext) -> Tagger:
    """doctest, test, proof or answer (a final one, boxed or on a line of its own); "no" where none is found.

    Source: none; GSM8K's "#### 42" and MATH's boxed answers are the commonest spellings.
    Use: text with checkable results, for a mixture or for post-training on rewards by rule.
    Cost: that something could be checked does not say that it is right.
    """

    def apply(document: Document) -> str:
        return next((name for name, pattern in KINDS if pattern.search(document.text)), "no")

    return apply


@hookimpl
def moelab_taggers() -> list[Component[FilterContext, Tagger]]:
    return [component("verifiable", VerifiableOptions, verifiable)]
