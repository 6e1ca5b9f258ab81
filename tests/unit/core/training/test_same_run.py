"""Going on with a run that a version before the newest key began."""

from __future__ import annotations

from pathlib import Path

import pytest

from later_keys import later
from moelab.config.run import TrainConfig
from moelab_plugins.routers.softmax_topk import SoftmaxTopKOptions
from moelab_tools import cli
from sweeping import TINY


def test_a_run_goes_on_under_a_key_and_an_option_that_came_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *TINY, "model.moe.router={name: softmax_topk}", f"run_dir={tmp_path / 'run'}"]
    assert cli.run(words) == 0
    with later(TrainConfig, "later", "float", 0.5), later(SoftmaxTopKOptions, "later_option", "int", 3):
        assert cli.run([*words, "--resume"]) == 0, capsys.readouterr().err
        assert cli.run([*words, "--resume", "train.later=2"]) == 2
        assert "(train.later: 0.5 then, 2.0 now);" in capsys.readouterr().err
        assert cli.run([*words, "--resume", "model.moe.router.later_option=4"]) == 2
        assert "(model.moe.router.later_option: 3 then, 4 now);" in capsys.readouterr().err
    with later(TrainConfig, "grad_clip", "float", 0.25):
        assert cli.run([*words, "--resume"]) == 2
        assert "(train.grad_clip: 1.0 then, 0.25 now by default);" in capsys.readouterr().err
        assert cli.run([*words, "--resume", "train.grad_clip=1.0"]) == 0
