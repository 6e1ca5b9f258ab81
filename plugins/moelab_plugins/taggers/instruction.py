"""What a text asks for, by how it begins: kinds of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moelab import Component, Document, FilterContext, Tagger, component, hookimpl

# First words of a request, by kind; of English alone.
VERBS = {
    "write": "write compose draft create generate produce tell imagine invent",
    "explain": "explain describe define discuss outline clarify elaborate",
    "transform": "translate rewrite summarize summarise paraphrase shorten convert correct edit fix simplify extract",
    "solve": "solve compute calculate find determine prove evaluate simplify show derive",
    "code": "implement code debug refactor program",
    "choose": "classify choose select identify categorize rank sort compare label",
}
QUESTION = "what who whom whose when where why which how is are was were do does did can could should would will"
_FIRST = re.compile(r"^\W*(?:(?:please|kindly|user:?|human:?|instruction:?|question:?|q:)\W*)*([a-z']+)", re.IGNORECASE)
_KIND = {verb: kind for kind, verbs in reversed(VERBS.items()) for verb in verbs.split()}
_KIND |= dict.fromkeys(QUESTION.split(), "question")


@dataclass
class InstructionOptions:
    longest: int = 2000  # characters of the first paragraph; a longer one is no instruction


def instruction(options: InstructionOptions, context: FilterContext) -> Tagger:
    """write, explain, transform, solve, code, choose or question, by the first word; "no" where it is none of these.

    A question must end with its mark somewhere in the first paragraph.

    Source: none; a rule of thumb. Use: kinds in instruction data, for coverage and for loss by kind.
    Cost: English alone, and the first sentence alone.
    """

    def apply(document: Document) -> str:
        first = document.text.strip().split("\n\n", 1)[0]
        found = _FIRST.match(first)
        if found is None or len(first) > options.longest:
            return "no"
        kind = _KIND.get(found[1].lower(), "no")
        return "no" if kind == "question" and "?" not in first else kind

    return apply


@hookimpl
def moelab_taggers() -> list[Component[FilterContext, Tagger]]:
    return [component("instruction", InstructionOptions, instruction)]
