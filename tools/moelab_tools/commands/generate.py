"""`moelab generate`: continue prompts with one checkpoint, or with several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moelab.errors import ConfigError
from moelab_tools.positions import Positions, position_options
from moelab_tools.sampling_options import sampling_options
from moelab_tools.user_path import CHECKPOINT, USER_PATH
from moelab_tools.verify_option import NO_VERIFY

if TYPE_CHECKING:
    from moelab_tools.prompts_file import Prompt
    from moelab_tools.samples import Sample


@click.command("generate")
@click.argument("checkpoint", nargs=-1, required=True, type=CHECKPOINT, metavar="CHECKPOINT...")
@click.option("--prompt", multiple=True, help="Several: one --prompt each.  [default: def ]")
@click.option(
    "--prompts",
    type=USER_PATH,
    metavar="FILE",
    help="Prompts of a file: .jsonl with prompt or messages, or .txt lines.",
)
@click.option("--out", type=USER_PATH, metavar="FILE", help="Write results there, a line of JSON each.")
@click.option("--tokens", type=click.IntRange(1), default=200, show_default=True, help="At most so many new tokens.")
@sampling_options
@click.option("--samples", default=1, show_default=True, help="Continuations of each prompt.")
@click.option("--batch-size", type=int, default=None, help="Texts at once; changes time and memory alone.")
@click.option("--tokenizer", default=None, help='"bytes" or a tokenizer.json; default: the checkpoint\'s own.')
@click.option("--json", "as_json", is_flag=True, help="Print the texts as JSON, to the last character.")
@click.option(
    "--trust-plugins",
    "trust",
    is_flag=True,
    help="Import the plugin modules that the checkpoint names; they run as you.",
)
@position_options
@NO_VERIFY
def command(
    checkpoint: tuple[Path, ...],
    prompt: tuple[str, ...],
    prompts: Path | None,
    out: Path | None,
    tokens: int,
    samples: int,
    batch_size: int | None,
    tokenizer: str | None,
    as_json: bool,
    trust: bool,
    verify: bool,
    attention: str | None,
    rope_scaling: str | None,
    **settings: Any,
) -> None:
    """Continue a prompt; with several checkpoints, the same prompts side by side, drawn with the same random numbers.

    CHECKPOINT is a run folder, a moelab checkpoint or a Hugging Face folder. The text ends at any of the end tokens
    that its generation_config.json names, else its config.json, else at the token that ended documents in training;
    which one ended it is said on stderr. Control characters are spelled out; --json gives the texts as they are.
    How tokens are drawn is as generation_config.json says, where no option says it, else at a temperature of 0.8.
    Texts are made many at a time, which changes none of them: each has random numbers of its own.

    --attention and --rope-scaling reach beyond the trained length; the factor of yarn and linear is that of prompt and
    new tokens, where it is not given.

    \b
    Example:
      moelab generate runs/tiny_moe --prompt "import "
      moelab generate runs/dense runs/moe --prompt "def " --temperature 0
      moelab generate runs/tiny_moe --prompts questions.jsonl --out answers.jsonl
    """
    from moelab.atomic import check_output
    from moelab_tools.prompts_file import Prompt, read_prompts
    from moelab_tools.samples import Request, continue_prompts

    if out is not None:
        check_output(out, "--out", file=True)
    if prompt and prompts is not None:
        raise ConfigError("--prompts: a file of prompts and --prompt at once; give one of them")
    asked = (
        [Prompt(f"--prompt {text}", text) for text in prompt or ("def ",)] if prompts is None else read_prompts(prompts)
    )
    settings["max_new_tokens"] = tokens
    request = Request([one.asked for one in asked], settings, samples, batch_size, tokenizer)
    positions = Positions(attention, rope_scaling)
    each = [continue_prompts(folder, request, positions, trust=trust, verify=verify) for folder in checkpoint]
    # prompt by prompt, and of each the checkpoints in the order given
    found = [(asked[place // samples], sample) for place, row in enumerate(zip(*each, strict=True)) for sample in row]
    if prompts is not None or out is not None:
        _write_lines(found, out)
    else:
        _show([sample for _, sample in found], as_json)


def _write_lines(found: list[tuple[Prompt, Sample]], out: Path | None) -> None:
    """A line of JSON each, with what stood beside the prompt."""
    import json
    from dataclasses import asdict

    from moelab.atomic import write_output

    lines = [
        json.dumps(prompt.beside | ({"messages": prompt.messages} if prompt.messages else {}) | asdict(sample)) + "\n"
        for prompt, sample in found
    ]
    if out is None:
        click.echo("".join(lines), nl=False)
        return
    write_output(out, "".join(lines), "--out")
    click.echo(f"{out}: {len(lines)} texts to {len({prompt.where for prompt, _ in found})} prompts", err=True)


def _show(samples: list[Sample], as_json: bool) -> None:
    """On a terminal, or as JSON; what ended each on stderr."""
    import json
    import shutil
    from dataclasses import asdict

    from moelab.printable import printable
    from moelab_tools.samples import show

    if as_json:
        click.echo(json.dumps([asdict(sample) for sample in samples], indent=2))
    else:
        show(samples, shutil.get_terminal_size().columns)
    for sample in samples:
        whose = printable(f"{sample.checkpoint}, {sample.prompt!r}: ") if len(samples) > 1 else ""
        click.echo(f"{whose}{printable(sample.ended)}", err=True)
