"""The account, for people: a table in the terminal, a page, and a file for programs."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moelab.atomic import write_file
from moelab_tools.curate.account import EXACT, NEAR, SPLIT, Account
from moelab_tools.curate.declaration import CurateConfig

ALL = "all"
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}
th:first-child,td:first-child,.word{text-align:left}td.word{max-width:44rem;overflow-wrap:anywhere}
tr.sum{font-weight:600}.examples{color:#555;font-size:13px}pre{overflow-x:auto;background:#f5f5f5;padding:1rem}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}th,td{border-color:#444}pre{background:#222}
.examples{color:#aaa}}"""


def rows(account: Account, stages: Iterable[str]) -> list[tuple[str, str, dict[str, int]]]:
    """(stage, reason, {domain: documents}) of all that was left out, in the order of the stages."""
    return account.of_stage(["0. reading", *stages, EXACT, NEAR, SPLIT])


def print_account(console: Console, account: Account, stages: Iterable[str]) -> None:
    """What was read, what went and why, what is left; a column for each domain."""
    table = Table(box=box.HORIZONTALS, pad_edge=False)
    table.add_column("documents")
    columns = [ALL, *account.domains] if len(account.domains) > 1 else [ALL]
    for name in columns:
        table.add_column(escape(name), justify="right")
    for word, counts in _lines(account, stages):
        table.add_row(escape(word), *(_cell(counts, account, name) for name in columns))
    console.print(table)


def write_account(
    folder: Path, account: Account, stages: Iterable[str], config: CurateConfig, commits: dict[str, str]
) -> None:
    """account.json and account.html. `commits`: {dataset on the hub: commit}."""
    stages = list(stages)
    told = {"config": asdict(config), "commits": commits, "stages": stages, "account": account.to_json()}
    write_file(folder / "account.json", json.dumps(told, indent=1, ensure_ascii=False))
    write_file(folder / "account.html", page(account, stages, config))


def page(account: Account, stages: Iterable[str], config: CurateConfig) -> str:
    """One HTML file that needs nothing else."""
    stages = list(stages)
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
    text = json.dumps(asdict(config), indent=1, ensure_ascii=False)
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
    if changed:
        pieces.append(f"<h2>Changed</h2><table><tr><th>stage<th>domain<th>documents{''.join(changed)}</table>")
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


def _cell(counts: dict[str, int], account: Account, name: str) -> str:
    count = counts.get(name, 0) if name != ALL else counts.get(ALL, sum(counts.values()))
    return f"{count:,}"
