"""`moelab verify` of a run or a checkpoint: every byte against the checksums that were stored when it was written."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from moelab.checkpoint import BEST, CHECKPOINTS, CONFIG, STATE, checkpoints
from moelab.errors import CheckpointError, RunFailure
from moelab.integrity import Finding, inspect
from moelab.manifest import MANIFEST
from moelab.printable import LONGEST_MESSAGE, printable
from moelab_tools.upcycling import bytes_bar, make_console

SHOWN = 20  # problems of a checkpoint that are printed


def verify_checkpoints(path: Path) -> None:
    """Print what became of each checkpoint of a run, or of one checkpoint.

    Raises RunFailure where one is damaged; CheckpointError where there is none, or none that has checksums.
    """
    folders = checkpoints_of(path)
    console = make_console()
    total = sum(
        file.stat().st_size
        for folder in folders
        for file in folder.iterdir()
        if file.name != MANIFEST and file.is_file()
    )
    findings = []
    with bytes_bar(console) as bar:
        task = bar.add_task("verifying", total=total)
        for folder in folders:
            findings.append(inspect(folder, lambda nbytes: bar.advance(task, nbytes)))
            _print(console, findings[-1])
    damaged = [finding for finding in findings if finding.problems]
    if damaged:
        newest = max((f.folder for f in findings if not f.problems and f.verifiable), default=None)
        rest = f"; the newest that is whole: {newest}" if newest else ""
        names = ", ".join(finding.folder.name for finding in damaged)
        raise RunFailure(f"{path}: {len(damaged)} of {len(findings)} checkpoints damaged: {names}{rest}")
    if not any(finding.verifiable for finding in findings):
        raise CheckpointError(f"{path}: has no {MANIFEST}, so there is nothing to compare with; nothing was verified")


def checkpoints_of(path: Path) -> list[Path]:
    """Of a run folder all of its checkpoints, oldest first, then the best if it keeps one; or the one that `path` is.

    Raises CheckpointError where there is none.
    """
    if (path / CHECKPOINTS).is_dir():
        found = checkpoints(path)
        if not found:
            raise CheckpointError(f"{path}: this run has no checkpoint")
        return [*found, *[best for best in [path / BEST] if best.is_dir()]]
    if any((path / name).is_file() for name in (STATE, CONFIG)):
        return [path]
    raise CheckpointError(
        f"{path}: holds nothing to verify: no checkpoints of a run, no {STATE} of a checkpoint, no upcycle.json; a "
        "Hugging Face folder has no checksums"
    )


def _print(console: Console, finding: Finding) -> None:
    def say(text: str) -> None:
        console.print(printable(text, LONGEST_MESSAGE), markup=False, highlight=False, soft_wrap=True)

    for remark in finding.remarks:
        say(remark)
    if not finding.problems and finding.verifiable:
        size = f"{finding.files} files, {finding.tensors} tensors, {finding.nbytes / 1e9:.3f} GB"
        say(f"{finding.folder}: whole: {size} as they were written")
    for problem in finding.problems[:SHOWN]:
        say(f"{finding.folder}: DAMAGED: {problem}")
    if len(finding.problems) > SHOWN:
        say(f"{finding.folder}: DAMAGED: and {len(finding.problems) - SHOWN} more")
