"""What a server of chat completions is asked, and what becomes of all that it may answer."""

from __future__ import annotations

from typing import Any

import pytest

from chat_server import Answer, completion, serving
from moelab import ConfigError, GeneratorContext, Question, Registry, Reply, RunFailure, UserError
from moelab.hookspecs import GENERATORS

REGISTRY = Registry(entry_points=False, points=[GENERATORS])
ASKED = [Question([{"role": "user", "content": f"question {number}"}], seed=2**62 + number) for number in range(9)]


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy stands between this machine and itself, and nobody waits."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("moelab_plugins.generators.server.time.sleep", lambda seconds: None)


def ask(url: str, questions: list[Question], **options: Any) -> list[Reply]:
    node = {"name": "server", "url": url, "model": "m", **options}
    return list(REGISTRY.build(GENERATORS, node, GeneratorContext(), "generator")(questions))


def test_replies_come_in_the_order_of_the_questions_with_their_seeds_and_settings() -> None:
    bodies: list[dict[str, Any]] = []

    def answer(body: dict[str, Any], headers: dict[str, str]) -> Answer:
        bodies.append(body)
        text = f"{body['messages'][0]['content']} {body['seed']}"
        return completion(text, "length" if "3" in body["messages"][0]["content"] else "stop")

    with serving(answer) as url:
        found = ask(url, ASKED, max_new_tokens=7, temperature=0.5, at_once=3)
    assert found == [Reply(f"question {n} {(2**62 + n) % 2**31}", n != 3) for n in range(9)]
    one = bodies[0]
    assert (one["path"], one["model"], one["max_tokens"], one["temperature"]) == ("/v1/chat/completions", "m", 7, 0.5)


def test_a_busy_server_is_asked_again_and_one_that_stays_busy_ends_the_command() -> None:
    counts: dict[str, int] = {}

    def answer(body: dict[str, Any], headers: dict[str, str]) -> Answer:
        text = body["messages"][0]["content"]
        counts[text] = counts.get(text, 0) + 1
        return completion("yes") if counts[text] == 3 else (503, b"later")

    with serving(answer) as url:
        assert ask(url, ASKED[:2], tries=3) == [Reply("yes")] * 2
        with pytest.raises(RunFailure, match=r"no answer in 2 tries \(status 503: later\); .*the same command goes on"):
            ask(url, ASKED[2:3], tries=2)
    with pytest.raises(RunFailure, match=r"generator: http://127\.0\.0\.1.*no answer in 2 tries \(.*refused"):
        ask(url, ASKED[:1], tries=2)


def test_the_key_is_of_the_environment_and_goes_to_no_other_address(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def answer(body: dict[str, Any], headers: dict[str, str]) -> Answer:
        seen.append(headers.get("Authorization"))
        return completion("yes")

    with serving(answer) as url:
        ask(url, ASKED[:1])
        with pytest.raises(ConfigError, match="key_variable: the environment has no MY_KEY"):
            ask(url, ASKED[:1], key_variable="MY_KEY")
        monkeypatch.setenv("MY_KEY", "secret")
        ask(url, ASKED[:1], key_variable="MY_KEY")
        away = (307, f"{url}/chat/completions".encode())
        with serving(lambda *_: away) as other, pytest.raises(ConfigError, match="refuses: status 307"):
            ask(other, ASKED[:1], key_variable="MY_KEY")
    assert seen == [None, "Bearer secret"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ((401, b"no key"), "refuses: status 401: no key"),
        ((404, b"\x1b[31mno model"), r"refuses: status 404: .*no model"),
        ((200, b"<html>"), "its answer: is not JSON"),
        ((200, {"choices": []}), "answered without a message"),
        ((200, ["text"]), "answered without a message"),
        ((200, {"choices": [{"message": None}]}), "answered without a message"),
    ],
)
def test_what_is_no_answer_is_told_with_its_address(said: Answer, message: str) -> None:
    with serving(lambda body, headers: said) as url, pytest.raises(UserError, match=message) as told:
        ask(url, ASKED[:1])
    assert "generator" in str(told.value) and "\x1b" not in str(told.value)


def test_a_message_without_text_is_an_empty_reply() -> None:
    with serving(lambda body, headers: (200, {"choices": [{"message": {"content": None}}]})) as url:
        assert ask(url, ASKED[:1]) == [Reply("", False)]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"url": "localhost:8000"}, "url: must begin with http"), ({"url": "http://me:secret@x"}, "url: holds a password"),
     ({"at_once": 0}, "at_once: must be at least 1"),
     ({"top_p": 0.0}, "top_p in 0"), ({"temperature": -1.0}, "temperature must be 0 or more")],
)  # fmt: skip
def test_options_that_cant_be_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ask(**{"url": "http://127.0.0.1:1/v1", "questions": ASKED[:1], **options})
