"""Observers: plain objects, asked in order, naming only the arguments they want."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelab.errors import ConfigError
from moelab.registry import Registry
from moelab.training.observers import gather_observers


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


def test_one_that_raises_is_told_once_and_dropped_and_the_others_are_told_on(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[object] = []

    class Breaks:
        def on_log(self, step: int) -> None:
            raise ConnectionError("the server is gone")

    class Stays:
        def on_log(self, step: int) -> None:
            seen.append(step)

    observers = _gather(Stays(), Breaks(), Stays())
    for step in (1, 2):
        observers.hook.on_log(step=step, metrics={}, loads={}, alarms=[], changes=[], backends=[])
    assert seen == [1, 1, 2, 2]
    [line] = [record.getMessage() for record in caplog.records]
    owner, file = __name__, Path(__file__).name
    assert line.startswith(
        f"observer 'Breaks' of {owner}: raised ConnectionError: the server is gone in on_log at step 1"
    )
    assert f"{file}:{Breaks.on_log.__code__.co_firstlineno + 1}" in line
    [dropped] = observers.dropped
    assert (dropped["observer"], dropped["hook"], dropped["step"]) == ("Breaks", "on_log", 1)


@pytest.mark.parametrize("answer", [[1.0], {"moe/mine": "1.0"}, {3: 1.0}, {"moe/mine": None}], ids=repr)
def test_numbers_of_a_probe_that_are_none_are_told(answer: object, caplog: pytest.LogCaptureFixture) -> None:
    class Answers:
        def __init__(self, answer: object) -> None:
            self.answer = answer

        def on_probe(self, step: int) -> object:
            return self.answer

    observers = _gather(Answers({"moe/good": 2.0}), Answers(answer), Answers(None))
    assert observers.hook.on_probe(step=0, probe=None) == [{"moe/good": 2.0}, None]
    assert "it must return {tag: number} or None" in caplog.text
    assert observers.listens("on_probe")
    assert not observers.listens("on_log")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_is_meant_to_stop_the_run_stops_it(stop: type[BaseException]) -> None:
    class Stops:
        def on_save(self, step: int) -> None:
            raise stop

    with pytest.raises(stop):
        _gather(Stops()).hook.on_save(step=1, path=Path())


def test_one_without_a_hook_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"observer 'object' of builtins: built an object without a hook; .* on_log"):
        _gather(object())


def test_a_misspelt_hook_is_an_error() -> None:
    class Wrong:
        def on_logg(self, step: int) -> None: ...

    with pytest.raises(ConfigError, match="on_logg"):
        _gather(Wrong())


def test_an_argument_that_does_not_exist_is_an_error() -> None:
    class Wrong:
        def on_log(self, stepp: int) -> None: ...

    with pytest.raises(ConfigError, match=r"'Wrong' of .*on_log asks for 'stepp'.*mean 'step'") as caught:
        _gather(Wrong())
    assert f"test_observers.py:{Wrong.on_log.__code__.co_firstlineno})" in str(caught.value)


def test_a_hook_that_does_not_exist_is_an_error_with_the_nearest_one_and_its_place() -> None:
    class Wrong:
        def on_logg(self, step: int) -> None: ...

    with pytest.raises(ConfigError, match=r"on_logg, which is no hook, did you mean 'on_log'") as caught:
        _gather(Wrong())
    assert f"test_observers.py:{Wrong.on_logg.__code__.co_firstlineno})" in str(caught.value)
    assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"mine.bin": "text"}, "it must return {file name: bytes}"),
        (b"bytes", "it must return {file name: bytes}"),
        ({"state.json": b""}, "'state.json'; it must be the name of one more file"),
        ({"../mine.bin": b""}, "'../mine.bin'; it must be the name of one more file"),
    ],
)
def test_what_goes_into_a_checkpoint_is_checked(caplog: pytest.LogCaptureFixture, answer: object, said: str) -> None:
    class Mine:
        def on_checkpoint(self, step: int) -> object:
            return answer if step else {"mine.bin": b"1"}

    observers = _gather(Mine())
    assert observers.hook.on_checkpoint(step=0) == [{"mine.bin": b"1"}]
    assert observers.hook.on_checkpoint(step=1) == []
    assert said in caplog.text
    assert [one["hook"] for one in observers.dropped] == ["on_checkpoint"]
