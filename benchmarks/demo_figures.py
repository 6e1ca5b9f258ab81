"""Writes what a finished `make demo` found into the marked place of README.md, so that no figure there is typed.

python benchmarks/demo_figures.py RUNS MINUTES "what machine" [--readme README.md]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- demo: begin, written by benchmarks/demo_figures.py -->", "<!-- demo: end -->"
REPORTS = {"equal tokens": "report_equal_tokens", "equal FLOPs": "report_equal_flops"}


def block(runs: Path, minutes: str, where: str) -> str:
    """The Markdown between the marks: a table, and for each budget what its verdicts say, in one line."""
    told, sentences = [], []
    for name, folder in REPORTS.items():
        found = json.loads((runs / folder / "comparison.json").read_text())
        told.append(f" at {name:<25} bits/byte  difference [95 % interval]  verdict")
        told += [_row(line) for line in found["variants"]]
        told.append("")
        said = [_gist(one) for one in found["sentences"] if one.startswith("upcycled") and "has the lowest" not in one]
        sentences.append(f"- At {name}: {'; '.join(said)}.")
    lines = [
        f"On {where} it took {minutes} min after the set-up, and ended with (`moelab compare` twice, shortened;",
        "held-out bits per byte, none of it trained on by any stage):",
    ]
    return "\n".join([*lines, "", "```", *told[:-1], "```", "", *sentences])


def _gist(sentence: str) -> str:
    """What a verdict's sentence says before its numbers, which stand in the table."""
    return re.split(r"[:;]|\.(?:\s|$)", sentence)[0]


def _row(line: dict[str, Any]) -> str:
    gap = line["difference"]
    name = f"{line['name']} ({line['counted']} seeds)" if line["counted"] > 1 else line["name"]
    difference = ""
    if gap is not None and gap["low"] is not None:
        difference = f"{gap['difference']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]".replace("-", "−")
    return f" {name:<28} {line['score']:>9.4f}  {difference:<26}  {line['verdict']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("minutes")
    parser.add_argument("where")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    options = parser.parse_args()
    text = options.readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{options.readme}: must hold '{BEGIN}' and '{END}' once")
    before, rest = text.split(BEGIN)
    written = f"{before}{BEGIN}\n{block(options.runs, options.minutes, options.where)}\n{END}{rest.split(END)[1]}"
    options.readme.write_text(written)


if __name__ == "__main__":
    main()
