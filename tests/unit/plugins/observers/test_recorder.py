"""Every measure of the flight recorder against a loop over tokens in numpy, and its values where they are known."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from moelab.hookspecs import OBSERVERS
from moelab.moe.probe import Probe, served_map
from moelab.moe.routing import LayerRecord, Routing
from moelab.registry import Registry
from moelab_plugins.observers import _recorder_measures as measure

T, E, K, V, DOMAINS = 60, 8, 2, 7, ("code", "prose", "maths")


def draw(seed: int, experts: int = E, top_k: int = K) -> np.ndarray[Any, Any]:
    """[T, K] distinct experts."""
    return np.random.default_rng(seed).random((T, experts)).argsort(1)[:, :top_k]


def as_map(chosen: np.ndarray[Any, Any], experts: int = E) -> torch.Tensor:
    found = np.zeros((len(chosen), experts), bool)
    np.put_along_axis(found, chosen, True, axis=1)
    return torch.from_numpy(found)


TOKEN = np.random.default_rng(1).integers(0, V, T)
DOMAIN = np.random.default_rng(2).integers(0, len(DOMAINS), T)
SETS = [set(row.tolist()) for row in draw(3)]


def test_saturation_and_churn_are_those_of_sets() -> None:
    now, then = draw(3), draw(4)
    overlaps = [len(set(a) & set(b)) for a, b in zip(now.tolist(), then.tolist(), strict=True)]
    assert float(measure.saturation(as_map(now), as_map(then))) == pytest.approx(np.mean(overlaps) / K)
    jaccard = np.mean([common / (2 * K - common) for common in overlaps])
    assert float(measure.churn(as_map(now), as_map(then))) == pytest.approx(1 - jaccard)
    same = as_map(now)
    assert float(measure.saturation(same, same)) == 1
    assert float(measure.churn(same, same)) == 0


def test_tokens_of_different_numbers_of_experts_count_by_the_later_look() -> None:
    now, then = (
        torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]]).bool(),
        torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1]]).bool(),
    )
    assert float(measure.saturation(now, then)) == pytest.approx((1 / 2 + 1) / 2)
    assert float(measure.churn(now, then)) == pytest.approx(1 - (1 / 3 + 0 / 3 + 1) / 3)


def test_co_activation_counts_all_pairs() -> None:
    pairs = Counter(pair for chosen in SETS for pair in combinations(sorted(chosen), 2))
    alone = Counter(expert for chosen in SETS for expert in chosen)
    counts = measure.co_activation_counts(as_map(draw(3)))
    for i in range(E):
        for j in range(E):
            assert float(counts[i, j]) == (alone[i] if i == j else pairs[min(i, j), max(i, j)])
    largest = max(count / alone[one] for pair, count in pairs.items() for one in pair if alone[one] >= 10)
    assert float(measure.co_activation(counts)) == pytest.approx(largest)


def test_two_experts_that_always_go_together_have_a_co_activation_of_one() -> None:
    chosen = np.where(np.arange(T)[:, None] % 2 == 0, [0, 1], [2, 3])
    assert float(measure.co_activation(measure.co_activation_counts(as_map(chosen)))) == 1
    few = measure.co_activation_counts(as_map(draw(3)[:4]))
    assert math.isnan(float(measure.co_activation(few)))


def test_token_specialisation_is_the_share_of_the_ids_favourite_experts() -> None:
    token, index = torch.from_numpy(TOKEN), torch.from_numpy(TOKEN)
    by_token = measure.count_by(as_map(draw(3)), index, V)
    best = sum(max(sum(e in SETS[t] for t in np.flatnonzero(x == TOKEN)) for e in range(E)) for x in range(V))
    occurrences = torch.bincount(token, minlength=V).double()
    assert float(measure.token_specialisation(by_token, occurrences)) == pytest.approx(best / T)
    by_rule = np.stack([TOKEN % E, (TOKEN + 1) % E], axis=1)  # a hash of the id
    found = measure.token_specialisation(measure.count_by(as_map(by_rule), index, V), occurrences)
    assert float(found) == 1


def _domain_by_hand(chosen: np.ndarray[Any, Any], beyond_tokens: bool) -> float:
    total = 0.0
    for domain in range(len(DOMAINS)):
        mine = np.flatnonzero(domain == DOMAIN)
        actual, expected = np.zeros(E), np.zeros(E)
        for t in mine:
            actual[chosen[t]] += 1
            others = np.flatnonzero(TOKEN[t] == TOKEN) if beyond_tokens else np.arange(T)
            expected += np.bincount(chosen[others].reshape(-1), minlength=E) / len(others)
        total += np.abs(actual / actual.sum() - expected / expected.sum()).sum() / 2
    return float(total / len(DOMAINS))


def _domain_measures(chosen: np.ndarray[Any, Any]) -> tuple[float, float]:
    now, domain, token = as_map(chosen), torch.from_numpy(DOMAIN), torch.from_numpy(TOKEN)
    both = torch.zeros(V, len(DOMAINS), dtype=torch.float64)
    both.index_put_((token, domain), torch.ones(T, dtype=torch.float64), accumulate=True)
    by_domain = measure.count_by(now, domain, len(DOMAINS))
    expected = measure.expected_by_tokens(measure.count_by(now, token, V), both)
    return float(measure.domain_specialisation(by_domain)), float(measure.domain_specialisation(by_domain, expected))


def test_domain_specialisation_is_what_loops_over_tokens_find() -> None:
    plain, beyond = _domain_measures(draw(3))
    assert plain == pytest.approx(_domain_by_hand(draw(3), beyond_tokens=False))
    assert beyond == pytest.approx(_domain_by_hand(draw(3), beyond_tokens=True))


def test_a_router_that_only_knows_the_token_has_no_domains_beyond_it() -> None:
    """And one that only knows the domain has: with its own two experts each, shares differ by 1 - 1/3 at most."""
    by_token = np.stack([TOKEN % E, (TOKEN + 1) % E], axis=1)
    assert _domain_measures(by_token)[0] > 0.05
    assert _domain_measures(by_token)[1] == pytest.approx(0, abs=1e-12)
    by_domain = np.stack([2 * DOMAIN, 2 * DOMAIN + 1], axis=1)
    plain, beyond = _domain_measures(by_domain)
    sizes = np.bincount(DOMAIN) / T
    assert plain == pytest.approx(np.mean(1 - sizes))
    assert beyond > 0.4


def test_similarity_is_the_cosine_of_all_weights() -> None:
    stream = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(4, 6, 5, generator=stream), torch.randn(4, 3, 5, generator=stream)
    gate_up[1], down[1] = 2 * gate_up[0], 2 * down[0]
    gate_up[2], down[2] = -gate_up[0], -down[0]
    found = measure.expert_similarity(gate_up, down)
    flat = np.concatenate([gate_up.flatten(1).double().numpy(), down.flatten(1).double().numpy()], axis=1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(found.numpy(), unit @ unit.T, atol=1e-6)
    assert float(found[0, 1]) == pytest.approx(1)
    assert float(found[0, 2]) == pytest.approx(-1)
    off = [(unit @ unit.T)[i, j] for i in range(4) for j in range(4) if i != j]
    assert float(measure.mean_off_diagonal(found)) == pytest.approx(np.mean(off), abs=1e-6)


def test_the_margin_is_the_kth_minus_the_next_score() -> None:
    scores = torch.rand(T, E, generator=torch.Generator().manual_seed(0)).double()
    expert = scores.topk(K).indices
    routing = Routing.from_topk(expert, torch.ones(T, K), E, scores=scores.float())
    ordered = np.sort((scores / scores.sum(-1, keepdim=True)).numpy(), axis=1)[:, ::-1]
    found = measure.top_k_margin(routing, served_map(routing))
    assert found is not None
    assert float(found) == pytest.approx(np.mean(ordered[:, K - 1] - ordered[:, K]), rel=1e-5)
    worst = scores.topk(K, largest=False).indices
    against = Routing.from_topk(worst, torch.ones(T, K), E, scores=scores.float())
    assert float(measure.top_k_margin(against, served_map(against)) or 0) < 0
    assert measure.top_k_margin(Routing.from_topk(expert, torch.ones(T, K), E), served_map(routing)) is None


def test_a_placeholder_activates_nothing() -> None:
    expert = torch.from_numpy(draw(3))
    routing = Routing.from_topk(expert, torch.ones(T, K), E).serve(torch.arange(T * K) % 2 == 0)
    assert torch.equal(served_map(routing), as_map(draw(3)[:, :1]))


def probe(seed: int, layers: tuple[int, ...] = (0, 2), experts: int = E) -> Probe:
    stream, records = torch.Generator().manual_seed(seed), []
    for layer in layers:
        scores = torch.rand(T, experts, generator=stream)
        routing = Routing.from_topk(scores.topk(K).indices, torch.ones(T, K), experts, scores=scores)
        bank = torch.randn(experts, 6, 5, generator=stream), torch.randn(experts, 3, 5, generator=stream)
        norms = torch.full((T,), 3.0), torch.full((T,), 4.0)
        records.append(
            LayerRecord(
                layer,
                routing,
                routing.counts(),
                gate_up=bank[0],
                down=bank[1],
                routed_norm=norms[0],
                shared_norm=norms[1],
            )
        )
    return Probe(records, torch.from_numpy(TOKEN), torch.from_numpy(DOMAIN), DOMAINS)


def recorder(run_dir: Path, checkpoint: Path | None = None) -> Any:
    built: Any = Registry(entry_points=False).build(OBSERVERS, {"name": "recorder"}, run_dir, "observers")
    built.on_train_begin(run_dir=run_dir, checkpoint=checkpoint)
    return built


def saved(run: Any, folder: Path) -> Path:
    """A checkpoint of now."""
    folder.mkdir()
    for name, content in run.on_checkpoint(step=0).items():
        (folder / name).write_bytes(content)
    return folder


def test_numbers_come_by_layer_and_as_means_with_those_of_the_start_beside_them(tmp_path: Path) -> None:
    run = recorder(tmp_path)
    first, second = run.on_probe(0, probe(0)), run.on_probe(50, probe(1))
    assert not any(tag.endswith(("saturation", "churn", "at_start")) for tag in first)
    tags = {tag.removeprefix("moe/layer_02/") for tag in second if tag.startswith("moe/layer_02/")}
    assert tags == {
        "co_activation", "token_specialisation", "domain_specialisation", "domain_specialisation_beyond_tokens",
        "top_k_margin", "expert_similarity", "routed_to_shared", "saturation", "churn",
    }  # fmt: skip
    assert second["moe/layer_00/routed_to_shared"] == pytest.approx(0.75)
    for key in ("token_specialisation", "domain_specialisation", "domain_specialisation_beyond_tokens"):
        assert second[f"moe/mean/{key}_at_start"] == pytest.approx(first[f"moe/mean/{key}"])
    mean = (second["moe/layer_00/churn"] + second["moe/layer_02/churn"]) / 2
    assert second["moe/mean/churn"] == pytest.approx(mean)


def test_saturation_is_against_half_as_many_steps_and_churn_against_the_last_look(tmp_path: Path) -> None:
    run = recorder(tmp_path)
    for step, seed in ((0, 0), (50, 1), (100, 2)):
        run.on_probe(step, probe(seed))
    found = run.on_probe(120, probe(1))  # as at step 50
    assert found["moe/layer_00/saturation"] == 1
    assert found["moe/layer_00/churn"] > 0.5


def test_the_file_holds_what_numpy_can_recompute(tmp_path: Path) -> None:
    run = recorder(tmp_path)
    for step, seed in ((0, 0), (50, 1), (100, 2)):
        found = run.on_probe(step, probe(seed))
    path = tmp_path / "recorder.safetensors"
    arrays = load_file(path)
    with safe_open(path, "numpy") as file:
        about = file.metadata()
    assert json.loads(about["domains"]) == list(DOMAINS)
    assert arrays["steps"].tolist() == [0, 50, 100]
    maps = np.unpackbits(arrays["layer_02/activated"], axis=-1, count=json.loads(about["experts"])["2"]).astype(bool)
    assert np.array_equal(maps[-1], served_map(probe(2).records[1].routing).numpy())
    overlap = [(maps[i] & maps[-1]).sum(-1).mean() / K for i in range(3)]
    np.testing.assert_allclose(arrays["layer_02/saturation"], overlap, rtol=1e-6)
    assert found["moe/layer_02/saturation"] == pytest.approx(overlap[1])
    co_activation = maps[-1].astype(int).T @ maps[-1].astype(int)
    assert np.array_equal(arrays["layer_02/co_activation"], co_activation)
    for domain in range(len(DOMAINS)):
        assert np.array_equal(arrays["layer_02/domain_expert"][domain], maps[-1][domain == DOMAIN].sum(0))
    for row, token in enumerate(np.unique(arrays["token_id"])):
        assert np.array_equal(arrays["layer_02/token_expert"][row], maps[-1][token == TOKEN].sum(0))


def test_many_looks_are_thinned_and_the_first_and_the_newest_stay(tmp_path: Path) -> None:
    run = recorder(tmp_path)
    for step in range(0, 400, 10):
        run.on_probe(step, probe(step % 5, layers=(0,)))
        steps = load_file(tmp_path / "recorder.safetensors")["steps"].tolist()
        assert (steps[0], steps[-1]) == (0, step)
        assert len(steps) <= 16
        assert steps == sorted(set(steps))


def test_a_resumed_run_finds_the_looks_before_its_checkpoint(tmp_path: Path) -> None:
    run = recorder(tmp_path)
    run.on_probe(0, probe(0))
    checkpoint = saved(run, tmp_path / "step_20")
    expected = run.on_probe(50, probe(1))
    run.on_probe(100, probe(2))  # beyond the checkpoint
    later = recorder(tmp_path, checkpoint)
    assert later.on_probe(50, probe(1)) == expected


def test_looks_that_were_thinned_after_the_checkpoint_are_known_to_who_goes_on_from_it(tmp_path: Path) -> None:
    """Else churn would be counted against an earlier look than in a run that was not stopped."""
    run = recorder(tmp_path)
    for step in range(0, 160, 10):
        run.on_probe(step, probe(step % 5, layers=(0,)))
    checkpoint = saved(run, tmp_path / "step_155")
    expected = [run.on_probe(step, probe(step % 7, layers=(0,))) for step in range(160, 300, 10)]
    content = (tmp_path / "recorder.safetensors").read_bytes()
    later = recorder(tmp_path, checkpoint)
    assert later.on_checkpoint(step=155) == {"recorder.safetensors": (checkpoint / "recorder.safetensors").read_bytes()}
    assert [later.on_probe(step, probe(step % 7, layers=(0,))) for step in range(160, 300, 10)] == expected
    assert (tmp_path / "recorder.safetensors").read_bytes() == content, "the same looks are the same bytes"


@pytest.mark.parametrize("fault", ["text", "empty", "shape", "kind", "other text", "other experts"])
def test_a_file_that_does_not_fit_is_told_of_and_begun_again(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    recorder(tmp_path).on_probe(0, probe(0))
    path = tmp_path / "recorder.safetensors"
    arrays = load_file(path)
    if fault == "text":
        path.write_text("no tensors")
    elif fault == "empty":
        save_file({}, path)
    elif fault == "shape":
        save_file(arrays | {"layer_00/activated": arrays["layer_00/activated"][0]}, path)
    elif fault == "kind":
        save_file(arrays | {"layer_00/activated": arrays["layer_00/activated"].astype(np.float32)}, path)
    elif fault == "other text":
        save_file(arrays | {"token_id": arrays["token_id"] + 1}, path)
    with caplog.at_level(logging.WARNING, logger="moelab"):
        found = recorder(tmp_path, tmp_path).on_probe(50, probe(1, experts=17 if fault == "other experts" else E))
    assert not any(tag.endswith("saturation") for tag in found)
    assert ("begins again" in caplog.text) == (not fault.startswith("other"))
    assert load_file(path)["steps"].tolist() == [50]


def test_one_domain_says_nothing_of_domains(tmp_path: Path) -> None:
    one = probe(0)
    alone = Probe(one.records, one.token_id, torch.zeros_like(one.domain_id), ("code",))
    assert not any("domain" in tag for tag in recorder(tmp_path).on_probe(0, alone))
