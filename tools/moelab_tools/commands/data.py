"""`moelab data`: text filtered, its copies dropped, and an account of every document."""

from __future__ import annotations

import click

from moelab_tools.completion import complete_config


@click.command("data")
@click.argument(
    "arguments", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]", shell_complete=complete_config
)
@click.option("--report-only", is_flag=True, help="Count what would go, and why; write no text.")
@click.option("--force", is_flag=True, help="Make an output that is there anew.")
def command(arguments: tuple[str, ...], report_only: bool, force: bool) -> None:
    """Filter text, drop its copies, and account for every document.

    Reads any data source, sends each document through the stages (`moelab plugins text_filter`), drops exact and near
    copies, and writes OUTPUT/kept/*.jsonl.gz with OUTPUT/account.html: what was read, what went and why, by stage and
    domain, with examples. With tokens.tokenizer it is tokenised too, into what training maps (docs/curation.md). Killed
    at any moment, the same command goes on and ends with the same bytes.

    \b
    Example:
      moelab data configs/data/embedded.yaml output=curated
      moelab data configs/data/embedded.yaml output=seen --report-only
      moelab data configs/data/embedded.yaml output=tok tokens.tokenizer=bytes
    """
    from moelab_tools.curate.run import CurateRequest, run_curate

    run_curate(CurateRequest(arguments, force, report_only))
