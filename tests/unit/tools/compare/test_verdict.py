"""The word for each variant: which rule decides, and that few seeds never earn one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from moelab_tools.compare.families import baseline_level
from moelab_tools.compare.pairing import Losses, distinct, match
from moelab_tools.compare.verdict import Rules, Verdict, judge

SIZE = np.linspace(20, 200, 40)
NAMED, FOUND = Rules(named=True), Rules(named=False)


def losses(level: float, seeds: tuple[int, ...], noise: float = 0.002, who: int = 0) -> Losses:
    """A loss of `level` whose noise depends on the seed and on `who`."""
    rows = [level + noise * np.random.default_rng([who, seed]).normal() + _text(who, seed) for seed in seeds]
    return Losses(seeds, np.array(rows) * SIZE, SIZE)


def _text(who: int, seed: int) -> np.ndarray:  # type: ignore[type-arg]
    shared, own = np.random.default_rng(7), np.random.default_rng([who, seed, 1])
    return shared.normal(0, 0.3, len(SIZE)) + own.normal(0, 0.002, len(SIZE))


def one(variant: Losses, baseline: Losses, rules: Rules = NAMED) -> Verdict:
    return judge({"variant": variant, "baseline": baseline}, "baseline", rules)["variant"]


def test_three_pairs_and_a_large_difference_earn_a_word() -> None:
    seeds = (0, 1, 2)
    assert one(losses(2.1, seeds, who=1), losses(2.0, seeds)).verdict == "worse"
    found = one(losses(1.9, seeds, who=1), losses(2.0, seeds))
    assert (found.verdict, found.covers, found.pairs) == ("better", "training seeds and held-out text", 3)
    assert found.low is not None and found.high is not None and found.low < -0.1 < found.high < 0


@pytest.mark.parametrize(
    ("mine", "theirs", "word"),
    [
        ((0,), (0,), "one seed"),
        ((0,), (1,), "one seed"),
        ((0,), (0, 1, 2), "one seed"),
        ((0, 1, 2, 3), (2,), "one seed"),
        ((7,), (0, 1, 2), "no common seed"),
        ((0, 1), (0, 1), "two seeds"),
        ((0, 1), (0, 1, 2), "two seeds"),
        ((0, 1), (2, 3), "two seeds"),
        ((0, 1), (2, 3, 4), "two seeds"),
    ],
)
def test_under_three_pairs_there_is_no_word_however_large_the_difference(
    mine: tuple[int, ...], theirs: tuple[int, ...], word: str
) -> None:
    for rules in (NAMED, FOUND):
        found = one(losses(3.0, mine, who=1), losses(2.0, theirs), rules)
        assert (found.verdict, found.p, found.could_have_seen) == (word, None, None)
    assert (found.difference is None) == (word == "no common seed")


def test_groups_without_common_seeds_need_three_of_each() -> None:
    found = one(losses(2.1, (0, 1, 2), who=1), losses(2.0, (3, 4, 5)))
    assert (found.verdict, found.paired) == ("worse", False)
    assert "Welch" in found.method


def test_two_common_seeds_of_larger_groups_are_not_picked_out() -> None:
    assert match(losses(2.1, (0, 1, 2), who=1), losses(2.0, (1, 2, 3))).kind == "groups"


def test_runs_without_a_partner_stay_out_and_are_named() -> None:
    found = one(losses(2.1, (0, 1, 2, 9), who=1), losses(2.0, (0, 1, 2)))
    assert found.pairs == 3
    assert any("seeds 9 have no partner" in told for told in found.remarks)


def test_the_same_result_under_other_seeds_is_one_run() -> None:
    row = losses(2.1, (0,), who=1).nats[0]
    copies = Losses((0, 1, 2), np.stack([row, row, row]), SIZE)
    assert distinct(copies)[1] == [(0, 1, 2)]
    found = one(copies, losses(2.0, (0, 1, 2)))
    assert found.verdict == "one seed"
    assert any("seeds 0, 1, 2 gave the same result" in told for told in found.remarks)


def test_the_same_result_as_the_baseline_is_identical() -> None:
    seeds = (0, 1, 2)
    found = one(losses(2.0, seeds), losses(2.0, seeds))
    assert (found.verdict, found.difference) == ("identical", 0.0)


def test_pairs_that_all_differ_by_the_same_have_no_noise_and_no_word() -> None:
    whole = Losses((0, 1, 2), np.array([[2.0], [3.0], [4.0]]), np.ones(1))
    shifted = Losses((0, 1, 2), np.array([[2.5], [3.5], [4.5]]), np.ones(1))
    assert one(shifted, whole).verdict == "no spread"


def test_an_established_difference_below_what_counts_is_negligible() -> None:
    seeds = tuple(range(6))
    quiet = losses(2.001, seeds, noise=0.00005, who=1), losses(2.0, seeds, noise=0.00005)
    assert one(*quiet).verdict == "negligible"
    assert one(*quiet, Rules(named=True, practical=0.0)).verdict == "worse"


def test_an_interval_within_what_counts_is_negligible_though_it_holds_zero() -> None:
    seeds = tuple(range(6))
    quiet = losses(2.0, seeds, who=1), losses(2.0, seeds)
    assert one(*quiet, Rules(named=True, practical=0.1)).verdict == "negligible"
    assert one(*quiet, Rules(named=True, practical=0.0)).verdict == "not resolved"


def _beside(*p_values: float) -> dict[str, Verdict]:
    """Variants a, b, ... whose paired t over five seeds has these p values, each alone."""
    base, spread, found = np.array([2.0, 2.3, 2.1, 2.2, 2.4]), np.arange(-2, 3) / np.sqrt(2.5), {}
    for name, p in zip("abc", p_values, strict=False):
        found[name] = base + 0.1 + spread * 0.1 * np.sqrt(5) / stats.t.isf(p / 2, 4)
    every = {"baseline": base} | found
    each = {name: Losses((0, 1, 2, 3, 4), rows[:, None] * SIZE, SIZE) for name, rows in every.items()}
    return judge(each, "baseline", Rules(named=True, practical=0.0))


def test_a_word_beside_an_interval_that_says_otherwise_is_marked() -> None:
    found = _beside(1e-4, 0.04)
    assert (found["a"].verdict, found["a"].apart) == ("worse", False)
    assert (found["b"].verdict, found["b"].apart) == ("worse", True), "Holm's second step is at 5 %"
    assert found["b"].low is not None and found["b"].low < 0
    single = baseline_level(2, 4.0)
    assert single > 0.025, "Dunnett's first step is wider than Holm's"
    behind = _beside((0.025 + single) / 2, 0.6)
    assert (behind["a"].verdict, behind["a"].apart) == ("not resolved", True)
    assert behind["a"].low is not None and behind["a"].low > 0
    assert (behind["b"].verdict, behind["b"].apart) == ("not resolved", False)


def test_more_variants_widen_every_interval_and_are_counted() -> None:
    seeds = (0, 1, 2, 3)
    two = {"baseline": losses(2.0, seeds), "a": losses(2.01, seeds, who=1)}
    many = two | {f"b{who}": losses(2.0, seeds, who=who) for who in range(2, 6)}
    alone, named, found = (judge(variants, "baseline", rules)["a"] for variants, rules in
                           ((two, NAMED), (many, NAMED), (many, FOUND)))  # fmt: skip
    widths = [one.high - one.low for one in (alone, named, found) if one.high is not None and one.low is not None]
    assert widths == sorted(widths) and len(set(widths)) == 3
    assert (alone.corrected_for, named.corrected_for, found.corrected_for) == (1, 5, 15)
    assert "Holm" in named.method and "Tukey" in found.method
    assert alone.p is not None and named.p is not None and alone.p < named.p


def test_variants_of_one_seed_do_not_cost_the_others_anything() -> None:
    seeds = (0, 1, 2, 3)
    two = {"baseline": losses(2.0, seeds), "a": losses(2.01, seeds, who=1)}
    more = two | {"single": losses(2.5, (0,), who=9)}
    assert judge(two, "baseline", NAMED)["a"] == judge(more, "baseline", NAMED)["a"]


def test_what_could_have_been_seen_is_said_with_the_seeds_a_smaller_one_needs() -> None:
    found = one(losses(2.0, (0, 1, 2), who=1), losses(2.0, (0, 1, 2)))
    assert found.could_have_seen is not None and found.high is not None and found.low is not None
    assert found.could_have_seen > (found.high - found.low) / 2
    assert found.smaller is not None and found.smaller <= 0.6 * found.could_have_seen
    assert found.seeds_for_smaller is None or found.seeds_for_smaller > 3


def test_screening_has_words_of_its_own_from_two_seeds_on() -> None:
    seeds = (0, 1)
    variants = {"baseline": losses(2.0, seeds)} | {f"v{who}": losses(2.0, seeds, who=who) for who in (1, 2, 3)}
    variants["bad"] = losses(2.5, seeds, who=4)
    found = judge(variants, "baseline", Rules(named=True, screening=True))
    assert found["bad"].verdict == "likely worse"
    assert judge(variants, "baseline", NAMED)["bad"].verdict == "two seeds"
    assert {verdict.verdict for verdict in found.values()} <= {
        "likely worse",
        "likely better",
        "not resolved",
        "negligible",
    }
    few = judge({"baseline": variants["baseline"], "bad": variants["bad"]}, "baseline", Rules(True, screening=True))
    assert few["bad"].verdict == "two seeds"
    assert any("not screened" in told for told in few["bad"].remarks)


def test_equal_recipes_are_called_different_in_about_one_family_of_twenty_or_less() -> None:
    """300 families of three equal variants of 3 seeds: binomial standard deviation 1.3 %."""
    for rules in (Rules(True, practical=0.0), Rules(False, practical=0.0)):
        false = 0
        for family in range(300):
            variants = {str(who): losses(2.0, (0, 1, 2), 0.01, 1000 * (family + 1) + who) for who in range(3)}
            lowest = min(variants, key=lambda name: variants[name].score)
            words = judge(variants, "0" if rules.named else lowest, rules).values()
            false += any(verdict.verdict in ("better", "worse") for verdict in words)
        assert false / 300 <= 0.09
