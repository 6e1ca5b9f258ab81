"""What Tab offers behind `moelab train`: config files, keys, and after `key=` the plugins or the two truth values.

click makes the shells' side of it (`_MOELAB_COMPLETE=bash_source moelab`). bash cuts a word at `=`, which is put
together again here, so that `key=va` is one word in every shell. Neither torch nor any plugin is imported.
"""

from __future__ import annotations

from collections.abc import Iterator

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

_ADDS = "COMPREPLY+=($value)"  # in click's script for bash


class Bash(BashComplete):
    """Takes `key`, `=`, `va` for one word, answers with what stands behind its `=`, and adds no space after a `=`."""

    source_template = BashComplete.source_template.replace(
        _ADDS, f"{_ADDS}; if [[ $value == *= ]]; then compopt -o nospace; fi"
    )

    def get_completion_args(self) -> tuple[list[str], str]:
        """(whole words before, the word that is typed)."""
        before, typed = super().get_completion_args()
        words: list[str] = []
        for word in [*before, typed]:
            if words and (word == "=" or words[-1].endswith("=")) and not words[-1].startswith("-"):
                words[-1] += word
            else:
                words.append(word)
        self._cut = words[-1].rfind("=") + 1 if typed == "=" or words[-1] != typed else 0
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """As bash puts it in place of what stands behind the `=`."""
        return f"{item.type},{item.value[self._cut :]}"


def complete_config(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Completions of a word of CONFIG... [KEY=VALUE...]; a file where it is no key."""
    from moelab.config.run import RunConfig
    from moelab.config.upcycle import UpcycleConfig

    schema = UpcycleConfig if context.info_name == "upcycle" else RunConfig
    key, separator, value = typed.partition("=")
    if separator:
        return [CompletionItem(f"{key}={each}") for each in _values(schema, key) if each.startswith(value)]
    if not typed:
        return [CompletionItem(typed, type="file")]
    found = [CompletionItem(f"{path}=") for path in _keys(schema) if path.startswith(typed)]
    return found or [CompletionItem(typed, type="file")]


def complete_plugin(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Completions of NAME and KIND: the built-in plugins."""
    from moelab.hookspecs import EXTENSION_POINTS
    from moelab_tools.config_listing import plugin_names

    kinds = [point.hook.removeprefix("moelab_") for point in EXTENSION_POINTS]
    names = [name for point in EXTENSION_POINTS for name in plugin_names(point.key)]
    return [CompletionItem(name) for name in dict.fromkeys([*kinds, *sorted(names)]) if name.startswith(typed)]


def complete_key(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Completions of a prefix of `moelab config --keys`, sections included."""
    from moelab.config.keys import config_keys
    from moelab_tools.config_listing import COMMANDS

    paths = dict.fromkeys(key.path for schema in COMMANDS.values() for key in config_keys(schema))
    return [CompletionItem(path) for path in paths if path.startswith(typed)]


def use_bash() -> None:
    """Let click complete in bash by the class above."""
    add_completion_class(Bash)


def _keys(schema: type) -> Iterator[str]:
    """The keys that take a value; of a part its name."""
    from moelab.config.keys import config_keys

    for key in config_keys(schema):
        if key.part and not key.words.startswith("list"):
            yield f"{key.path}.name"
        elif key.section is None:
            yield key.path


def _values(schema: type, path: str) -> list[str]:
    from moelab.config.keys import config_keys
    from moelab_tools.config_listing import plugin_names

    if names := plugin_names(path.removesuffix(".name")):
        return names
    hints = [key.words for key in config_keys(schema) if key.path == path]
    return ["true", "false"] if hints == ["bool"] else []
