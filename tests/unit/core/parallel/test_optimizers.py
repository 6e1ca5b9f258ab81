"""An optimizer that looks at whole matrices, on several processes beside one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import spread_models as spread
from processes import run_on


def test_muon_on_four_processes_is_muon_on_one(tmp_path: Path) -> None:
    """Matrices in pieces are made whole first; experts lie whole. Gradients differ by the order of their sums."""
    alone = spread.muon_steps(None)
    for found in run_on(4, spread.muon_steps, tmp_path, "expert2"):
        assert found.keys() == alone.keys()
        for name, values in alone.items():
            np.testing.assert_allclose(found[name], values, rtol=0, atol=2e-4, err_msg=name)
