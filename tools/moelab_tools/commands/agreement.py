"""`moelab agreement`: do two traces send the same tokens to the same experts?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from moelab_tools.user_path import USER_PATH


@click.command("agreement")
@click.argument("first", type=USER_PATH)
@click.argument("second", type=USER_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def command(first: Path, second: Path, as_json: bool) -> None:
    """Share of equal assignments of two traces of the same text, by layer and domain, with intervals over documents.

    FIRST and SECOND are folders of `moelab trace`: of two runs, or of one run at another precision or batch size. Of a
    token with experts A and B, |A and B| of max(|A|, |B|) are equal. "By chance" is what two routers of these loads
    would share if they knew nothing of each other. Experts have no names that two seeds share: "renamed" is the share
    under the numbering of the second that fits the first best (picked on the same tokens, so a little too high).

    \b
    Example:
      moelab trace runs/moe --out traces/fp32
      moelab trace runs/moe train.dtype=bfloat16 --out traces/bf16
      moelab agreement traces/fp32 traces/bf16
    """
    from moelab.routes.agreement import compare_routes
    from moelab.routes.files import read_trace
    from moelab_tools.routes.agreeing import HEAD, rows, told_by_domain

    traces = read_trace(first), read_trace(second)
    found = rows(compare_routes(*traces, (str(first), str(second))), traces[0])
    if as_json:
        click.echo(json.dumps([row.to_json() for row in found], indent=2))
        return
    same = traces[0].facts["weights"] == traces[1].facts["weights"]
    click.echo(
        f"{traces[0].tokens:,} tokens of {len(traces[0].documents)} documents; "
        f"{'the same weights' if same else 'different weights'}; 95 % intervals over documents"
    )
    for line in (HEAD, *(row.told() for row in found), *told_by_domain(found)):
        click.echo(line)
