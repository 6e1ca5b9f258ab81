"""Mutual information from counts: closed forms, and chance told apart from meaning."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moelab.moe.specialisation import (
    conditional_information,
    entropy,
    information_about,
    mutual_information,
)


def test_entropies_of_fair_and_of_fixed_things():
    assert entropy(np.arange(8).repeat(5)) == pytest.approx(math.log(8))
    assert entropy(np.zeros(9, int)) == 0
    assert entropy(np.array([], int)) == 0


def test_information_between_equal_independent_and_half_known_things():
    a = np.arange(4).repeat(4)
    assert mutual_information(a, a) == pytest.approx(math.log(4))
    assert mutual_information(a, np.tile(np.arange(4), 4)) == pytest.approx(0, abs=1e-12)
    assert mutual_information(a, a // 2) == pytest.approx(math.log(2))


def test_what_the_token_explains_is_not_counted_twice():
    """The expert is a function of the token, and the token tells the domain: given the token nothing is left."""
    token = np.arange(64) % 8
    assert mutual_information(token % 4, token // 4) == pytest.approx(0, abs=1e-12)
    expert, domain = token // 2, token // 4
    assert mutual_information(expert, domain) == pytest.approx(math.log(2))
    assert conditional_information(expert, domain, token) == pytest.approx(0, abs=1e-12)


def test_the_exclusive_or_is_seen_only_given_the_token():
    token, domain = np.meshgrid([0, 1], [0, 1])
    expert = token ^ domain
    assert mutual_information(expert.ravel(), domain.ravel()) == pytest.approx(0, abs=1e-12)
    assert conditional_information(expert.ravel(), domain.ravel(), token.ravel()) == pytest.approx(math.log(2))


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_documents_moved_between_labels_tell_meaning_from_chance(follows: bool, given: bool):
    """Each document prefers one expert; it is the domain's, or its own whim."""
    chance = np.random.default_rng(0)
    label_of_document = np.arange(24) % 2
    document = np.repeat(np.arange(24), 200)
    whim = chance.permutation(np.arange(24) % 2)
    favourite = np.where(follows, label_of_document, whim)[document]
    expert = np.where(chance.random(len(document)) < 0.7, favourite, 1 - favourite)
    token = chance.integers(0, 5, len(document))
    found = information_about(
        expert, label_of_document[document], document, label_of_document, token=token if given else None
    )
    assert found.beyond_chance == follows
    assert 0 <= found.chance <= found.chance_high <= found.entropy + 1e-12
    assert found.entropy == pytest.approx(math.log(2), rel=0.01)
