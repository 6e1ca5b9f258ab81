"""What stands around a program that a model wrote, in the program's own interpreter. Run by `execution.py`, alone.

In this order: a process tree and a network of its own, where the system gives them (Linux, user namespaces); limits of
the system on memory, processor, files and processes; an audit hook (PEP 578) that refuses what no test of a function
needs: other processes, signals, sockets, foreign libraries, and going or writing outside the folder. Python's standard
library alone is imported, less what writes files that no hook is told of.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from typing import Any

NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000  # CLONE_NEWUSER | _NEWPID | _NEWNET | _NEWIPC
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG
REFUSED = (
    "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn",
    "subprocess.Popen", "signal.pthread_kill", "socket.", "ctypes.", "os.setxattr", "os.chown", "os.lchown",
    "syslog.", "webbrowser.", "ftplib.", "http.client.", "smtplib.", "urllib.Request", "cpython.run_",
    "sys._current_frames", "gc.get_objects", "gc.get_referrers", "gc.get_referents", "resource.", "_posixsubprocess.",
    "os.mkfifo", "os.mknod",
)  # fmt: skip
CHANGES = {  # event -> which of its arguments are paths that it changes
    "os.remove": (0,), "os.rename": (0, 1), "os.rmdir": (0,), "os.mkdir": (0,), "os.link": (0, 1), "os.symlink": (0, 1),
    "os.truncate": (0,), "os.chmod": (0,), "os.utime": (0,), "shutil.rmtree": (0,), "shutil.move": (0, 1),
    "os.removexattr": (0,), "os.chflags": (0,), "os.chdir": (0,), "sqlite3.connect": (0,),
}  # fmt: skip
COUNTED = ("os.mkdir", "os.link", "os.symlink", "sqlite3.connect")
UNTOLD = ("readline", "_posixshmem", "_dbm", "_gdbm")  # modules that write files, or memory with a name, untold
IN_MEMORY = ":memory:"  # of sqlite
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def alone() -> None:
    """Go on in a process tree of its own, in which it is the first: when it ends, all that it began ends.

    Where the system gives none, all goes on in this one.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes  # noqa: PLC0415  (of Linux alone)

    try:
        library = ctypes.CDLL(None, use_errno=True)
        library.prctl(DIES_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        if library.unshare(NAMESPACES) != 0:
            return
    except (OSError, AttributeError):
        return
    child = os.fork()
    if child == 0:
        library.prctl(DIES_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        return
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 1)


def limit(seconds: float, memory_mb: int, file_mb: int) -> None:
    """Hard limits of the system: what is lowered here can't be raised again."""
    processor = int(seconds) + 1
    wanted = {
        "RLIMIT_CPU": processor, "RLIMIT_FSIZE": file_mb << 20, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 32,
        "RLIMIT_AS": memory_mb << 20, "RLIMIT_NPROC": 0,
    }  # fmt: skip
    for name, value in wanted.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        _, most = resource.getrlimit(kind)
        lower = value if most == resource.RLIM_INFINITY else min(value, most)
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some of addresses
            resource.setrlimit(kind, (lower, lower))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a full file is an OSError


def watch(folder: str, files: int) -> None:
    """Refuse what a test of a function doesn't need. Of writes, those in `folder`, `files` of them, are let through."""
    inside = os.path.realpath(folder) + os.sep
    left, real, join, text, here, is_folder = (
        [files], os.path.realpath, os.path.join, os.fsdecode, os.getcwd, os.path.isdir
    )  # fmt: skip
    for name in UNTOLD:
        sys.modules[name] = None  # type: ignore[assignment]  # which Python can't import then

    def refuse(event: str) -> None:
        raise PermissionError(f"{event} is refused to code that is judged")

    def changes(event: str, path: Any) -> None:
        if isinstance(path, int) or not (real(join(here(), text(path))) + os.sep).startswith(inside):
            refuse(event)

    def counted(event: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            refuse(event)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if (isinstance(flags, int) and flags & WRITING) or (isinstance(mode, str) and set(mode) & set("wax+")):
                if not isinstance(path, int):
                    changes(event, path)
                counted(event)
            elif mode is None and not isinstance(path, int) and is_folder(path):
                changes(event, path)  # what is named relative to a folder that is open is told without it
        elif event in CHANGES and arguments[0] != IN_MEMORY:
            for place in CHANGES[event]:
                changes(event, arguments[place])
            if event in COUNTED:
                counted(event)
        elif event.startswith(REFUSED):
            refuse(event)

    sys.addaudithook(hook)


def main() -> None:
    folder, seconds, memory, file_size, files = sys.argv[1:]
    sys.argv[:] = ["program.py"]
    alone()
    with open(os.path.join(folder, "program.py"), encoding="utf-8") as file:
        source = file.read()
    with open(os.path.join(folder, "token"), encoding="utf-8") as file:
        token = file.read()
    os.unlink(os.path.join(folder, "token"))
    out = os.open(os.path.join(folder, "verdict"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    limit(float(seconds), int(memory), int(file_size))
    watch(os.getcwd(), int(files))

    def verdict(said: str, write: Any = os.write, begin: bytes = token.encode()) -> None:
        """What the program found; the first word counts."""
        write(out, begin + said.encode())

    exec(compile(source, "program.py", "exec"), {"__name__": "__main__", "verdict": verdict})


main()
