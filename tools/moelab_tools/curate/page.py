"""The account, for people: a table in the terminal, a page, TensorBoard's texts; and a file for programs."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moelab.atomic import write_file
from moelab.data.covering import Cover
from moelab.printable import printable
from moelab_plugins.observers._tensorboard_texts import verbatim, write_texts
from moelab_tools.curate.account import EXACT, NEAR, SELECT, SPLIT, Account
from moelab_tools.curate.agreement import ALL, EXPLAINED, agreement_lines, agreements
from moelab_tools.curate.declaration import CurateConfig

TENSORBOARD = "tensorboard"
WORD_WIDTH, BETWEEN = 36, 3  # of a terminal's table: what and `all`; what stands between two columns
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}
th:first-child,td:first-child,.word{text-align:left}th:first-child,td:first-child{position:sticky;left:0;background:#fff;min-width:9rem}td.word{max-width:44rem;overflow-wrap:anywhere}
tr.sum{font-weight:600}.examples{color:#555;font-size:13px}pre{overflow-x:auto;background:#f5f5f5;padding:1rem}
@media(prefers-color-scheme:dark){body,th:first-child,td:first-child{background:#181818;color:#ddd}th,td{border-color:#444}pre{background:#222}
.examples{color:#aaa}}"""


def rows(account: Account, stages: Iterable[str]) -> list[tuple[str, str, dict[str, int]]]:
    """(stage, reason, {domain: documents}) of all that was left out, in the order of the stages."""
    return account.of_stage(["0. reading", *stages, EXACT, NEAR, SELECT, SPLIT])


def print_account(console: Console, account: Account, stages: Sequence[str]) -> None:
    """What was read, what went and why, what is left, how far filters agree; a column for each domain."""
    columns = [ALL, *_domains_that_fit(account, console.width)] if len(account.domains) > 1 else [ALL]
    lines = [(word, [_cell(counts, account, name) for name in columns]) for word, counts in _lines(account, stages)]
    _print_table(console, "documents", columns, lines)
    left = len(account.domains) - len(columns) + 1
    if left and len(account.domains) > 1:
        console.print(f"{left} smaller domains stand in account.html and account.json", highlight=False, soft_wrap=True)
    agreed = [(word, [cells[ALL]]) for word, cells in agreement_lines(account, stages)]
    if agreed:  # by domain in the page: a terminal has no room for it
        _print_table(console, "filters", [ALL], agreed)


def _domains_that_fit(account: Account, width: int) -> list[str]:
    """Of the domains, in their order, those with the most documents for which a terminal has room."""
    room, chosen = width - WORD_WIDTH, list[str]()
    for name in sorted(account.domains, key=lambda name: (-account.documents[name], name)):
        room -= max(cell_len(name), len(f"{account.documents[name]:,}")) + BETWEEN
        if room < 0:
            break
        chosen.append(name)
    return sorted(chosen)


def _print_table(console: Console, head: str, columns: Sequence[str], lines: Iterable[tuple[str, list[str]]]) -> None:
    table = Table(box=box.HORIZONTALS, pad_edge=False)
    table.add_column(head)
    for name in columns:
        table.add_column(escape(name), justify="right")
    for word, cells in lines:
        table.add_row(escape(word), *cells)
    console.print(table)


@dataclass(frozen=True)
class Circumstances:
    """What the account is of."""

    config: CurateConfig
    stages: Sequence[str]  # as the account calls them
    commits: Mapping[str, str]  # {dataset on the hub: commit}
    causes: Mapping[str, Mapping[str, Any]]  # {what: count, example, cure} of what is no document: lines, files, tokens
    cover: Cover | None = None  # of a selection by tags


def write_account(folder: Path, account: Account, of: Circumstances) -> None:
    """account.json, account.html and, for TensorBoard's Text tab, an event file in a folder of its own."""
    told: dict[str, Any] = {"config": asdict(of.config), "commits": dict(of.commits), "stages": list(of.stages),
            "beside_documents": dict(of.causes), "account": account.to_json()}  # fmt: skip
    if pairs := agreements(account, of.stages):
        told["agreement"] = [one.to_json() for one in pairs]
    if of.cover is not None:
        told["selected"] = {key: value for key, value in vars(of.cover).items() if key != "chosen"}
    write_file(folder / "account.json", json.dumps(told, indent=1, ensure_ascii=False))
    write_file(folder / "account.html", page(account, of))
    write_texts(folder / TENSORBOARD, texts(account, of))


def texts(account: Account, of: Circumstances) -> dict[str, str]:
    """{tag: Markdown} of the table, and of what was left out with examples."""
    columns = [ALL, *account.domains]
    lines = [f"| documents | {' | '.join(map(_in_cell, columns))} |", f"| --- |{' ---: |' * len(columns)}"]
    for word, counts in _lines(account, of.stages):
        lines.append(f"| {_in_cell(word)} | {' | '.join(_cell(counts, account, name) for name in columns)} |")
    found = {"data/account": "\n".join(lines)}
    if tags := _tag_lines(account):
        body = [f"| {_in_cell(word)} | {' | '.join(_cell(counts, account, name) for name in columns)} |"
                for word, counts in tags]  # fmt: skip
        found["data/tags"] = "\n".join([*lines[:2], *body])
    if agreed := agreement_lines(account, of.stages):
        body = [f"| {_in_cell(word)} | {' | '.join(own.get(name, '') for name in columns)} |"
                for word, own in agreed]  # fmt: skip
        found["data/agreement"] = "\n".join([lines[0].replace("documents", "filters", 1), lines[1], *body])
    examples = [
        f"**{_in_cell(f'{stage}: {reason}')}** {sum(counts.values()):,}\n\n"
        + verbatim("\n".join(account.examples.get((stage, reason), [])))
        for stage, reason, counts in rows(account, of.stages)
    ]
    if examples:
        found["data/left_out"] = "\n\n".join(examples)
    if of.causes:
        found["data/beside_documents"] = "\n".join(f"- {_in_cell(line)}" for line in _cause_lines(of))
    return found


