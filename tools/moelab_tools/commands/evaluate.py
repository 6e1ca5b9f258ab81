"""`moelab evaluate`: held-out loss of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moelab_tools.user_path import USER_PATH


@click.command("evaluate")
@click.argument("checkpoint", type=USER_PATH)
@click.argument("config", nargs=-1, metavar="[CONFIG...] [KEY=VALUE...]")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@click.option(
    "--trust-plugins",
    "trust",
    is_flag=True,
    help="Import the plugin modules that the checkpoint names; they run as you.",
)
def command(checkpoint: Path, config: tuple[str, ...], as_json: bool, trust: bool) -> None:
    """Loss, perplexity and bits per byte on held-out text.

    CHECKPOINT is a run folder, a moelab checkpoint or a Hugging Face folder; model and tokenizer are its own. The data
    are those it was trained on, or those of CONFIG and the overrides (data.*, train.sequence_length, evaluation.*). A
    CONFIG that says another model or tokenizer is refused, unless its train.init_overrides names the key.

    \b
    Example:
      moelab evaluate runs/tiny_moe
      moelab evaluate exported/tiny_moe configs/train/tiny_moe.yaml evaluation.sequences=128
    """
    import moelab
    from moelab.checkpoint import resolve_checkpoint
    from moelab.data.batches import ValidationBatches
    from moelab.data.seen import history_of, seen_text
    from moelab.origin import check_vocabulary
    from moelab.train.evaluate import evaluate
    from moelab.train.precision import choose_precision, set_threads
    from moelab.train.setup import build_corpus_of, resolve_run
    from moelab_tools.checkpoints import evaluation_config, tokenizer_of

    run, registry = evaluation_config(checkpoint, config, trust=trust)
    set_threads(run.train)
    precision = choose_precision(run.train)
    resolve_run(run, registry)
    tokenizer = tokenizer_of(checkpoint, run.data.tokenizer)
    check_vocabulary(run.model.vocab_size, tokenizer, run.data.tokenizer)
    corpus = build_corpus_of(run, registry, tokenizer)
    batches = ValidationBatches(
        corpus.validation,
        run.evaluation.sequences,
        run.train.sequence_length,
        run.evaluation.batch_size or run.train.batch_size,
    )
    history = history_of([resolve_checkpoint(checkpoint)], [str(checkpoint)])
    for line in seen_text(history, str(checkpoint), corpus, tokenizer, batches.documents_scored()).lines():
        click.echo(f"warning: {line}", err=True)
    model = moelab.load(checkpoint, device=precision.device, registry=registry)
    metrics = evaluate(model, batches, precision).metrics()
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
    else:
        for tag, value in metrics.items():
            click.echo(f"{tag:<32} {value:.4f}")
