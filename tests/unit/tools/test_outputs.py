"""Where a command can't write is told before it reads anything: here what it would read isn't even there."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from moelab.atomic import check_output, check_place, write_output
from moelab.errors import UserError
from moelab_tools.cli import run

FOLDERS = {
    "ablate": ["ablate", "nowhere", "--out"],
    "trace": ["trace", "nowhere", "--out"],
    "compare": ["compare", "nowhere", "--output"],
    "export": ["export", "nowhere"],
    "surgery": ["surgery", "nowhere", "@", "split"],
    "sweep": ["sweep", "nowhere", "--out"],
    "experiment": ["experiment", "shared_expert", "train.init_from=nowhere/at/all", "--out"],
    "findings": ["experiment", "shared_expert", "train.init_from=nowhere/at/all", "--results"],
    "synthesise": ["synthesise", "nowhere", "--reward", "exact_answer", "--out"],
    "merge": ["merge", "models=[{path: ./nowhere}, {path: ./nowhere}]", "output=@"],
    "upcycle": ["upcycle", "source=./nowhere", "output=@"],
    "data": ["data", "sources=[{name: jsonl, paths: [nowhere]}]", "output=@"],
    "tag": ["tag", "generator={name: checkpoint, path: ./nowhere}", "data=[nowhere]", "output=@"],
    "evolve": ["evolve", "generator={name: checkpoint, path: ./nowhere}", "data=[nowhere]", "output=@"],
    "critique": [
        "critique", "generator={name: checkpoint, path: ./nowhere}", "data=[nowhere]",
        "principles=[{follow: Be kind.}]", "output=@",
    ],
}  # fmt: skip
FILES = {
    "view": ["view", "nowhere", "--out"],
    "generate": ["generate", "nowhere", "--out"],
    "compare --json": ["compare", "nowhere", "--json"],
    "repurpose": ["repurpose", "nowhere", "--out"],
}


def _typed(words: list[str], place: str) -> list[str]:
    return [word.replace("@", place) for word in words] if any("@" in word for word in words) else [*words, place]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", [*FOLDERS, *FILES])
@pytest.mark.parametrize("kind", ["other", "below a file", "no place"])
def test_an_output_that_can_not_be_is_refused_before_anything_is_read(
    here: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    """No place: /proc, where even root makes no file."""
    words = {**FOLDERS, **FILES}[command]
    taken = "file" if command in FOLDERS else "folder"
    place = {"other": taken, "below a file": "file/x/y", "no place": "/proc/x/y"}[kind]
    assert run(_typed(words, place)) == 2
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert place in line and "nowhere" not in line and not told.out
    assert ("is a " if kind == "other" else "can't be written") in line or "exists already" in line
    assert sorted(path.name for path in here.rglob("*")) == ["file", "folder"]


def test_a_folder_that_holds_something_is_refused_where_nothing_is_written_over(here: Path) -> None:
    (here / "folder/mine").touch()
    with pytest.raises(UserError, match=r"^--out folder: is there already"):
        check_place(Path("folder"), "--out")
    check_place(Path("folder"), "--out", fresh=False)
    check_output(Path("folder"), "--out")
    check_place(Path("new/at/all"), "--out")
    check_output(Path("file"), "--out", file=True)
    assert sorted(path.name for path in here.rglob("*")) == ["file", "folder", "mine"]


@pytest.mark.parametrize("command", ["trace", "surgery", "data", "synthesise", "tag", "export", "merge"])
@pytest.mark.parametrize("place", [".", "..", "folder/..", "folder/../folder"])
def test_a_folder_put_in_place_has_a_name_and_is_not_the_one_that_we_are_in(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, place: str
) -> None:
    """It was a traceback, or a folder that was taken away from under the command."""
    (here / "folder/folder").mkdir()
    monkeypatch.chdir(here / "folder/folder" if place.endswith("folder") else here / "folder")
    place = "../folder" if place.endswith("folder") else place
    assert run(_typed(FOLDERS[command], place)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere" not in line
    assert sorted(path.name for path in here.rglob("*")) == ["file", "folder", "folder"]


def test_a_link_is_written_through_where_it_leads_to_a_folder_and_is_not_replaced_by_one(here: Path) -> None:
    (here / "link").symlink_to("folder")
    (here / "lost").symlink_to("gone")
    check_output(Path("link"))
    check_place(Path("link/new"))
    check_output(Path("lost"), file=True)  # a file over a link
    with pytest.raises(UserError, match=r"^--out link: is a link"):
        check_place(Path("link"), "--out", fresh=False)
    for place in ("lost", "lost/x"):
        with pytest.raises(UserError, match=rf"^--out {place}: lost is a link that leads nowhere"):
            check_output(Path(place), "--out")
    with pytest.raises(UserError, match="lost is a link that leads nowhere"):
        check_output(Path("lost/x"), "--out", file=True)


def test_what_is_no_file_is_not_replaced_by_one(here: Path) -> None:
    """As root, whom the system would let do it: /dev/stdout is a link to /proc/self/fd/1, and may lead to a file."""
    with pytest.raises(UserError, match="is no file"):
        check_output(Path("/dev/null"), "--out", file=True)
    with (here / "file").open() as opened:
        (here / "stdout").symlink_to(f"/proc/self/fd/{opened.fileno()}")
        assert (here / "stdout").is_file()
        with pytest.raises(UserError, match="leads to what a process has open"):
            check_output(Path("stdout"), "--out", file=True)


def test_a_folder_is_put_in_place_where_its_own_parent_takes_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where it itself takes files: what is written beside it is renamed."""
    (here / "shut").mkdir()
    (here / "shut/mine").mkdir()
    asked: list[Path] = []

    def room(dir: Path) -> object:
        asked.append(dir)
        if dir.name == "shut":
            raise PermissionError(13, "Permission denied")
        return contextlib.nullcontext()

    monkeypatch.setattr("moelab.atomic.tempfile.TemporaryFile", room)
    with pytest.raises(UserError, match=r"^--out shut/mine: can't be written, shut: Permission denied"):
        check_place(Path("shut/mine"), "--out")
    check_output(Path("shut/mine"), "--out")
    assert asked == [Path("shut"), Path("shut/mine")]


