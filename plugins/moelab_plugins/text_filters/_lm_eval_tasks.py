"""What lm-evaluation-harness asks in its tasks, as texts: `pip install 'moelab[lm-eval]'`.

Source: lm_eval 0.4.13, lm_eval/tasks (TaskManager.load) and lm_eval/api/task.py (Task.eval_docs: the test split, or the
validation split where a task has no other).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from moelab import ConfigError, DataError

FILES = (".yaml", ".yml")


@cache
def task_texts(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """((task, text), ...) of every string of every example. names: tasks, groups or tags, paths of its files.

    Raises ConfigError for a missing package or a name that lm-eval has not, DataError where examples can't be had.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks: needs lm-evaluation-harness: pip install 'moelab[lm-eval]'")
    with quiet():
        from lm_eval.tasks import TaskManager

        known = TaskManager(include_defaults=any(not name.endswith(FILES) for name in names))
        for name in names:
            if not name.endswith(FILES) and name not in known.task_index:
                raise ConfigError(f"tasks: lm-eval has no task '{name}'; `lm-eval ls tasks` lists them")
        try:
            tasks = known.load(list(names))["tasks"]
            return tuple((str(name), text) for name, task in tasks.items() for row in task.eval_docs
                         for text in strings_of(row))  # fmt: skip
        except Exception as error:  # whatever a task's own code raises
            raise DataError(
                f"tasks: the examples of {', '.join(names)} can't be had ({type(error).__name__}: {error}); where they "
                "lie on the Hugging Face hub, run `moelab data` once with a network, or bring its cache along"
            ) from error


def strings_of(value: Any) -> list[str]:
    """Every string in lists and objects within each other."""
    found, left = [], [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, Sequence):
            left += value
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and datasets tell of every step; of their logs errors remain, of stderr nothing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
