"""`moelab new`: a package with a part of one's own, that works and is tested."""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.user_path import USER_PATH


@click.command("new")
@click.argument("kind")
@click.argument("name")
@click.option("--in", "parent", type=USER_PATH, default=Path(), help="The folder to write it into; default: this one.")
def command(kind: str, name: str, parent: Path) -> None:
    """Write a package with a part of one KIND, called NAME: pyproject, module, test, config, README.

    The part works: its tests run moelab's conformance kit on it, its config trains with it. Change it into yours.
    KINDs: router, balance_loss, data_source, observer, expert_layout, shared_expert, expert_backend,
    activation, expert_initialiser. Nothing is overwritten.

    \b
    Example:
      moelab new router my_router
      moelab new data-source corpus_of_ours --in ~/lab
    """
    from moelab_tools.new_package import new_package

    package = new_package(kind, name, parent)
    package.write()
    upcycles = package.kind.endswith("initialiser")
    run = "upcycle" if upcycles else "train"
    click.echo(f"written: {package.folder}")
    click.echo(f"  its part      {package.folder / package.name / package.kind}.py")
    click.echo(f"  test it       pytest {package.folder}")
    click.echo(f"  use it        moelab {run} {package.folder / package.kind}.yaml" + " source=FOLDER" * upcycles)
    click.echo(f"  install it    pip install -e {package.folder}   (add --no-build-isolation without a network)")
