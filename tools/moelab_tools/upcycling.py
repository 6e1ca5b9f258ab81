"""Runs an upcycling from the command line: config, plan, progress, and what is printed at the end."""

from __future__ import annotations

import json
import signal
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from moelab.atomic import check_output
from moelab.config.files import find_config, is_override
from moelab.config.load import Loaded, load_config
from moelab.config.upcycle import UpcycleConfig
from moelab.errors import CheckpointError, ConfigError, RunFailure
from moelab.hf.gguf_file import SUFFIX
from moelab.hookspecs import DATA_SOURCES
from moelab.hub import user_folder
from moelab.paths import user_path
from moelab.registry import Registry
from moelab_tools.terminal import make_console
from moelab_tools.upcycle_probe import probe_of
from moelab_tools.upcycle_receipt import RECEIPT, print_receipt, write_receipt
from moelab_tools.upcycle_report import print_outcome, print_plan
from moelab_upcycling.convert import convert, prepare, registry_of
from moelab_upcycling.verify import plan_of_output, verify

DEFAULT_SCALE = "qwen2-57b-a14b"  # of `moelab upcycle SOURCE OUTPUT`
WIDE = 140  # characters of the tables where there is no terminal


@dataclass(frozen=True)
class UpcycleRequest:
    """The command line."""

    arguments: tuple[str, ...]
    dry_run: bool
    sink: str
    layers: str | None
    receipt: bool


def _source(named: str) -> str:
    try:
        return str(user_folder(named, "source"))
    except CheckpointError as error:
        raise CheckpointError(f"source: {error}") from error


def run_upcycle(request: UpcycleRequest) -> None:
    """All of `moelab upcycle`."""
    console = make_console(WIDE)
    loaded = load_config(spelled_out(request.arguments), UpcycleConfig)
    config = loaded.config
    if request.sink == "files" and config.output is not None and not request.dry_run:
        check_output(user_path(config.output, "output"), "output:")
    try:
        config.source = [_source(source) for source in config.sources]
        folders = loaded.places("plugins").all()
        registry = registry_of(config, folders)
        plan = prepare(config, registry, folders)
    except ConfigError as error:
        raise loaded.blame(error) from error
    layers = parse_layers(request.layers, plan.target.num_hidden_layers)
    print_plan(console, plan, config, ledger=request.dry_run)
    if request.dry_run:
        return
    if request.sink == "files" and config.output is None:
        raise ConfigError("output: has no value yet; write output=DIR, or --sink hash to keep nothing")
    output = user_path(config.output, "output") if request.sink == "files" and config.output else None
    if request.receipt and output is not None:
        _check_receipt(loaded)
    with _terminable(), bytes_bar(console) as bar:
        task = bar.add_task("upcycling", total=None)
        outcome = convert(
            plan,
            output,
            workers=config.workers,
            layers=layers,
            progress=lambda nbytes: bar.advance(task, nbytes),
            announce=lambda make, check: bar.update(task, total=make + check),
            versions=registry.versions(),
        )
    print_outcome(console, plan, outcome, output)
    if request.receipt and outcome.complete and output is not None:
        with layers_bar(console) as bar, _model_is_whole(output):
            task = bar.add_task("receipt", total=plan.target.num_hidden_layers)
            probe = probe_of(config, output, plan.target.vocab_size, plan.seed, loaded.places("receipt"))
            receipt = write_receipt(plan, registry, output, probe, lambda: bar.advance(task))
        print_receipt(console, receipt)


def _check_receipt(loaded: Loaded[UpcycleConfig]) -> None:
    """What the receipt will read is named before the conversion begins, not hours later; no torch is needed for it."""
    config = loaded.config
    try:
        registry = Registry(config.plugins, config.entry_points, loaded.places("plugins"), points=[DATA_SOURCES])
        registry.select(DATA_SOURCES, config.receipt.source, "receipt.source")
    except ConfigError as error:
        raise ConfigError(f"{loaded.blame(error)}; or leave the receipt out with --no-receipt") from error


@contextmanager
def _model_is_whole(output: Path) -> Iterator[None]:
    """What stops the receipt, a plugin that can't be imported, say, costs no model: that is told with it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            f"{error}. The model in {output} is whole and verified; it lacks {RECEIPT} alone, which --no-receipt "
            "leaves out"
        ) from error


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """SOURCE OUTPUT in place of a config: the published recipe, at the width of the source."""
    plain = [argument for argument in arguments if not is_override(argument)]
    if len(plain) != 2 or not (_is_folder(plain[0]) or not any(map(_is_config, plain))):
        return list(arguments)
    rest = [argument for argument in arguments if is_override(argument)]
    return [f"source={quoted(plain[0])}", f"output={quoted(plain[1])}", f"scale={DEFAULT_SCALE}", *rest]


def _is_folder(name: str) -> bool:
    return user_path(name).is_dir() or name.endswith(SUFFIX)


def _is_config(name: str) -> bool:
    """Whether it is found as one, or spelt as one: a mistyped config is no source."""
    try:
        find_config(name)
    except ConfigError:
        return name.endswith((".yaml", ".yml"))
    return True


def quoted(text: str) -> str:
    """As a value of key=value that stays a text, whatever it looks like."""
    return json.dumps(text, ensure_ascii=False)


def run_verify(output: Path, sources: Sequence[Path], full: bool, layers: str | None, *, trust: bool = False) -> None:
    """All of `moelab verify`; raises RunFailure where bytes differ."""
    console = make_console(WIDE)
    plan = plan_of_output(output, sources, [Path.cwd()], trust=trust)
    chosen = parse_layers(layers, plan.target.num_hidden_layers)
    with _terminable(), bytes_bar(console) as bar:
        task = bar.add_task("verifying", total=None)
        verdict = verify(
            output,
            plan,
            full=full,
            layers=chosen,
            progress=lambda nbytes: bar.advance(task, nbytes),
            announce=lambda nbytes: bar.update(task, total=nbytes),
        )
    compared = f"{verdict.tensors} of {verdict.total} tensors, {verdict.nbytes / 1e9:.3f} GB"
    if verdict.differences:
        raise RunFailure(f"{compared} compared:\n" + "\n".join(verdict.differences[:20]))
    console.print(f"equal, byte for byte: {compared}")


def parse_layers(text: str | None, count: int) -> range | None:
    """ "a:b" as a range; either side may be left out."""
    if text is None:
        return None
    first, separator, last = text.partition(":")
    if not separator or not (first or "0").isdigit() or not (last or "0").isdigit():
        raise ConfigError(f"--layers: '{text}' is no range; write --layers 0:{count}")
    chosen = range(int(first or 0), int(last or count))
    if not chosen or chosen.stop > count:
        raise ConfigError(f"--layers: {text} is not within the layers 0:{count}")
    return chosen


def bytes_bar(console: Console) -> Progress:
    """Progress in bytes."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def layers_bar(console: Console) -> Progress:
    """Progress in layers."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """A polite kill cleans up as Ctrl-C does."""

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
