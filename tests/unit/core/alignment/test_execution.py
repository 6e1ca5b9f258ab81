"""Programs that do what they should not: nothing of them is left, and nobody else is touched."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from moelab.alignment.execution import NOISE, Limits, run_program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="code runs on POSIX systems alone")
SHORT = Limits(seconds=0.3)


def left_over(folder: Path) -> list[Path]:
    return list(folder.glob("moelab-code-*"))


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_program_says_and_finds_comes_back(scratch: Path) -> None:
    found = run_program("import sys\nprint('out')\nsys.stdout.flush()\nsys.stderr.write('err')\nverdict('3/4')\n")
    assert (found.verdict, found.exit_code, found.timed_out) == ("3/4", 0, False)
    assert found.output == "out\nerr"
    assert not left_over(scratch)


def test_it_sees_an_empty_folder_no_environment_no_input_and_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_SECRET", "x")
    source = (
        "import os, sys\nassert not os.listdir('.')\n"
        "assert 'MOELAB_SECRET' not in os.environ and 'PATH' not in os.environ\n"
        "assert sys.stdin.read() == ''\nassert not any('site-packages' in path for path in sys.path)\n"
        "assert sys.flags.isolated\nverdict('yes')"
    )
    found = run_program(source)
    assert found.verdict == "yes", found.output


@pytest.mark.parametrize(
    "source",
    [
        "import os\nwhile True: os.fork()",
        "import os\nos.kill(-1, 9)",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.killpg(0, 9)",
        "import subprocess\nsubprocess.run(['sh', '-c', 'kill -9 -1'])",
        "import os\nos.system('true')",
        "import ctypes\nctypes.CDLL(None).kill(-1, 9)",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import sys\nopen(sys.path[-1] + '/evil.py', 'w')",
        "import os\nos.remove(os.__file__)",
        "import shutil\nshutil.rmtree('..')",
        "import os\nos.symlink('/', 'root')\nopen('root/tmp/evil', 'w')",
        "import os\nos.chdir('/')\nopen('tmp/evil', 'w')",
        "import os\nfolder = os.open('..', os.O_RDONLY)\nos.mkdir('evil', dir_fd=folder)",
        "import os\nfolder = os.open('..', os.O_RDONLY)\nos.open('evil', os.O_CREAT | os.O_WRONLY, dir_fd=folder)",
    ],
)
def test_what_reaches_beyond_the_folder_is_refused(source: str) -> None:
    found = run_program(source + "\nverdict('done')", SHORT)
    assert found.verdict == "" and found.exit_code != 0
    assert "refused to code that is judged" in found.output, found.output


def test_files_that_no_hook_is_told_of_are_not_written(scratch: Path) -> None:
    pytest.importorskip("sqlite3")
    source = (
        "import sqlite3\nassert sqlite3.connect(':memory:').execute('select 1').fetchone() == (1,)\n"
        f"verdict('yes')\nsqlite3.connect({str(scratch / 'evil.db')!r}).execute('create table t (x)')"
    )
    found = run_program(source)
    assert found.verdict == "yes" and "sqlite3.connect is refused" in found.output
    for module in ("readline", "_posixshmem"):
        assert "ImportError" in run_program(f"try: import {module}\nexcept ImportError: print('ImportError')").output
    assert not list(scratch.iterdir())


def test_within_the_folder_a_program_goes_and_writes_as_it_likes() -> None:
    source = (
        "import os, tempfile\nos.mkdir('d')\nos.chdir('d')\nopen('x', 'w').write('1')\nos.chdir('..')\n"
        "with tempfile.TemporaryDirectory() as made: open(os.path.join(made, 'y'), 'w').write('2')\n"
        "assert os.listdir('d') == ['x'] and not os.path.exists(made)\nverdict('yes')"
    )
    found = run_program(source)
    assert found.verdict == "yes", found.output


@pytest.mark.parametrize(
    "source",
    [
        "i = 0\nwhile True:\n    open(f'{i}', 'wb').write(bytes(1 << 19))\n    i += 1",
        "open('one', 'wb').write(bytes(1 << 30))",
        "import os\ni = 0\nwhile True:\n    os.mkdir(str(i))\n    i += 1",
        "x = bytearray(1 << 40)",
        "x = []\nwhile True: x.append(bytearray(1 << 24))",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ],
)
def test_disk_and_memory_end_soon(source: str, scratch: Path) -> None:
    found = run_program(source + "\nverdict('done')", Limits(seconds=5))
    assert found.verdict == "" and found.exit_code != 0 and not found.timed_out
    assert not left_over(scratch)


def test_a_flood_of_output_is_cut() -> None:
    found = run_program("while True: print('x' * 10000)", SHORT)
    assert 0 < len(found.output) <= NOISE and found.exit_code != 0


@pytest.mark.parametrize("source", ["import time\ntime.sleep(1e6)", "import signal\nsignal.pause()"])
def test_what_sleeps_forever_is_ended(source: str) -> None:
    found = run_program(source + "\nverdict('done')", SHORT)
    assert found.timed_out and found.verdict == ""


def test_no_process_outlives_the_program_that_began_it(scratch: Path) -> None:
    """Through a door that Python doesn't watch; where the system refuses it there is nothing to outlive anybody."""
    mark = f"{os.getpid()}{time.monotonic_ns()}"
    source = f"""
import os, _posixsubprocess
code = "import time; time.sleep(100) # {mark}"
a, b = os.pipe()
command = [{sys.executable!r}, "-I", "-S", "-c", code]
_posixsubprocess.fork_exec(command, [{sys.executable!r}.encode()], True, (b,), None, None,
    -1, -1, -1, -1, -1, -1, a, b, True, False, 0, None, None, None, -1, None, False)
import time
time.sleep(0.2)
verdict("began")
"""
    run_program(source, Limits(seconds=2))
    time.sleep(0.05)
    listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=False).stdout
    assert mark not in listed


def test_an_answer_that_ends_the_interpreter_finds_nothing() -> None:
    assert run_program("import os\nprint('1/1')\nos._exit(0)").verdict == ""
    assert run_program("open('../verdict', 'w').write('1/1')").verdict == ""
