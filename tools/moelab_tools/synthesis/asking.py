"""Questions put to a generator, with a memory: a command that was stopped goes on where it was.

A reply hangs on its question and the generator alone, so what was heard is kept beside the output under both, and not
asked again. The memory is gone once the output lies in its place.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moelab.atomic import check_place, lock_beside
from moelab.config.load import Loaded
from moelab.data.generating import GeneratorContext, Guarded, Question, Reply, identity_of
from moelab.errors import ConfigError, UserError
from moelab.hookspecs import GENERATORS
from moelab.lock import hold_file
from moelab.paths import user_path
from moelab.registry import Registry
from moelab.safe_files import Reading, json_lines
from moelab_tools.synthesis.declaration import AskingConfig
from moelab_tools.waiting import Waiting

LARGEST = 32 << 20  # bytes of a file of the memory, of which there may be many
KEY = "generator"


class Memory:
    """Replies by the digest of who was asked what, in JSON lines of a folder."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there. A line that was being written when the process ended is left out."""
        self.folder = folder
        reading = Reading(UserError, f"delete {folder}, and what was heard is asked again")
        self._files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
        self._heard: dict[str, Reply] = {}
        for path in self._files:
            for where, line in json_lines(path, reading, torn=True):
                key, text, ended = line.get("key"), line.get("text"), line.get("ended")
                if not isinstance(key, str) or not isinstance(text, str) or not isinstance(ended, bool):
                    reading.refuse(where, "is no reply that moelab has kept")
                self._heard[key] = Reply(text, ended)
        self._number = len(self._files)

    def __len__(self) -> int:
        return len(self._heard)

    def get(self, key: str) -> Reply | None:
        return self._heard.get(key)

    def keep(self, replies: dict[str, Reply]) -> None:
        """Write them down, before anything is made of them. Raises ConfigError for what the system refuses."""
        self._heard |= replies
        path = self.folder / f"{self._number:05d}.jsonl"
        rows = [{"key": key, "text": reply.text, "ended": reply.ended} for key, reply in replies.items()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:  # ASCII: halves of surrogate pairs, which a model may write, too
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                if file.tell() > LARGEST:
                    self._number += 1
        except OSError as error:
            raise ConfigError(f"{path}: can't be written: {error.strerror or error}") from error


class Asker:
    """A generator, its memory, and who it is."""

    def __init__(self, apply: Guarded, said: dict[str, Any], memory: Memory, batch_size: int) -> None:
        """`said`: what results tell of the generator, JSON."""
        self.said, self.memory, self.batch_size = said, memory, batch_size
        self._apply = apply
        self.asked = 0

    def __call__(self, questions: Sequence[Question], label: str) -> list[Reply]:
        """A reply to each; those that were heard before are not asked again."""
        keys = [self._key(one) for one in questions]
        new = {key: one for key, one in zip(keys, questions, strict=True) if self.memory.get(key) is None}
        pending = list(new.items())
        with Waiting(label, len(pending)) as waiting:
            for begin in range(0, len(pending), self.batch_size):
                some = pending[begin : begin + self.batch_size]
                found = self._apply([question for _, question in some])
                self.memory.keep({key: reply for (key, _), reply in zip(some, found, strict=True)})
                self.asked += len(some)
                for _ in some:
                    waiting.step()
        replies = [self.memory.get(key) for key in keys]
        return [reply for reply in replies if reply is not None]

    def _key(self, question: Question) -> str:
        return digest([self.said, [dict(one) for one in question.messages], question.seed])


def free(loaded: Loaded[Any]) -> Path:
    """The output of an `AskingConfig`, before anything is read. UserError where it exists or can't be written."""
    output = user_path(loaded.config.output, "output")
    if output.exists() or output.is_symlink():
        raise ConfigError(f"{output}: exists already, and nothing is overwritten; take another name, or move it away")
    check_place(output, "output:")
    return output


@contextmanager
def asking(loaded: Loaded[Any], output: Path, *, trust: bool = False) -> Iterator[Asker]:
    """The generator of an `AskingConfig`, its output not there yet and this process the only one that makes it.

    `output`: what `free` gave. Raises ConfigError for a generator that can't be. The memory is deleted where what
    follows ends well.
    """
    config: AskingConfig = loaded.config
    registry = Registry(config.plugins, config.entry_points, loaded.places("plugins"), points=[GENERATORS])
    resolved = registry.resolve(GENERATORS, config.generator, KEY)
    otherwise = "take another output"
    with hold_file(lock_beside(output), what=str(output), otherwise=otherwise):
        memory = Memory(output.with_name(f".{output.name}.replies"))
        context = GeneratorContext(loaded.places(KEY), KEY, registry, trust)
        apply = registry.build(GENERATORS, config.generator, context, KEY)
        part = registry.part(GENERATORS, config.generator, KEY)
        said = {**resolved, **identity_of(apply)}
        yield Asker(Guarded(apply, part), said, memory, config.batch_size)
        shutil.rmtree(memory.folder, ignore_errors=True)


def digest(value: Any) -> str:
    """Of any JSON, by its content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
