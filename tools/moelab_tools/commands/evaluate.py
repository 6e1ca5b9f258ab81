"""`moelab evaluate`: held-out loss of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moelab_tools.positions import Positions, position_options
from moelab_tools.user_path import CHECKPOINT
from moelab_tools.verify_option import NO_VERIFY

if TYPE_CHECKING:
    from moelab.config.run import RunConfig
    from moelab.data.batches import ValidationBatches
    from moelab.data.corpus import Corpus
    from moelab.data.tokenizer import Tokenizer
    from moelab.nn.transformer import Transformer
    from moelab.registry import Registry
    from moelab.training.evaluation import Evaluation
    from moelab.training.precision import Precision
    from moelab_tools.judging import Score
    from moelab_tools.lengths.asked import Way

SCORES = "lm_eval.json"  # of a run folder: what `--tasks` found last


@click.command("evaluate")
@click.argument("checkpoint", type=CHECKPOINT)
@click.argument("config", nargs=-1, metavar="[CONFIG...] [KEY=VALUE...]")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@click.option(
    "--trust-plugins",
    "trust",
    is_flag=True,
    help="Import the plugin modules that the checkpoint names; they run as you.",
)
@click.option(
    "--tasks", help="Tasks of lm-evaluation-harness in place of the loss, with commas between: docs/judges.md."
)
@click.option("--limit", type=click.IntRange(1), help="With --tasks: examples of each task.")
@click.option("--length", "lengths", help="Several: 1x,2x,4x of the trained length, or tokens: 512,4096.")
@click.option(
    "--ways", help="With --length: several, a YAML file {NAME: {attention, rope_scaling}}, or all: the known ones."
)
@click.option("--tokens", type=click.IntRange(1), help="With --length: held-out tokens read at each, about.")
@click.option("--passkey", type=click.IntRange(1), help="With --length: keys hidden at each depth, to be given back.")
@position_options
@NO_VERIFY
def command(
    checkpoint: Path,
    config: tuple[str, ...],
    as_json: bool,
    trust: bool,
    verify: bool,
    tasks: str | None,
    limit: int | None,
    lengths: str | None,
    ways: str | None,
    tokens: int | None,
    passkey: int | None,
    attention: str | None,
    rope_scaling: str | None,
) -> None:
    """Loss, perplexity and bits per byte on held-out text: of all of it, by domain, and by place in the sequence.

    Each with a 95 % interval over documents: how it would move with other text of these kinds. What another training
    seed would do, and which of two runs is better, is for `moelab compare`.

    CHECKPOINT is a run folder, a moelab checkpoint or a Hugging Face folder; model and tokenizer are its own. The data
    are those it was trained on, or those of CONFIG and the overrides (data.*, train.sequence_length, evaluation.*). A
    CONFIG that says another model or tokenizer is refused, unless its train.init_overrides names the key.

    --length evaluates at several lengths in turn, as many tokens each: the loss by place, whether experts get other
    loads beyond the trained length, how widely attention looks, and with --passkey whether a hidden number is found.
    --attention and --rope-scaling reach farther without training; what they leave out is filled in and told. --ways
    compares several. Of a checkpoint in a run folder all is kept in the run's lengths/, for TensorBoard and reports.

    \b
    Example:
      moelab evaluate runs/tiny_moe
      moelab evaluate runs/tiny_moe --tasks heldout_continuation
      moelab evaluate runs/tiny_moe --length 1x,2x,4x --rope-scaling yarn \\
          --attention dual_chunk
      moelab evaluate runs/tiny_moe --length 1x,8x --ways all
      moelab evaluate exported/tiny_moe configs/train/tiny_moe.yaml \\
          evaluation.sequences=128
    """
    positions = Positions(attention, rope_scaling)
    chosen = _ways(positions, ways, lengths, {"--passkey": passkey, "--tokens": tokens, "--tasks": tasks})
    opened = _open(checkpoint, config, trust=trust, verify=verify)
    if lengths is not None:
        _tell_lengths(opened, chosen, lengths, (tokens, passkey), as_json=as_json)
        return
    length = opened.run.train.sequence_length
    for line in positions.apply(opened.model, opened.registry, length, length):
        click.echo(line, err=True)
    if tasks is not None:
        from moelab_tools.judging import Asked, judge

        asked = Asked(tuple(tasks.split(",")), opened.batches.batch_size, length, limit)
        scores = judge(opened.model, opened.tokenizer, opened.corpus, asked)
        tell_scores(scores, checkpoint, as_json=as_json)
        return
    from moelab.training.evaluate import evaluate

    evaluation = evaluate(opened.model, opened.batches, opened.precision)
    domains = [opened.corpus.domains[i] for i in opened.batches.stream.document_domain]
    _tell(evaluation, domains, as_json=as_json)


def _ways(positions: Positions, ways: str | None, lengths: str | None, others: Mapping[str, object]) -> list[Way]:
    """What is looked at with --length; refuses options that don't go together."""
    from moelab_tools.lengths.asked import read_ways, way_of

    if lengths is not None and others["--tasks"] is not None:
        raise click.UsageError("--length and --tasks: one at a time")
    for option in ("--passkey", "--tokens"):
        if others[option] is not None and lengths is None:
            raise click.UsageError(f"{option}: goes with --length, and there is none")
    if ways is None:
        return [way_of(positions)]
    if lengths is None or positions != Positions():
        raise click.UsageError("--ways: goes with --length, and in place of --attention and --rope-scaling")
    return read_ways(ways)


