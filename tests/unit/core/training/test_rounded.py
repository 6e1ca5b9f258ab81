"""AdamW on 16 bits: unbiased, its arithmetic AdamW's own, its noise keyed, a run that goes on the same to the bit."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

import moelab
from moelab import session
from moelab.checkpoint import MODEL, TRAINING, checkpoints
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import OptimizerConfig
from moelab.errors import ConfigError
from moelab.nn.narrow import narrow
from moelab.nn.transformer import Transformer
from moelab.parallel.ranks import ALONE
from moelab.training import rounded
from moelab.training.optimizer import build_adamw
from moelab.training.rounded import RoundedAdamW, round_at_random

HALF = torch.bfloat16
SPACING = 2.0**-7  # of bf16 numbers from 1 to 2


def rounding(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    out = torch.empty_like(values, dtype=HALF)
    round_at_random([(out, values.clone())], torch.Generator().manual_seed(seed))
    return out.float()


@pytest.mark.parametrize("share", [1 / 65536, 0.1, 0.5, 0.75])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_goes_up_as_often_as_it_is_near(share: float, sign: int) -> None:
    """Of n numbers the upper neighbour gets a binomial share; 6 of its standard deviations."""
    count = 400_000
    value = torch.full((count,), sign * (1 + share * SPACING), dtype=torch.float64).float()
    share = (abs(value[0].item()) - 1) / SPACING  # as fp32 holds it: 16 bits of it decide
    share = math.floor(share * 65536) / 65536
    found = rounding(value)
    assert set(found.tolist()) <= {sign * 1.0, sign * (1 + SPACING)}
    up = (found.abs() > 1).double().mean().item()
    assert abs(up - share) <= 6 * math.sqrt(share * (1 - share) / count)


def test_what_16_bits_hold_stays_and_what_is_no_number_is_none_still() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-126, math.inf, -math.inf]).repeat(100)
    assert torch.equal(rounding(exact).view(torch.int32), exact.view(torch.int32))
    assert rounding(torch.full((100,), math.nan)).isnan().all()


def test_noise_is_uniform_in_each_of_the_lanes_that_a_draw_is_cut_into() -> None:
    found = rounding(torch.full((4 * 50_000,), 1 + SPACING / 2)).view(-1, rounded.LANES)
    up = (found > 1).double().mean(0)
    assert (up - 0.5).abs().max().item() < 6 * 0.5 / math.sqrt(50_000)


def test_in_fp32_it_is_adamw_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 64).view(8, 8)) for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    groups = [{"params": [("w", ours)], "weight_decay": 0.1}]
    one = RoundedAdamW(groups, moments=torch.float32, **settings)  # type: ignore[arg-type]
    other = torch.optim.AdamW([theirs], weight_decay=0.1, fused=True, **settings)  # type: ignore[arg-type]
    for step in range(3):
        for parameter, optimizer in ((ours, one), (theirs, other)):
            parameter.grad = torch.cos(torch.arange(64.0) * (step + 1)).view(8, 8)
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert torch.equal(one.state[ours]["exp_avg_sq"], other.state[theirs]["exp_avg_sq"])
    assert one.state[ours]["step"] == 3
    monkeypatch.setattr(rounded, "PIECE", 16)  # pieces are a matter of memory
    ours.grad = theirs.grad = torch.ones(8, 8)
    one.step()
    other.step()
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_steps_below_the_spacing_add_up_where_the_nearest_number_would_stand_still() -> None:
    """A constant gradient moves AdamW's weight by lr a step: 50 of 1e-4 are 0.005, the spacing below 1 is 0.0039."""
    weight = torch.nn.Parameter(torch.ones(200, 200, dtype=HALF))
    settings = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = RoundedAdamW([{"params": [("w", weight)]}], moments=torch.float32, **settings)  # type: ignore[arg-type]
    for step in range(50):
        torch.manual_seed(step)
        weight.grad = torch.ones(200, 200, dtype=HALF)
        optimizer.step()
    moved = 1 - weight.detach().double()
    # Each step's rounding has a variance of at most lr times the spacing above 1.
    error = math.sqrt(50 * 1e-4 * SPACING / moved.numel())
    assert abs(moved.mean().item() - 50e-4) < 6 * error
    assert (torch.ones((), dtype=HALF) - 1e-4).item() == 1.0


