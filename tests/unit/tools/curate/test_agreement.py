"""How far filters agree: figures by hand and from the two-by-two table, and nothing that hangs on pieces."""

from __future__ import annotations

import numpy as np
import pytest

from moelab_tools.curate.account import Account
from moelab_tools.curate.agreement import ALL, Agreement, agreement_lines, agreements

STAGES = ["1. a", "2. b", "3. c"]


def account_of(drops: dict[str, np.ndarray]) -> Account:
    """drops: {domain: [documents, stages] bool}."""
    account = Account()
    for domain, table in drops.items():
        account.documents[domain] = len(table)
        for row in table:
            for stage in STAGES:
                account.asked[stage, domain] += 1
            names = tuple(stage for stage, dropped in zip(STAGES, row, strict=True) if dropped)
            if names:
                account.dropped_by[domain, names] += 1
    return account


def kappa(one: np.ndarray, other: np.ndarray) -> float:
    """Cohen's, from the table of shares."""
    table = np.array([[np.mean((one == a) & (other == b)) for b in (0, 1)] for a in (0, 1)])
    chance = float((table.sum(0) * table.sum(1)).sum())
    return float((np.trace(table) - chance) / (1 - chance))


@pytest.mark.parametrize("seed", range(5))
def test_it_is_cohens_kappa_and_jaccards_share_of_the_decisions(seed: int) -> None:
    generator = np.random.default_rng(seed)
    drops = {name: generator.random((50, 3)) < 0.4 for name in ("web", "code")}
    found = {(one.first, one.second, one.domain): one for one in agreements(account_of(drops), STAGES)}
    assert len(found) == 3 * 3
    for (first, second, domain), one in found.items():
        table = np.concatenate(list(drops.values())) if domain == ALL else drops[domain]
        left, right = table[:, STAGES.index(first)], table[:, STAGES.index(second)]
        assert one.jaccard == pytest.approx((left & right).sum() / (left | right).sum())
        assert one.kappa == pytest.approx(kappa(left, right))


def test_the_ends_of_the_scale_and_what_has_no_figure() -> None:
    def told(documents: int, first: int, second: int, both: int) -> tuple[float | None, float | None]:
        one = Agreement("a", "b", "d", documents, first, second, both)
        return one.jaccard, one.kappa

    assert told(10, 4, 4, 4) == (1, 1)
    assert told(10, 5, 5, 0) == (0, -1)
    assert told(100, 50, 20, 10)[1] == pytest.approx(0), "as often as by chance"
    assert told(10, 0, 0, 0) == (None, None)
    assert told(10, 10, 10, 10) == (1, None)
    assert str(Agreement("a", "b", "d", 10, 5, 5, 0)) == "0 of 10, κ −1.00"


def test_lines_say_what_each_drops_by_itself_and_alone() -> None:
    table = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)
    account = account_of({"web": table, "code": table[:1]})
    assert agreement_lines(account, STAGES) == [
        ("1. a: by itself", {ALL: "4", "code": "1", "web": "3"}),
        ("1. a: alone", {ALL: "1", "code": "0", "web": "1"}),
        ("2. b: by itself", {ALL: "3", "code": "1", "web": "2"}),
        ("2. b: alone", {ALL: "0", "code": "0", "web": "0"}),
        ("1. a, 2. b", {ALL: "3 of 4, κ 0.55", "code": "1 of 1", "web": "2 of 3, κ 0.50"}),
    ]
    assert agreement_lines(account_of({"web": table[:, [0, 2, 2]]}), STAGES) == [], "one that drops agrees with nobody"


def test_filters_of_other_domains_are_compared_where_both_are_asked() -> None:
    account = account_of({"web": np.array([[1, 1, 0], [0, 1, 0]], bool), "code": np.array([[1, 0, 0]], bool)})
    del account.asked["2. b", "code"]  # which is not for it
    assert [one.domain for one in agreements(account, STAGES)] == [ALL, "web"]
    assert agreements(account, STAGES)[0].documents == 2
    assert "code" not in dict(agreement_lines(account, STAGES))["2. b: by itself"]


def test_pieces_add_up_and_come_back_from_their_files() -> None:
    generator = np.random.default_rng(0)
    whole = {"web": generator.random((40, 3)) < 0.4}
    parts = [account_of({"web": whole["web"][:17]}), account_of({"web": whole["web"][17:]})]
    total = Account()
    for part in parts:
        total.add(Account.from_json(part.to_json()))
    assert agreements(total, STAGES) == agreements(account_of(whole), STAGES)