@dataclass(frozen=True)
class _Opened:
    """A checkpoint, and the held-out text that it is evaluated on."""

    folder: Path
    model: Transformer
    run: RunConfig
    registry: Registry
    tokenizer: Tokenizer
    corpus: Corpus
    batches: ValidationBatches
    precision: Precision


def _open(checkpoint: Path, config: tuple[str, ...], *, trust: bool, verify: bool) -> _Opened:
    """Tells of held-out text that the weights have seen."""
    from moelab.data.seen import history_of, seen_text
    from moelab.integrity import verified
    from moelab.loading import read_model
    from moelab.origin import check_vocabulary
    from moelab.training.precision import choose_precision, set_threads
    from moelab.training.setup import build_corpus_of, resolve_run
    from moelab.training.stages import held_out
    from moelab_tools.checkpoints import evaluation_config, tokenizer_of

    folder = verified(checkpoint, verify=verify)
    run, registry = evaluation_config(folder, config, trust=trust)
    set_threads(run.train)
    precision = choose_precision(run.train)
    resolve_run(run, registry)
    tokenizer = tokenizer_of(folder, run.data.tokenizer)
    check_vocabulary(run.model.vocab_size, tokenizer, run.data.tokenizer)
    corpus = build_corpus_of(run, registry, tokenizer)
    batches = held_out(run, corpus)
    history = history_of([folder], [str(checkpoint)])
    for line in seen_text(history, str(checkpoint), corpus, tokenizer, batches.documents_scored()).lines():
        click.echo(f"warning: {line}", err=True)
    model = read_model(folder, device=precision.device, registry=registry)
    return _Opened(folder, model, run, registry, tokenizer, corpus, batches, precision)


def _tell_lengths(
    opened: _Opened, ways: Sequence[Way], lengths: str, how: tuple[int | None, int | None], *, as_json: bool
) -> None:
    """`how`: tokens at each length, and keys at each depth."""
    from moelab_tools.lengths import board, kept, lines, measure

    tokens, passkey = how
    keys = None if passkey is None else (opened.tokenizer, passkey)
    looked = measure.Looked(opened.model, opened.run, opened.registry, opened.corpus, opened.precision, tokens, keys)
    found, ways = {}, measure.rehearse(looked, ways, lengths)
    for way in ways:
        found[way.name] = measure.at_lengths(looked, way, lengths)
        if len(ways) > 1:
            click.echo(f"{way.name}: looked at", err=True)
    for line in lines.filled_lines(found):
        click.echo(line, err=True)
    told = {name: [asdict(one) for one in ones] for name, ones in found.items()}
    shown = next(iter(told.values())) if len(told) == 1 else told
    click.echo(json.dumps(shown, indent=2) if as_json else "\n".join(lines.length_lines(found)))
    place = kept.place_of(opened.folder)
    if place is not None:
        board.write_board(place, kept.keep(place, looked, found))
        click.echo(f"kept in {place}", err=True)


def _tell(evaluation: Evaluation, domains: Sequence[str], *, as_json: bool) -> None:
    """domains: of each document."""
    from moelab_tools.levels import WHOLE, levels, lines, measure_of

    metrics, unit, found = evaluation.metrics(), measure_of(evaluation), levels(evaluation, domains)
    if as_json:
        parts = {kind: {name: asdict(one) for name, one in part.items()} for kind, part in found.items()}
        whole = parts.pop(WHOLE)[WHOLE]
        told = {"unit": unit.name, "all": whole, **{f"by_{kind}": part for kind, part in parts.items()}}
        click.echo(json.dumps(metrics | told, indent=2, allow_nan=False))
        return
    for tag, value in metrics.items():
        click.echo(f"{tag:<32} {value:.4f}")
    for line in ["", *lines(found, unit)]:
        click.echo(line)


def tell_scores(scores: Sequence[Score], checkpoint: Path, *, as_json: bool) -> None:
    """Print them, and keep them in a run folder; another folder's checksums say what lies in it."""
    from moelab.atomic import write_file
    from moelab.checkpoint import CHECKPOINTS

    text = json.dumps([asdict(score) for score in scores], indent=2)
    click.echo(text if as_json else "\n".join(score.line() for score in scores))
    if (checkpoint / CHECKPOINTS).is_dir():
        write_file(checkpoint / SCORES, text + "\n")
        click.echo(f"kept in {checkpoint / SCORES}", err=True)
