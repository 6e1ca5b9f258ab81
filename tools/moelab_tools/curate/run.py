"""`moelab data` from its config to its folder: pieces in processes, copies over all of them, text and account.

A piece is some megabytes of documents in the order in which the sources give them. Each is written whole or not at all,
so a run that is killed loses the pieces that were being made; the same command reads the sources again, leaves out what
is done, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.console import Console

from moelab.atomic import check_place, put_in_place
from moelab.config.load import Loaded, load_config
from moelab.data.account import Account as Causes
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.corpus import Corpus, DataContext, Document, TokenStream
from moelab.data.covering import Cover
from moelab.data.tokenizer import load_tokenizer
from moelab.errors import ConfigError, UserError
from moelab.hookspecs import DATA_SOURCES, TAGGERS, TEXT_FILTERS
from moelab.lock import hold_file
from moelab.paths import user_path
from moelab.processes import die_with
from moelab.registry import Registry
from moelab_tools.curate.account import Account
from moelab_tools.curate.declaration import CurateConfig, stages
from moelab_tools.curate.duplicates import Pieces
from moelab_tools.curate.filtering import Parts, Work, build_parts, digest_of, is_done, make_piece
from moelab_tools.curate.page import Circumstances, print_account, write_account
from moelab_tools.curate.progress import Reading
from moelab_tools.curate.tokens import cut, tokenise, write_cache
from moelab_tools.terminal import make_console

KEPT, REJECTED, TOKENS, PIECES = "kept", "rejected", "tokens", "pieces"
# Say nothing of what becomes of a document in its piece.
UNCOUNTED = ("output", "workers", "plugins", "entry_points", "tokens", "select")
FORMAT = 3  # of pieces: those of another one are made anew
# What a source is answered with whose documents were taken.
EMPTY = TokenStream(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int64), [])
_BUILT: list[Parts] = []  # of this process
_WORK: list[Work] = []


@dataclass(frozen=True)
class CurateRequest:
    """The command line."""

    arguments: tuple[str, ...]
    force: bool = False
    report_only: bool = False


def run_curate(request: CurateRequest, console: Console | None = None) -> Account:
    """All of `moelab data`. Raises UserError before anything is written for whatever is wrong in the config."""
    console = console or make_console()
    loaded = load_config(request.arguments, CurateConfig)
    config = loaded.config
    config.report_only = config.report_only or request.report_only
    output = user_path(config.output, "output")
    check_place(output, "output:", fresh=False)  # with --force too: it replaces what was made here, nothing else
    try:
        registry = Registry(config.plugins, config.entry_points, loaded.places("plugins"),
                            points=[DATA_SOURCES, TEXT_FILTERS, TAGGERS])  # fmt: skip
        config.sources = [
            registry.resolve(DATA_SOURCES, source, f"sources.{number}") for number, source in enumerate(config.sources)
        ]
        if config.tokens.tokenizer is not None:
            load_tokenizer(config.tokens.tokenizer)
        work = _work(loaded, registry, output.with_name(f".{output.name}.making"))
        build_parts(work)
    except ConfigError as error:
        raise loaded.blame(error) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    with hold_file(output.with_name(f".{output.name}.lock"), what=f"output: {output}", otherwise="name another output"):
        if not request.force and output.exists() and any(output.iterdir()):
            raise UserError(f"output: {output} is there already; name another, or give --force to make it anew")
        try:
            return _make(loaded, registry, work, output, console)
        finally:
            if not any(work.folder.glob("*.json")):  # no piece that the next start could go on with
                shutil.rmtree(work.folder.parent, ignore_errors=True)


def _make(loaded: Loaded[CurateConfig], registry: Registry, work: Work, output: Path, console: Console) -> Account:
    config = loaded.config
    work.folder.mkdir(parents=True, exist_ok=True)
    tokenised, causes = config.tokens.tokenizer is not None and work.write_text, Causes()
    with _workers(config.workers, work) as pool:
        with Reading() as reading:
            count, commits = _read_all(loaded, registry, work, pool, reading, causes)
        if not count:
            causes.close()  # all of it was left out: why, is told beside the error
            raise UserError("sources: no document with any text in it; check the paths")
        pieces = Pieces(work.folder, count)
        account = pieces.account()
        dropped = pieces.copies(config.deduplicate, account)
        cover = _select(config, pieces, dropped, account)
        if tokenised:
            held_out = cut(pieces, dropped, config.tokens, account, causes, near=config.deduplicate.near)
            tokenise(pieces, dropped, config.tokens, work.settings, pool)
    names = [f"{number + 1}. {stage.part['name']}" for number, stage in enumerate(work.stages)]
    made = work.folder.parent / "made"
    shutil.rmtree(made, ignore_errors=True)  # what a killed run had begun to put together
    made.mkdir()
    if work.write_text:
        pieces.write(made / KEPT, dropped)
    if config.keep_rejected:
        pieces.write_rejected(made / REJECTED, dropped)
    if tokenised:
        written = write_cache(pieces, dropped, held_out, config.tokens, account, causes, made / TOKENS)
    for domain in (name for name in account.domains if not account.kept[name]):
        causes.add(
            "domains of which nothing is left", f"'{domain}' of {account.documents[domain]:,} documents",
            "the account says at which stage they went; `but: [...]` leaves a domain out of one",
        )  # fmt: skip
    told = causes.close()
    write_account(made, account, Circumstances(config, names, commits, told, cover))
    put_in_place(made, output)
    shutil.rmtree(work.folder.parent)
    print_account(console, account, names)
    if cover is not None:
        console.print(f"selected: {cover}", highlight=False, soft_wrap=True)
    if work.write_text and account.kept.total():
        console.print(f"text: {output / KEPT}", highlight=False, soft_wrap=True)
        how = f'moelab train CONFIG "data.source={{name: jsonl, paths: [{output / KEPT}], domain_key: domain}}"'
        if tokenised:
            source = f"{{name: tokenised, path: {output / TOKENS}}}"
            how = f'moelab train CONFIG "data.source={source}" data.tokenizer={output / TOKENS}'
        console.print(f"train on it: {how}", highlight=False, soft_wrap=True, markup=False)
    if tokenised:
        console.print(
            f"tokens: {output / TOKENS}, {written.train:,} to train on, {written.validation:,} held out",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    console.print(f"account: {output / 'account.html'}", highlight=False, soft_wrap=True)
    return account


def _select(config: CurateConfig, pieces: Pieces, dropped: np.ndarray, account: Account) -> Cover | None:
    """None where all that is left is taken."""
    if config.select.documents is None:
        return None
    by = config.select.names([str(tag["name"]) for tag in config.tags])
    return pieces.select(dropped, config.select.documents, by, account)


def _work(loaded: Loaded[CurateConfig], registry: Registry, folder: Path) -> Work:
    config = loaded.config
    found = tuple(
        replace(stage, part=registry.resolve(TEXT_FILTERS, stage.part, f"stages.{number}"))
        for number, stage in enumerate(stages(config))
    )
    tags = tuple(registry.resolve(TAGGERS, tag, f"tags.{number}") for number, tag in enumerate(config.tags))
    decides = {key: value for key, value in asdict(config).items() if key not in UNCOUNTED}
    decides |= {"stages": [asdict(stage) for stage in found], "tags": list(tags)}
    near = config.deduplicate.near is not None or config.tokens.tokenizer is not None
    decides |= {"signatures": near, "format": FORMAT}
    settings = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return Work(
        stages=found,
        plugins=tuple(config.plugins),
        entry_points=config.entry_points,
        places=loaded.places("plugins"),
        data_places=loaded.places("stages"),
        settings=settings,
        folder=folder / PIECES,
        write_text=not config.report_only,
        keep_rejected=config.keep_rejected and not config.report_only,
        near=near,
        tags=tags,
    )


def _read_all(
    loaded: Loaded[CurateConfig], registry: Registry, work: Work, pool: Executor | None, reading: Reading,
    causes: Causes,
) -> tuple[int, dict[str, str]]:  # fmt: skip
    """Every source to its end -> pieces that there are, and {dataset on the hub: commit} read."""
    config = loaded.config
    waiting: set[Future[None]] = set()
    count, taken, commits = 0, list[bool](), dict[str, str]()

    def take(documents: Iterable[Document]) -> Corpus:
        nonlocal count, waiting
        for piece in _pieces(documents, config.piece_mb * 1e6):
            digest = digest_of(piece)
            if not is_done(work, count, digest):
                if pool is None:
                    make_piece(work, _BUILT[0], count, piece, digest)
                else:
                    waiting.add(pool.submit(_in_process, count, piece, digest))
            reading.add(piece)
            count += 1
            while len(waiting) >= 2 * config.workers:
                waiting = _finish(waiting, FIRST_COMPLETED)
        taken.append(True)
        return Corpus(EMPTY, EMPTY, [], "taken")

    for number, source in enumerate(config.sources):
        places = loaded.places("sources")
        context = DataContext(ByteTokenizer(), seed=config.seed, places=places, account=causes, tap=take)
        registry.build(DATA_SOURCES, source, context, f"sources.{number}")
        commits |= context.account.commits
        if len(taken) == number:
            raise ConfigError(
                f"sources.{number}: '{source['name']}' makes its corpus itself, without `moelab.build_corpus`; "
                "`moelab data` can't see its documents"
            )
    while waiting:
        waiting = _finish(waiting, FIRST_COMPLETED)
    return count, commits


def _pieces(documents: Iterable[Document], size: float) -> Iterator[list[Document]]:
    piece: list[Document] = []
    held = 0
    for document in documents:
        piece.append(document)
        held += len(document.text)
        if held >= size:
            yield piece
            piece, held = [], 0
    if piece:
        yield piece


def _finish(waiting: set[Future[None]], when: str) -> set[Future[None]]:
    done, left = wait(waiting, return_when=when)
    for future in done:
        future.result()
    return left


@contextmanager
def _workers(count: int, work: Work) -> Iterator[Executor | None]:
    """Processes that have built the stages; None for one, where this one does it."""
    if count == 1:
        _begin(work)
        yield None
        return
    with ProcessPoolExecutor(count, get_context("spawn"), _begin_one_of_several, (work, os.getpid())) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(work: Work) -> None:
    _BUILT[:], _WORK[:] = [build_parts(work)], [work]


def _begin_one_of_several(work: Work, parent: int) -> None:
    die_with(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _begin(work)


def _in_process(number: int, piece: Sequence[Document], digest: str) -> None:
    make_piece(_WORK[0], _BUILT[0], number, piece, digest)
