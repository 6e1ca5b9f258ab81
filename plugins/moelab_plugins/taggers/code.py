"""Which programming language a text is written in, or that it is none."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moelab import Component, Document, FilterContext, Tagger, component, hookimpl

# Lines that are usual in one language, and in prose next to impossible.
LINES = {
    "python": r"(from [\w.]+ )?import [\w., *()]+$|(async )?def \w+\(.*|class \w+(\(.*\))?:$|@\w[\w.]*(\(.*\))?$|"
    r"(if|elif|for|while|with|try|except|else|return|raise)\b.*:$|self\.\w+ = .*|return .*|raise \w+.*",
    "c": r"#\s*(include|define|ifn?def|endif|pragma|if|else)\b.*|\w[\w:<>*& ]* \w+\(.*\) ?(const)? ?[{;]$|"
    r"(template|namespace|typedef|struct|using|static|inline|constexpr|extern)\b.*[{;>(]$|.*->\w+.*;$|\w+::\w+.*[;{]$",
    "javascript": r"(const|let|var) \w+ = .*|(export )?(async )?function\b.*\{$|import .* from ['\"].*|.*=> ?\{$",
    "java": r"(public|private|protected)\b.*[{;]$|import [\w.]+;$|package [\w.]+;$|@Override$",
    "rust": r"(pub )?fn \w+.*\{$|let mut .*|use [\w:{}, ]+;$|impl\b.*\{$|#\[.*\]$",
    "go": r"func (\(.*\) )?\w+\(.*\{$|package \w+$|.* := .*|import \($",
    "shell": r"#!/bin/(ba)?sh.*|fi$|done$|esac$|then$|\w+=\$\(.*|if \[.*|echo .*|export \w+=.*",
    "html": r"<!DOCTYPE.*|</?(html|head|body|div|p|span|table|tr|td|ul|li|a|script)\b.*",
}
LONGEST = 1000  # characters of a line that are looked at: minified code is one line of megabytes
_PATTERNS = {name: re.compile(pattern) for name, pattern in LINES.items()}


@dataclass
class CodeOptions:
    lines: int = 400  # of a document's beginning, that are looked at
    least: float = 0.12  # share of the lines that must be usual in a language


def code(options: CodeOptions, context: FilterContext) -> Tagger:
    """python, c (C, C++, CUDA), javascript, java, rust, go, shell or html; "no" where few lines are usual in any.

    Source: none; rules of thumb. Of the installed text, Python's library and torch's headers are told apart from
    documentation and licences in nine of ten documents (tests/unit/plugins/taggers).
    Use: which expert serves code, and of which language; code in files that don't say so.
    Cost: other languages pass for the nearest of these, or for none; a document of both is what most lines are.
    """

    def apply(document: Document) -> str:
        lines = [line.strip() for line in document.text.splitlines()[: options.lines]]
        lines = [line[:LONGEST] for line in lines if line]
        found = {name: sum(map(bool, map(pattern.match, lines))) for name, pattern in _PATTERNS.items()}
        best = max(found, key=found.__getitem__)
        return best if lines and found[best] >= options.least * len(lines) else "no"

    return apply


@hookimpl
def moelab_taggers() -> list[Component[FilterContext, Tagger]]:
    return [component("code", CodeOptions, code)]
