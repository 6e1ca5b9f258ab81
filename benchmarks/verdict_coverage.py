"""How often the verdicts of `moelab compare` are false, and how often its intervals hold the truth, by simulation.

    python benchmarks/verdict_coverage.py [--replicates 4000] [--judged 1000] [--output benchmarks/results]

The loss of variant v, seed s, document d is mean_v + block_s + init_vs + order_vs + text_vd + rest_vsd: `block`
cancels in pairs, `text` has heavy tails (Student's t with 4 degrees of freedom), documents differ in size by a factor
of ten. The standard deviations, in % of the loss, are those measured on runs of 0.3 M parameters (`SETTINGS`); a
false verdict is any of better, worse, best, likely better, likely worse where there is no difference. No run is
trained: a few minutes on one core.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from moelab_tools.compare import verdict
from moelab_tools.compare.contrast import LEVEL, Contrast, Floats, over_groups, over_pairs
from moelab_tools.compare.families import all_pairs_level, baseline_level, dunnett, moderated
from moelab_tools.compare.pairing import Losses
from moelab_tools.compare.power import detectable, power, seeds_needed
from moelab_tools.compare.verdict import Rules, judge
from report import machine, markdown_table, write_results

DOCUMENTS = 51
SEEDS = (2, 3, 4, 5, 6, 8)
FALSE = {"better", "worse", "likely better", "likely worse"}


@dataclass(frozen=True)
class Setting:
    """Standard deviations in % of the loss."""

    block: float = 0.65  # shared by all variants of a seed
    init: float = 0.35  # another seed, of one variant
    text: float = 0.35  # between documents, in a variant's advantage
    rest: float = 0.9  # seed by document
    order: float = 0.0  # another order of the data, one for each seed
    ratio: float = 1.0  # init of the first variant over that of all others


SETTINGS = {
    "from scratch": Setting(),
    "from scratch, order varied with the seed": Setting(order=0.3),
    "from scratch, one variant 2.5 x noisier": Setting(ratio=2.5),
    "from one checkpoint": Setting(block=0.0, init=0.02, text=0.25, rest=0.17),
}


def draw(
    rng: np.random.Generator, replicates: int, variants: int, seeds: int, setting: Setting
) -> tuple[Floats, Floats]:
    """-> (nats [variants + 1, replicates, seeds, documents], size [documents]): around 100, the baseline first."""
    shape = (variants + 1, replicates, seeds, DOCUMENTS)
    spread = setting.init * np.array([1.0, setting.ratio, *[1.0] * (variants - 1)])[: variants + 1, None, None, None]
    loss = 100 + setting.block * rng.standard_normal((1, replicates, seeds, 1))
    loss = loss + spread * rng.standard_normal((*shape[:3], 1)) + setting.order * rng.standard_normal((*shape[:3], 1))
    loss = loss + setting.text * rng.standard_t(4, (*shape[:2], 1, DOCUMENTS)) / math.sqrt(2)
    loss = loss + setting.rest * rng.standard_normal(shape)
    size = np.round(np.geomspace(100, 1000, DOCUMENTS))
    return loss * size, size


def true_contrast(setting: Setting, seeds: int, size: Floats) -> Contrast:
    """The errors as they are, not as a sample estimates them."""
    share = float((size**2).sum() / size.sum() ** 2)
    pair = (1 + setting.ratio**2) * setting.init**2 + 2 * setting.order**2 + 2 * setting.rest**2 * share
    text = 2 * setting.text**2 * share
    return Contrast(0.0, math.sqrt(pair / seeds), seeds - 1.0, math.sqrt(text), DOCUMENTS - 1.0)


def coverage(replicates: int) -> list[dict[str, Any]]:
    """Of the true difference, 0, by a 95 % interval that stands alone: pairs, and groups that share no seed."""
    rng, rows = np.random.default_rng(1), []
    for name, setting in SETTINGS.items():
        for seeds in (1, *SEEDS):
            nats, size = draw(rng, replicates, 1, 2 * seeds, setting)
            found = {"pairs": over_pairs(nats[1, :, :seeds] - nats[0, :, :seeds], size)}
            if seeds > 1:
                found["no seed shared"] = over_groups(nats[1, :, seeds:], nats[0, :, :seeds], size)
            for kind, one in found.items():
                half, held = one.half(), np.abs(one.difference) <= one.half()
                rows.append({"setting": name, "seeds": seeds, "kind": kind, "coverage": held.mean(),
                             "seeds alone": np.mean(np.abs(one.difference) <= one.seed_half()),
                             "half width": np.median(half)})  # fmt: skip
    return rows


def families(replicates: int, variants: int) -> list[dict[str, Any]]:
    """The share of families of equal variants in which any interval leaves 0 out, and in which any word is false."""
    rng, rows = np.random.default_rng(2), []
    for name, setting in SETTINGS.items():
        for seeds in SEEDS[1:]:
            nats, size = draw(rng, replicates, variants, seeds, setting)
            freedom = seeds - 1.0
            lowest = nats.sum((2, 3)).argmin(0)
            each = np.arange(replicates)
            picked = nats.copy()
            picked[0], picked[lowest, each] = nats[lowest, each], nats[0]
            row: dict[str, Any] = {"setting": name, "seeds": seeds}
            for way, data in (("named", nats), ("lowest", picked)):
                known = [over_pairs(one - data[0], size) for one in data[1:]]
                named = way == "named"
                level = baseline_level(variants, freedom) if named else all_pairs_level(variants + 1, freedom)
                row[f"{way}, each alone"] = _any_outside(known, LEVEL)
                row[f"{way}, interval"] = _any_outside(known, level)
                if named:  # a first false word needs the least p below LEVEL / k
                    row["named, Holm"] = _any_outside(known, LEVEL / variants)
                textbook = dunnett(variants, freedom, pooled=True)
                if not named:
                    textbook = stats.studentized_range.isf(LEVEL, variants + 1, freedom) / math.sqrt(2)
                row[f"{way}, textbook constant"] = _any_outside(known, 2 * stats.t.sf(textbook, freedom))
                screened, screen_freedom = moderated((data[1:] - data[:1]).sum(-1) / size.sum(), known)
                of = baseline_level if named else all_pairs_level
                count = variants if named else variants + 1
                level = min(of(count, one, pooled=True) for one in (screen_freedom, DOCUMENTS - 1.0))
                row[f"{way}, screening"] = _any_outside(screened, level)
            rows.append(row)
    return rows


def _any_outside(contrasts: Iterable[Contrast], level: float) -> float:
    return float(np.mean(np.any([np.abs(one.difference) > one.half(level) for one in contrasts], axis=0)))


def planted(replicates: int, difference: float, judged_replicates: int) -> list[dict[str, Any]]:
    """How often a true difference is found, against what `power` says when it is told the true errors.

    `found` by the interval, in `replicates`; `called better` and `called worse` by `judge`, in `judged_replicates`.
    """
    rng, rows = np.random.default_rng(3), []
    for name, setting in SETTINGS.items():
        for seeds in SEEDS[1:]:
            nats, size = draw(rng, replicates, 1, seeds, setting)
            truth = true_contrast(setting, seeds, size)
            one = over_pairs(nats[1] - nats[0], size)
            row: dict[str, Any] = {"setting": name, "seeds": seeds, "detectable": detectable(truth)}
            for label, planted_difference in (("given", difference), ("detectable", row["detectable"])):
                row[f"found, {label}"] = np.mean(one.difference + planted_difference > one.half())
                row[f"stated, {label}"] = power(planted_difference, truth)
            row["seeds needed"] = seeds_needed(difference, truth, seeds)
            each = min(replicates, judged_replicates)
            called = Counter(_word(nats[0, r], nats[1, r] - difference * size, size) for r in range(each))
            row |= {f"called {word}": called[word] / each for word in ("better", "worse")}
            rows.append(row)
    return rows


def _word(baseline: Floats, variant: Floats, size: Floats) -> str:
    """What `judge` says of a variant against a named baseline, [seeds, documents] each."""
    keys = tuple(range(len(baseline)))
    losses = {"baseline": Losses(keys, baseline, size), "variant": Losses(keys, variant, size)}
    return judge(losses, "baseline", Rules(True))["variant"].verdict


SHAPES = {  # seeds of each variant; the first is the baseline
    "1 : 1, same seed": ((0,), (0,)),
    "1 : 1, other seed": ((0,), (1,)),
    "1 : 3": ((0, 1, 2), (0,)),
    "1 : 8, other seed": (tuple(range(8)), (9,)),
    "2 : 2": ((0, 1), (0, 1)),
    "3 : 3": ((0, 1, 2), (0, 1, 2)),
    "3 : 3, no seed shared": ((0, 1, 2), (3, 4, 5)),
    "3 : 5, two seeds shared": ((0, 1, 2), (1, 2, 3, 4, 5)),
    "4 : 4": (tuple(range(4)), tuple(range(4))),
    "5 : 5": (tuple(range(5)), tuple(range(5))),
    "6 : 6": (tuple(range(6)), tuple(range(6))),
    "8 : 8": (tuple(range(8)), tuple(range(8))),
    "4 variants of 3": ((0, 1, 2),) * 4,
    "4 variants of 5": (tuple(range(5)),) * 4,
}


def judged(replicates: int) -> list[dict[str, Any]]:
    """Through `judge` itself: the share of comparisons of equal variants in which any word is false."""
    rng, rows = np.random.default_rng(4), []
    for name, setting in SETTINGS.items():
        for shape, seeds in SHAPES.items():
            nats, size = draw(rng, replicates, len(seeds) - 1, 10, setting)
            row: dict[str, Any] = {"setting": name, "shape": shape}
            for way in ("named", "lowest"):
                row[way] = np.mean([_judged_false(nats[:, r], size, seeds, way == "named") for r in range(replicates)])
            rows.append(row)
    return rows


def _judged_false(nats: Floats, size: Floats, seeds: tuple[tuple[int, ...], ...], named: bool) -> bool:
    variants = {str(v): Losses(keys, nats[v, list(keys)], size) for v, keys in enumerate(seeds)}
    baseline = "0" if named else min(variants, key=lambda one: variants[one].score)
    return any(one.verdict in FALSE for one in judge(variants, baseline, Rules(named, practical=0.0)).values())


def tables(results: dict[str, Any], replicates: int, judged_replicates: int, variants: int) -> list[str]:
    """As Markdown; % throughout."""

    def share(value: float) -> str:
        return f"{100 * value:.1f}"

    told = [f"\n## Coverage of a single 95 % interval, {replicates} comparisons of {DOCUMENTS} documents\n",
            "In brackets: the seeds alone, as before; median half width in % of the loss.\n"]  # fmt: skip
    head = ["setting", "kind", *(f"{n} seed{'s' * (n > 1)}" for n in (1, *SEEDS))]
    body = []
    for setting in SETTINGS:
        for kind in ("pairs", "no seed shared"):
            found = {r["seeds"]: r for r in results["coverage"] if (r["setting"], r["kind"]) == (setting, kind)}
            cells = [
                f"{share(r['coverage'])} ({share(r['seeds alone'])}) ± {r['half width']:.2f}" if n > 1
                else f"{share(r['coverage'])} ± {r['half width']:.2f} (text only: no verdict)"
                for n in (1, *SEEDS) if (r := found.get(n))
            ]  # fmt: skip
            body.append([setting, kind, *([""] * (len(SEEDS) + 1 - len(cells))), *cells])
    told.append(markdown_table(head, body))
    told.append(f"\n## Families of {variants} variants that all equal the baseline: at least one false, in %\n")
    keys = [key for key in results["families"][0] if key not in ("setting", "seeds")]
    told.append(markdown_table(
        ["setting", "seeds", *keys],
        [[r["setting"], str(r["seeds"]), *(share(r[key]) for key in keys)] for r in results["families"]],
    ))  # fmt: skip
    told.append("\n## A planted difference: found and stated, in %\n")
    told.append(markdown_table(
        ["setting", "seeds", "1 % found", "1 % stated", "1 % called better", "called worse", "detectable (80 %)",
         "it found", "seeds that 1 % needs"],
        [[r["setting"], str(r["seeds"]), share(r["found, given"]), share(r["stated, given"]),
          share(r["called better"]), share(r["called worse"]),
          f"{r['detectable']:.2f} %", share(r["found, detectable"]), str(r["seeds needed"])]
         for r in results["planted"]],
    ))  # fmt: skip
    told.append(f"\n## Words: comparisons of equal variants with any false word, in %, {judged_replicates} each\n")
    told.append(markdown_table(
        ["setting", "runs", "baseline named", "lowest as baseline"],
        [[r["setting"], r["shape"], share(r["named"]), share(r["lowest"])] for r in results["judged"]],
    ))  # fmt: skip
    return [one + "\n" for one in told]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=4000)
    parser.add_argument("--judged", type=int, default=1000)
    parser.add_argument("--variants", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    verdict.detectable = lambda contrast, level: 0.0  # no word hangs on what could have been seen, and it takes longest
    results = {
        "coverage": coverage(args.replicates),
        "families": families(args.replicates, args.variants),
        "planted": planted(args.replicates, 1.0, args.judged),
        "judged": judged(args.judged),
    }
    results = {key: [{k: _plain(v) for k, v in row.items()} for row in rows] for key, rows in results.items()}
    written = tables(results, args.replicates, args.judged, args.variants)
    print("\n".join(written))
    write_results(args.output, "verdict_coverage", machine(), results, written)


def _plain(value: Any) -> Any:
    return round(float(value), 5) if isinstance(value, (float, np.floating)) else value


if __name__ == "__main__":
    main()
