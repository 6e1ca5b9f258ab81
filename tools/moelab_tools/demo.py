"""The whole line on real text, as commands: dense Qwen2 -> upcycle -> train MoE variants -> compare, for each seed.

`demo_steps` says which commands, `run_demo` prints and runs them, one after the other in this process. Their configs
are shipped (configs/experiments/demo), so that an empty folder and an installed wheel are enough.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from moelab.atomic import discard, write_file
from moelab.errors import ConfigError

CONFIGS = "experiments/demo"
CONTINUED = ("dense_continued", "dense_equal_flops")  # from the dense weights
UPCYCLED = ("upcycled", "upcycled_loss_free")  # from the upcycled ones
REPORTS = {"tokens": "dense_continued", "FLOPs": "dense_equal_flops"}  # equal what: the baseline there
MARK = "demo.json"  # a folder that holds it is a demo's, and may be replaced
OURS = ("run_dir", "name", "seed", "resume", "train.init_from")
# Another seed than the dense run's: with its own a run would read the same batches once more.
LATER = 100


@dataclass(frozen=True)
class Step:
    """One command of the demo."""

    title: str
    arguments: tuple[str, ...]  # of `moelab`


def demo_steps(out: Path, seeds: Sequence[int], overrides: Sequence[str] = ()) -> list[Step]:
    """All commands in order; `overrides` go to every training run.

    The runs of a variant differ in seed and name alone, so that compare groups them.
    """
    steps = []
    for seed in seeds:
        dense, upcycled = out / f"dense_seed{seed}_hf", out / f"upcycled_seed{seed}_hf"
        steps += [
            _train("dense", seed, out, [f"seed={seed}", *overrides]),
            Step("Save it as a Hugging Face checkpoint",
                 ("export", str(_run("dense", seed, out)), str(dense), "--dtype", "float32")),
            Step("Upcycle it into the shape of 57B-A14B, scaled down",
                 ("upcycle", f"{CONFIGS}/upcycle", f"source={dense}", f"output={upcycled}", f"seed={seed}")),
        ]  # fmt: skip
        for variants, weights in ((CONTINUED, dense), (UPCYCLED, upcycled)):
            further = [f"seed={seed + LATER}", f"train.init_from={weights}", *overrides]
            steps += [_train(variant, seed, out, further) for variant in variants]
    for budget, baseline in REPORTS.items():
        runs = [str(_run(variant, seed, out)) for variant in (baseline, *UPCYCLED) for seed in seeds]
        named = baseline if len(seeds) > 1 else _run(baseline, seeds[0], out).name  # one seed is no variant of several
        report = str(out / f"report_equal_{budget.lower()}")
        steps.append(Step(f"Compare at equal {budget}", ("compare", *runs, "--baseline", named, "--output", report)))
    return steps


def _run(variant: str, seed: int, out: Path) -> Path:
    return out / f"{variant}_seed{seed}"


def _train(variant: str, seed: int, out: Path, settings: Sequence[str]) -> Step:
    run = _run(variant, seed, out)
    arguments = ("train", f"{CONFIGS}/{variant}", f"name={run.name}", f"run_dir={run}", *settings)
    return Step(f"{variant}, seed {seed}", arguments)


def run_demo(out: Path, seeds: Sequence[int], overrides: Sequence[str]) -> None:
    """Run it into `out`, in place of a demo that is there.

    Raises ConfigError for an override that is the demo's own and for a folder that holds something else.
    """
    from moelab_tools.cli import moelab

    for override in overrides:
        key = override.partition("=")[0].strip()
        if "=" not in override or key in OURS:
            raise ConfigError(f"{override}: takes key=value for every training run, but none of {', '.join(OURS)}")
    _make_room(out, seeds, overrides)
    started = time.monotonic()
    for step in demo_steps(out, seeds, overrides):
        click.secho(f"\n[{time.monotonic() - started:.0f} s] {step.title}", bold=True)
        click.echo(f"$ {shlex.join(('moelab', *step.arguments))}")
        try:
            moelab.main(list(step.arguments), prog_name="moelab", standalone_mode=False)
        except BaseException:  # what the command says of --resume is not of the demo
            click.echo("a demo is not resumed: the same command begins anew", err=True)
            raise
    click.echo(f"\n[{time.monotonic() - started:.0f} s] Watch the curves:\n  tensorboard --logdir {out}")


def _make_room(out: Path, seeds: Sequence[int], overrides: Sequence[str]) -> None:
    """An empty place for the demo: what an earlier one wrote goes, and nothing else."""
    try:
        found = sorted(item.name for item in out.iterdir()) if out.exists() else []
        if found and MARK not in found:
            raise ConfigError(f"{out}: holds something that is no demo ({found[0]}); choose another --out or remove it")
        if found:
            click.echo(f"replacing the demo in {out}")
        made = ("report_equal_", *(f"{variant}_seed" for variant in ("dense", *CONTINUED, *UPCYCLED)))
        for item in (out / name for name in found):
            if item.name.startswith(made) and item.is_dir() and not item.is_symlink():
                discard(item)
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / MARK, json.dumps({"seeds": list(seeds), "overrides": list(overrides)}, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{out}: can't be written: {error.strerror}; choose another --out") from error
