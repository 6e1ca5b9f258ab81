"""`moelab runs`: a table of run folders, how each stands, and what tells it from the others."""

from __future__ import annotations

import click


@click.command("runs")
@click.argument("folders", nargs=-1, metavar="[FOLDER...]")
@click.option("--where", "conditions", multiple=True, metavar="KEY=VALUE", help="Only runs of which this holds.")
@click.option("--state", "states", multiple=True, metavar="STATE", help="Only runs in this state, or one of several.")
@click.option("--sort", "sort_by", metavar="KEY", help="By a field or a key of the config; -KEY: the other way round.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most N runs, the first in this order.")
@click.option("--json", "as_json", is_flag=True, help="Print all that is known as JSON, with the configs.")
def command(
    folders: tuple[str, ...], conditions: tuple[str, ...], states: tuple[str, ...], sort_by: str | None,
    limit: int | None, as_json: bool,
) -> None:  # fmt: skip
    """List the runs in FOLDERs (else in runs/) at any depth, the one that wrote last first.

    State, last step, held-out loss (nats a token) and bits per byte, how long ago the run last wrote, what its config
    has and others of the table don't, and the alarms that are on. A run is `running` while its process lives, `stopped`
    if it was asked to (Ctrl-C), `failed` with the reason, `killed` if its process is gone without a word, `unfinished`
    if nothing tells why it has no end. Nothing is written, and nothing that a run names is imported.

    KEY is path, name, state, step, steps, loss, bits_per_byte, evaluated_at, tokens, flops, seconds, age, alarms (how
    many), or a key of the config: in full, or its last words as the table shows them. Conditions: = != < <= > >=; a
    text may hold `*`.

    \b
    Example:
      moelab runs
      moelab runs runs/sweep --state running --state killed
      moelab runs --where model.moe.router.name=switch --where 'loss<3' \\
          --sort loss
    """
    import json
    import time

    from moelab.errors import ConfigError
    from moelab.run_table.frame import run_records
    from moelab.run_table.record import STATES
    from moelab_tools.run_list import as_json as listed
    from moelab_tools.run_list import print_runs
    from moelab_tools.terminal import make_console

    for state in states:
        if state not in STATES:
            raise ConfigError(f"--state: must be one of {', '.join(STATES)}, not '{state}'")
    key = sort_by or "age"
    records = run_records(
        *folders, where=conditions, sort_by=key.removeprefix("-"), reverse=key.startswith("-")
    )  # fmt: skip
    records = [record for record in records if not states or record.state in states]
    left = records[limit:] if limit else []
    records = records[:limit]
    if as_json:
        click.echo(json.dumps(listed(records, time.time()), indent=2, allow_nan=False))
    elif not records:
        click.echo(
            f"no runs {'of which this holds ' if conditions or states else ''}in {', '.join(folders or ('runs',))}"
        )
    else:
        print_runs(records, make_console())
    if left:
        click.echo(f"{len(left)} more are left out by --limit", err=True)
