"""Whether the code of an answer does what examples in the prompt's line say, by running it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from moelab import Attempt, Component, ConfigError, Reward, RewardContext, component, hookimpl
from moelab.alignment.execution import Limits, run_program

_FENCE = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)
MOST_WORKERS = 64
# In the answer's own process, so that its objects need not be written down: see Cost below.
JUDGE = """
def _judged(tell):
    import contextlib, doctest, io, sys
    names = {{}}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            exec(compile({code!r}, "answer.py", "exec"), names)
        except BaseException:
            return
        examples = doctest.DocTestParser().get_doctest({tests!r}, names, "answer", "answer.py", 0)
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(examples, out=lambda text: None)
    tell(f"{{runner.tries - runner.failures}}/{{runner.tries}}")
_tell = verdict
del verdict
_judged(_tell)
"""


@dataclass
class DoctestOptions:
    allow_code_execution: bool = False  # nothing runs without it: the policy's code is a stranger's
    key: str = "tests"  # of the prompt's line: examples, ">>> f(2)" and below it what is printed
    setup: str = "setup"  # of the prompt's line, where it has it: code before the answer's, such as imports
    prompt_first: bool = False  # the prompt is the code's beginning, which the answer goes on with; a text then
    partial: bool = True  # the share of examples that hold; false: 1 where all do, else 0
    seconds: float = 5.0  # of an answer's code, with its examples
    memory_mb: int = 512  # of addresses
    workers: int = 2  # programs at once

    def __post_init__(self) -> None:
        if not self.allow_code_execution:
            raise ValueError(
                "allow_code_execution: is false, and this reward runs code that a model wrote; read docs/alignment.md "
                "and set it to true"
            )
        if not 0.1 <= self.seconds <= 3600:
            raise ValueError(f"seconds: must be in 0.1 .. 3600, not {self.seconds}")
        if self.memory_mb < 64:
            raise ValueError(f"memory_mb: an interpreter needs 64, not {self.memory_mb}")
        if not 1 <= self.workers <= MOST_WORKERS:
            raise ValueError(f"workers: must be in 1 .. {MOST_WORKERS}, not {self.workers}")


@dataclass
class Doctests:
    """The share of examples that hold, for each attempt."""

    options: DoctestOptions

    def __post_init__(self) -> None:
        self.needs = {self.options.key: (str,)}
        self.limits = Limits(self.options.seconds, self.options.memory_mb)

    def __call__(self, attempts: Sequence[Attempt]) -> list[float]:
        with ThreadPoolExecutor(self.options.workers) as pool:
            return list(pool.map(self._worth, attempts))

    def _worth(self, attempt: Attempt) -> float:
        tests = attempt.fields[self.options.key]
        setup = attempt.fields.get(self.options.setup, "")
        if self.options.prompt_first and not isinstance(attempt.prompt, str):
            raise ConfigError(f"{attempt.where}: prompt: is no text, which prompt_first goes on with")
        before = attempt.prompt if self.options.prompt_first else ""
        code = f"{setup}\n{before}{_code(attempt.text)}\n"
        verdict = run_program(JUDGE.format(code=code, tests=tests + "\n"), self.limits).verdict
        held, _, count = verdict.partition("/")
        if not (held.isdigit() and count.isdigit() and int(count)):
            return 0.0
        share = int(held) / int(count)
        return share if self.options.partial else float(share == 1.0)


def _code(text: str) -> str:
    """What stands in the last fence, or all of it."""
    fenced = _FENCE.findall(text)
    return str(fenced[-1]) if fenced else text


def doctests(options: DoctestOptions, context: RewardContext) -> Reward:
    """The share of doctest examples of the prompt's line that hold once the answer's code has run. Runs code.

    In an interpreter of its own (`python -I -S`), an empty folder, without environment, stdin and network, with limits
    on time, memory, files and processes; the whole process group is killed. It is no security boundary.

    Source: Python's doctest.
    Use: functions whose results can be written down; execution feedback.
    Cost: some 60 ms an answer; an answer that looks for what judges it in its own process can deceive it.
    """
    return Doctests(options)


@hookimpl
def moelab_rewards() -> list[Component[RewardContext, Reward]]:
    return [component("doctest", DoctestOptions, doctests)]