def _cause_lines(of: Circumstances) -> list[str]:
    return [
        f"{what}: {cause['count']:,} (first {printable(str(cause['example']), 300)}); {cause['cure']}"
        for what, cause in of.causes.items()
    ]


def _in_cell(text: str) -> str:
    """Text that begins no markup and no other cell."""
    return re.sub(r"([|*_`<\[\\])", r"\\\1", " ".join(text.split()))


def page(account: Account, of: Circumstances) -> str:
    """One HTML file that needs nothing else."""
    stages = of.stages
    columns = [ALL, *account.domains]
    head = "".join(f"<th>{html.escape(name)}" for name in ["documents", *columns])
    body = []
    for word, counts in _lines(account, stages):
        marked = ' class="sum"' if word in ("read", "kept") else ""
        cells = "".join(f"<td>{_cell(counts, account, name)}" for name in columns)
        body.append(f'<tr{marked}><td class="word">{html.escape(word)}{cells}')
    examples = [
        f'<tr><td class="word">{html.escape(f"{stage}: {reason}")}<td class="word examples">'
        + "<br>".join(html.escape(text) for text in account.examples.get((stage, reason), []))
        for stage, reason, _ in rows(account, stages)
    ]
    changed = [
        f"<tr><td>{html.escape(stage)}<td>{html.escape(domain)}<td>{count:,}"
        for (stage, domain), count in sorted(account.changed.items())
    ]
    text = json.dumps(asdict(of.config), indent=1, ensure_ascii=False)
    pieces = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>What became of every document</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>',
        "<h1>What became of every document</h1><p>Kept and left out are together what was read.</p>",
        f"<table><tr>{head}{''.join(body)}</table>",
    ]
    if examples:
        pieces.append(
            f"<h2>Left out, for example</h2><table><tr><th>why<th class='word'>documents{''.join(examples)}</table>"
        )
    if agreed := agreement_lines(account, stages):
        rows_ = "".join(
            f'<tr><td class="word">{html.escape(word)}' + "".join(f"<td>{cells.get(name, '')}" for name in columns)
            for word, cells in agreed
        )
        pieces.append(f"<h2>How far filters agree</h2><p>{EXPLAINED}</p><table><tr>{head}{rows_}</table>")
    if of.cover is not None:
        pieces.append(f"<h2>Selected by tags</h2><p>{html.escape(str(of.cover))}.</p>")
    if changed:
        pieces.append(f"<h2>Changed</h2><table><tr><th>stage<th>domain<th>documents{''.join(changed)}</table>")
    if tags := _tag_lines(account):
        rows_ = "".join(
            f'<tr><td class="word">{html.escape(word)}'
            + "".join(f"<td>{_cell(counts, account, name)}" for name in columns)
            for word, counts in tags
        )
        pieces.append(f"<h2>Tags of what is kept</h2><table><tr>{head}{rows_}</table>")
    if of.causes:
        items = "".join(f"<li>{html.escape(line)}" for line in _cause_lines(of))
        pieces.append(f"<h2>Beside documents</h2><ul>{items}</ul>")
    return "".join(pieces) + f"<h2>Config</h2><pre>{html.escape(text)}</pre></html>\n"


def _lines(account: Account, stages: Iterable[str]) -> list[tuple[str, dict[str, int]]]:
    left_out = [(f"{stage}: {reason}", counts) for stage, reason, counts in rows(account, stages)]
    characters = {
        domain: round(100 * account.kept_characters[domain] / max(1, account.characters[domain]))
        for domain in account.domains
    }
    total = round(100 * account.kept_characters.total() / max(1, account.characters.total()))
    return [
        ("read", dict(account.documents)),
        *left_out,
        ("kept", dict(account.kept)),
        ("kept, % of the characters", characters | {ALL: total}),
    ]


def _tag_lines(account: Account) -> list[tuple[str, dict[str, int]]]:
    """("tag: value", {domain: kept documents}), the commonest values of each tag first."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for (tag, value, domain), count in account.tagged.items():
        if count:
            found.setdefault((tag, value), {})[domain] = count
    ordered = sorted(found.items(), key=lambda item: (item[0][0], -sum(item[1].values()), item[0][1]))
    return [(f"{tag}: {value or 'not told'}", counts) for (tag, value), counts in ordered]


def _cell(counts: dict[str, int], account: Account, name: str) -> str:
    count = counts.get(name, 0) if name != ALL else counts.get(ALL, sum(counts.values()))
    return f"{count:,}"
