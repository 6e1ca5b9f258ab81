"""Observers: plain objects, asked in order, naming only the arguments they want."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelab.errors import ConfigError
from moelab.registry import Registry
from moelab.train.observers import gather_observers


def _gather(*observers: object):  # type: ignore[no-untyped-def]
    return gather_observers([], Registry(entry_points=False), Path(), observers)


def test_they_are_called_in_order_with_the_arguments_they_name() -> None:
    seen: list[object] = []

    class First:
        def on_log(self, step: int) -> None:
            seen.append(("first", step))

    class Second:
        def on_log(self, metrics: dict[str, float], step: int) -> None:
            seen.append(("second", metrics["x"], step))

    _gather(First(), Second()).hook.on_log(step=3, metrics={"x": 1.0}, loads={}, alarms=[], changes=[], backends=[])
    assert seen == [("first", 3), ("second", 1.0, 3)]


def test_a_misspelt_hook_is_an_error() -> None:
    class Wrong:
        def on_logg(self, step: int) -> None: ...

    with pytest.raises(ConfigError, match="on_logg"):
        _gather(Wrong())


def test_an_argument_that_does_not_exist_is_an_error() -> None:
    class Wrong:
        def on_log(self, stepp: int) -> None: ...

    with pytest.raises(ConfigError, match="stepp"):
        _gather(Wrong())
