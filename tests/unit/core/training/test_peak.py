"""The rate that MFU is a share of is of the products that layers compute with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moelab.training import peak
from moelab.training.precision import Precision


@pytest.fixture(autouse=True)
def _measured_anew() -> Iterator[None]:
    peak.peak_flops.cache_clear()
    yield
    peak.peak_flops.cache_clear()


@pytest.mark.parametrize(("processor_is", "dtype", "calls"), [
    ("zen_5", torch.float32, peak.PROBE_REPEATS), ("zen_5", torch.bfloat16, 0), ("zen_4", torch.float32, 0),
])  # fmt: skip
def test_a_cpus_peak_is_measured_by_the_layers_way(
    processor_is: str, dtype: torch.dtype, calls: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request.getfixturevalue(processor_is)
    called = []
    compute = peak.product
    monkeypatch.setattr(peak, "product", lambda *given: called.append(given) or compute(*given))
    assert peak.peak_flops(Precision(torch.device("cpu"), dtype)) > 0
    assert len(called) == calls
