"""The source keeps its contract, and says which column is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from my_plugin.data_source import moelab_data_sources

from moelab import ConfigError, testing

(COMPONENT,) = moelab_data_sources()
ROOT = Path(__file__).resolve().parent.parent


def case(**options):
    return testing.DataSourceCase(COMPONENT, {"file": "data_source.csv", **options}, base=ROOT)


@pytest.mark.parametrize("check", testing.DATA_SOURCE_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(case())


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="'tekst'"):
        case(column="tekst").build()
