"""Looking at seeds before all are in: how often a word is false, what is found, and how many runs that saves.

    python benchmarks/sequential.py [--replicates 4000] [--output benchmarks/results]

The noise is that of `verdict_coverage.py`; every look takes the very intervals and Holm steps of
`moelab_tools.compare`, and gives up as an experiment does. "Normal bounds": the published ones, as levels of t
intervals, for comparison. A few minutes on one core; no run is trained.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moelab_tools.compare.contrast import LEVEL, Floats, over_pairs, t_limit
from moelab_tools.compare.sequential import HOPELESS, SPENDING, Plan, levels, prospect
from report import machine, markdown_table, write_results
from verdict_coverage import SETTINGS, Setting, draw

LOOKS = ((8,), (3, 5, 8), (3, 6, 10))
PRACTICAL = 0.1  # of a loss of 100: 0.1 %
PLANTED = (0.0, 0.5, 1.0, 2.0)
MANY = 20_000  # pairs for which the levels are those of a normal statistic


def pure_t(replicates: int) -> list[dict[str, Any]]:
    """Seeds alone: false words of a t over the pairs of each look, by exact levels and by those of a normal."""
    rng, rows = np.random.default_rng(1), []
    for looks in LOOKS[1:]:
        values = rng.standard_normal((replicates, looks[-1]))
        t = np.stack([math.sqrt(n) * values[:, :n].mean(1) / values[:, :n].std(1, ddof=1) for n in looks])
        for spending in SPENDING:
            row: dict[str, Any] = {"looks": looks, "spending": spending}
            for way, found in (("exact", levels(looks, LEVEL, spending)), ("normal", _normal(looks, spending))):
                beyond = [np.abs(one) > t_limit(level, n - 1) for one, level, n in zip(t, found, looks, strict=True)]
                row[way] = np.any(beyond, axis=0).mean()
            rows.append(row)
    return rows


def _normal(looks: tuple[int, ...], spending: str) -> tuple[float, ...]:
    scale = MANY // looks[0]
    return levels(tuple(n * scale for n in looks), LEVEL, spending)


def experiments(replicates: int, variants: int) -> list[dict[str, Any]]:
    """Whole experiments of some variants against one baseline, all of the same planted difference."""
    rows = []
    for name in ("from scratch", "from scratch, one variant 2.5 x noisier", "from one checkpoint"):
        for looks in LOOKS:
            for planted in PLANTED if name != "from one checkpoint" else (0.0, 0.05, 0.1, 0.2):
                for give_up in (False, True) if len(looks) > 1 else (False,):
                    row = _experiment(SETTINGS[name], looks, planted, give_up, (replicates, variants))
                    rows.append({"setting": name, "variants": variants, **row})
    return rows


def _experiment(
    setting: Setting, looks: tuple[int, ...], planted: float, give_up: bool, size: tuple[int, int]
) -> dict[str, Any]:
    replicates, variants = size
    nats, documents = draw(np.random.default_rng(5), replicates, variants, looks[-1], setting)
    words = np.zeros((variants, replicates), bool)  # better or worse, at any look taken
    right, settled = words.copy(), words.copy()
    seeds, running = np.zeros(replicates), np.ones(replicates, bool)
    for at, pairs in enumerate(looks):
        plan = Plan(looks, at)
        seeds[running] = pairs
        contrasts = [over_pairs(one[:, :pairs] - nats[0, :, :pairs], documents) for one in nats[1:]]
        for one in contrasts:
            one.difference[...] += planted
        resolved = _holm(np.stack([one.p_value() for one in contrasts]), plan) & running
        differences = np.stack([one.difference for one in contrasts])
        words |= resolved & (np.abs(differences) > PRACTICAL)
        right |= resolved & (differences > PRACTICAL)
        half = np.stack([one.half(plan.level(LEVEL / variants)) for one in contrasts])
        settled |= resolved | ((np.abs(differences) + half <= PRACTICAL) & running)
        hopeless = np.zeros_like(settled)
        if give_up and not plan.last:
            level = plan.final_level(LEVEL / variants)
            hopeless = np.stack([prospect(one, pairs, looks[-1], level, PRACTICAL) < HOPELESS for one in contrasts])
        running = running & ~np.all(settled | hopeless, axis=0)
    return {
        "looks": looks, "planted": planted, "gives up": give_up, "any word": words.any(0).mean(),
        "found": right.mean(), "settled": settled.mean(), "mean seeds": seeds.mean(),
    }  # fmt: skip


def _holm(p: Floats, plan: Plan) -> Any:
    """p [V, R] -> whether each is resolved at this look."""
    order = np.argsort(p, axis=0)
    steps = np.array([plan.level(LEVEL / (len(p) - rank)) for rank in range(len(p))])
    passed = np.logical_and.accumulate(np.take_along_axis(p, order, 0) <= steps[:, None], axis=0)
    resolved = np.zeros_like(passed)
    np.put_along_axis(resolved, order, passed, 0)
    return resolved


def tables(results: dict[str, Any], replicates: int) -> list[str]:
    """As Markdown; % throughout."""

    def share(value: float) -> str:
        return f"{100 * value:.1f}"

    def looks(value: Sequence[int]) -> str:
        return ", ".join(map(str, value))

    told = ["\n## Seeds alone: false words, in %\n"]
    told.append(markdown_table(
        ["looks at", "spending", "exact levels", "levels of a normal statistic"],
        [[looks(r["looks"]), r["spending"], f"{100 * r['exact']:.2f}", f"{100 * r['normal']:.2f}"]
         for r in results["pure t"]],
    ))  # fmt: skip
    bounds = [f"{looks(plan)}: {', '.join(f'{100 * one:.3f}' for one in levels(plan, LEVEL))}" for plan in LOOKS[1:]]
    told.append(f"\nLevels of the looks, in % (O'Brien-Fleming's spending): {'; '.join(bounds)}.\n")
    for variants, rows in results["experiments"].items():
        told.append(f"\n## Experiments of {variants} variants and a baseline, {replicates} each\n")
        told.append(
            "Any word: better or worse about any variant; with nothing planted it is false. Found: the right word, of "
            f"each variant. Settled: that, or negligible (below {PRACTICAL} %).\n"
        )
        told.append(markdown_table(
            ["setting", "looks at", "planted, %", "gives up", "any word", "found", "settled", "mean seeds"],
            [[r["setting"], looks(r["looks"]), f"{r['planted']:g}", "yes" if r["gives up"] else "no",
              share(r["any word"]), share(r["found"]) if r["planted"] else "", share(r["settled"]),
              f"{r['mean seeds']:.1f}"] for r in rows],
        ))  # fmt: skip
    return [one + "\n" for one in told]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "pure t": pure_t(100 * args.replicates),
        "experiments": {str(count): experiments(args.replicates, count) for count in (1, 3)},
    }
    written = tables(results, args.replicates)
    print("\n".join(written))
    write_results(args.output, "sequential", machine(), _plain(results), written)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return round(float(value), 5) if isinstance(value, (float, np.floating)) else value


if __name__ == "__main__":
    main()
