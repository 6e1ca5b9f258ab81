"""`moelab merge`: checkpoints of one model become one."""

from __future__ import annotations

import sys

import click

from moelab_tools.completion import complete_config
from moelab_tools.trust_option import TRUST_PLUGINS
from moelab_tools.verify_option import NO_VERIFY


@click.command("merge")
@click.argument("config", nargs=-1, required=True, metavar="[CONFIG...] [KEY=VALUE...]", shell_complete=complete_config)
@click.option("--check", is_flag=True, help="Write nothing: merge again, and compare with what the output holds.")
@TRUST_PLUGINS
@NO_VERIFY
def command(config: tuple[str, ...], check: bool, trust: bool, verify: bool) -> None:
    """Merge two or more checkpoints of one architecture and tokenizer, expert by expert.

    A mean of weights (linear), or a base and what each model changed of it: added up (task_arithmetic), the largest of
    it by the sign of the sum (ties), or a random part (dare_linear, dare_ties). Each matrix of each expert is taken by
    itself, as mergekit takes those of a Hugging Face folder, to the same numbers. Writes such a folder, a parameter at
    a time. Experts that stand in another order are told of, and put in order with align_experts=true.

    The keys may stand in a file; `moelab config --keys models` and docs/config_keys.md say what each means.

    \b
    Example:
      moelab merge 'models=[{path: runs/a}, {path: runs/b}]' output=merged/mean
      moelab merge method=ties base=runs/base output=merged/ties \\
          'models=[{path: runs/a, density: 0.5}, {path: runs/b, density: 0.5}]'
    """
    from moelab.config.load import load_config
    from moelab.registry import Registry
    from moelab_tools.merging.declaration import MergeConfig
    from moelab_tools.merging.merge import run_merge, verify_merge
    from moelab_tools.terminal import wrapped

    loaded = load_config(config, MergeConfig, trust=trust)
    declared = loaded.config
    registry = Registry(declared.plugins, declared.entry_points, loaded.places("plugins"))
    if check:
        click.echo(verify_merge(declared, registry, trust=trust))
        return
    for line in run_merge(declared, registry, verify=verify, trust=trust):
        click.echo(wrapped(line, sys.stdout))