def model_of(**options: object) -> Transformer:
    layout = {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, moe=MoEConfig(layout=layout),
    )  # fmt: skip
    return moelab.build(config, seed=0)


def test_matrices_are_narrow_vectors_and_routers_are_not_and_a_tied_matrix_is_one() -> None:
    model = model_of()
    narrow(model)
    for name, parameter in model.named_parameters():
        fine = parameter.ndim < 2 or ".router." in name
        assert parameter.dtype == (torch.float32 if fine else HALF), name
    assert model.lm_head.weight is model.embed_tokens.weight


def test_what_layers_add_up_stays_fp32_and_the_loss_is_that_of_rounded_weights() -> None:
    model, ids = model_of(), torch.arange(24).view(2, 12)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(parameter.to(HALF))
    with torch.autocast("cpu", HALF):
        expected = model(ids, targets=ids).token_loss
        narrow(model)
        assert model.embed(ids).x.dtype == torch.float32
        assert torch.equal(model(ids, targets=ids).token_loss, expected)


def test_the_norm_of_narrow_gradients_is_summed_in_fp32() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(257, 3, dtype=HALF)), torch.nn.Parameter(torch.zeros(5))]
    for parameter in parameters:
        parameter.grad = torch.sin(torch.arange(parameter.numel())).view_as(parameter).to(parameter.dtype)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    exact = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    assert ALONE.gradient_norm(parameters).item() == pytest.approx(exact, rel=1e-6)


def test_noise_is_keyed_by_name_and_a_frozen_neighbour_changes_nothing() -> None:
    found = []
    for frozen in (False, True):
        model = model_of()
        narrow(model)
        model.layers[0].requires_grad_(not frozen)
        optimizer = build_adamw(model, OptimizerConfig(moments_dtype="bfloat16"))
        torch.manual_seed(7)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
        found.append(model.layers[1].state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    words = [
        "train/tiny_moe", "train.steps=4", "train.batch_size=4", "train.micro_batch_size=2", "train.sequence_length=32",
        "train.threads=1", "train.save_every=2", "evaluation.sequences=2", "evaluation.sample_tokens=4",
        "data.source.domains=[code_py]", "data.source.max_bytes_per_domain=60000", "train.dtype=bfloat16",
        "train.parameters_dtype=bfloat16", "optimizer.moments_dtype=bfloat16",
    ]  # fmt: skip
    run = tmp_path / "run"
    session.train(moelab.load_config(*words, f"run_dir={run}"), progress=False)
    last = checkpoints(run)[-1]
    kept = {name: (last / name).read_bytes() for name in (MODEL, TRAINING)}
    shutil.rmtree(last)
    session.train(moelab.load_config(*words, f"run_dir={run}", "resume=true"), progress=False)
    assert {name: (last / name).read_bytes() for name in kept} == kept
    model = moelab.load(run)
    assert model(torch.arange(8).view(1, 8)).logits.isfinite().all()  # and it is read as any other


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.parameters_dtype=bfloat16"], "train.parameters_dtype: bfloat16 needs train.dtype=bfloat16"),
        (["optimizer.moments_dtype=float16"], "optimizer.moments_dtype: must be float32 or bfloat16, not 'float16'"),
        (
            ["optimizer.moments_dtype=bfloat16", "parallel.shard=2"],
            "optimizer.moments_dtype: bfloat16 is for one process",
        ),
    ],
)
def test_what_can_t_be_kept_so_is_refused_by_its_key(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        moelab.load_config("train/tiny_moe", "run_dir=runs/none", *words)
