"""A model behind a server that speaks OpenAI's chat completions, as vLLM, SGLang, llama.cpp and others do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from omegaconf import MISSING

from moelab import (
    Component,
    ConfigError,
    GeneratorContext,
    Question,
    Reply,
    RunFailure,
    TextGenerator,
    component,
    hookimpl,
)
from moelab.errors import DataError
from moelab.printable import printable
from moelab.safe_files import Reading, parse_json

LARGEST = 64 << 20  # bytes of an answer
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses of a server that may answer later


@dataclass
class ServerOptions:
    url: str = MISSING  # of the interface, such as http://localhost:8000/v1
    model: str = MISSING  # as the server calls it
    max_new_tokens: int = 512  # of a reply
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    key_variable: str | None = None  # the environment variable that holds the key; the key itself is written nowhere
    at_once: int = 8  # requests on the way
    timeout: float = 600.0  # seconds for a reply
    tries: int = 4  # of a request that the server is too busy for, or that is lost, waiting longer each time

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url: must begin with http:// or https://, not '{self.url[:40]}'")
        if "@" in self.url.partition("://")[2].partition("/")[0]:  # it would stand in every line that is made
            raise ValueError("url: holds a password or a name; give the key by key_variable")
        for key, least in (("max_new_tokens", 1), ("at_once", 1), ("tries", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: must be at least {least}, not {getattr(self, key)}")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.timeout > 0):
            raise ValueError("temperature must be 0 or more, top_p in 0 .. 1, 0 excluded, timeout positive")


class _Stays(HTTPRedirectHandler):
    """The key goes to no other address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Server:
    """Requests to one address, a few at a time."""

    def __init__(self, options: ServerOptions, context: GeneratorContext) -> None:
        """Raises ConfigError where the key is asked for and not there. Nothing is sent yet."""
        self._options, self._where = options, context.where
        self._url = options.url.rstrip("/") + "/chat/completions"
        self._headers = {"Content-Type": "application/json"}
        if options.key_variable is not None:
            key = os.environ.get(options.key_variable, "").strip()
            if not key:
                raise ConfigError(f"key_variable: the environment has no {options.key_variable}; export it")
            self._headers["Authorization"] = f"Bearer {key}"
        self._opener = build_opener(_Stays)

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        """In their order. Raises RunFailure where no answer comes, ConfigError for a request that is refused."""
        with ThreadPoolExecutor(min(self._options.at_once, len(questions))) as pool:
            return list(pool.map(self._answer, questions))

    def _answer(self, question: Question) -> Reply:
        options = self._options
        said = {
            "model": options.model, "messages": [dict(turn) for turn in question.messages],
            "max_tokens": options.max_new_tokens, "temperature": options.temperature, "top_p": options.top_p,
            "seed": question.seed % 2**31, "n": 1, "stream": False,
        }  # fmt: skip
        body = json.dumps(said).encode()
        problem = ""
        for attempt in range(options.tries):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            try:
                with self._opener.open(Request(self._url, body, self._headers), timeout=options.timeout) as response:
                    return self._read(response.read(LARGEST + 1))
            except HTTPError as error:
                problem = f"status {error.code}: {printable(error.read(300).decode(errors='replace'), 300)}"
                if error.code not in AGAIN:
                    raise ConfigError(f"{self._where}: {self._url} refuses: {problem}") from error
            except (URLError, HTTPException, OSError) as error:  # timeouts are an OSError
                problem = printable(getattr(error, "reason", None) or error or type(error).__name__, 300)
        raise RunFailure(
            f"{self._where}: {self._url}: no answer in {options.tries} tries ({problem}); what was heard is kept, the "
            "same command goes on"
        )

    def _read(self, content: bytes) -> Reply:
        if len(content) > LARGEST:
            raise DataError(f"{self._where}: {self._url} answered with more than {LARGEST} bytes")
        reading = Reading(DataError, "is it a server of chat completions?")
        answer = parse_json(content, f"{self._where}: {self._url}: its answer", reading, whole=False)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
            ended = choice.get("finish_reason") == "stop"
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            reading.refuse(f"{self._where}: {self._url}", f"answered without a message ({error!r})", error)
        return Reply(text if isinstance(text, str) else "", ended)


def server(options: ServerOptions, context: GeneratorContext) -> TextGenerator:
    """Replies of a model behind a server of chat completions (OpenAI's interface), several requests at a time.

    Source: none; the fields are those that such servers share: model, messages, max_tokens, temperature, top_p, seed.
    Use: a stronger model than moelab's own; one that no moelab reads.
    Cost: prompts leave this machine for that address. The same reply to the same seed is the server's promise, which
    many keep in part; what was heard is kept until the output lies in its place, and not asked again.
    """
    return Server(options, context)


@hookimpl
def moelab_generators() -> list[Component[GeneratorContext, TextGenerator]]:
    return [component("server", ServerOptions, server)]