def test_the_folders_above_a_file_are_made(here: Path) -> None:
    write_output(Path("new/at/all.txt"), "text", "--out")
    assert Path("new/at/all.txt").read_text() == "text"
    with pytest.raises(UserError, match=r"^--out file/x: can't be written"):
        write_output(Path("file/x"), "text", "--out")


@pytest.mark.parametrize("place", ["report", "folder", "report/../report"])
def test_numbers_are_not_written_where_their_report_lies(
    here: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """Neither folder is there yet: the report was made, and then in the file's way."""
    (here / "folder").rmdir()
    output = "folder/report" if place == "folder" else "report"
    assert run(["compare", "nowhere", "--output", output, "--json", place]) == 2
    assert capsys.readouterr().err.startswith(f"error: --json {place}: is the folder of the report, or above it")


def test_what_is_read_is_not_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = 'def f(x):\n    """\n    >>> f(1)\n    2\n    """\n    return x + 1\n'
    (here / "f.py").write_text(code)
    (here / "link.py").symlink_to("f.py")
    for out in ("f.py", "./folder/../f.py", "link.py"):
        assert run(["repurpose", "f.py", "--out", out, "--most", str(10**20)]) == 2
        assert capsys.readouterr().err.splitlines() == [
            f"error: --out {Path(out)}: is what is read, and would be lost; name another file"
        ]
    assert (here / "f.py").read_text() == code
    (here / "trace.json").write_text("{}")
    assert run(["view", ".", "--out", "trace.json"]) == 2
    assert "is what is read" in capsys.readouterr().err
    for _ in range(2):  # what it wrote before may be replaced, in the folder that is read too
        assert run(["repurpose", ".", "--out", "questions.jsonl", "--most", str(10**20)]) == 0
