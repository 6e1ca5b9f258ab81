"""Generation's ways, measured: what is chosen of which seconds, what is kept, and that texts stay the same."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.moe import few_rows, thin_product, thin_ways
from moelab.moe.experts import ExpertBank
from moelab.moe.layout import ExpertLayout
from moelab.moe.thin_product import BAGGED, ONEDNN, ORIGINAL, PACKED, TURNED, PackedWeights, few_product, is_packed
from moelab.moe.thin_ways import MAKING, TABLES, Experts, Matrices, measured_way, table_of
from moelab.nn.generate import generate_batch
from moelab.nn.sampling import Sampling
from moelab.ways import Found
from moelab.ways_file import keep, machine_facts, place_of, read_kept

ALONE = (ORIGINAL, ONEDNN, TURNED, BAGGED, PACKED)
SEVERAL = (ORIGINAL, ONEDNN, TURNED, PACKED)
MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3,
    moe=MoEConfig(layout={"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A processor without constants, on which nothing is known; matrices of any size are worth it."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("oneDNN packs them")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (thin_product, thin_ways):
        monkeypatch.setattr(module, "reads_matrices_faster", lambda: False)
    monkeypatch.setattr(thin_product, "LEAST_ELEMENTS", 1)
    table_of.cache_clear()
    yield
    table_of.cache_clear()


def _machine() -> dict[str, str]:
    return machine_facts(torch.get_num_threads(), torch.device("cpu"))


def _here() -> Path:
    path = place_of(_machine())
    assert path is not None
    return path


def _unasked() -> list[Tensor]:
    raise AssertionError("nothing is to be measured here")


def _said(fastest: str, making: float = 0.0) -> Callable[..., dict[str, Found]]:
    """In place of `measure`: this way takes half of the others' time, where there is it, and copies so long to make."""

    def measured(problems: Mapping[str, Any], rows: int, between: Any) -> dict[str, Found]:
        found = {}
        for title, (one, *_) in problems.items():
            seconds = {way: 1.0 if way == fastest else 2.0 for way in one.ways(rows)}
            seconds |= {MAKING + way: making for way in seconds if way in thin_ways.COPIES}
            found[title] = Found(fastest, seconds)
        return found

    return measured


def _tokens(model: Any, rows: int, autotune: bool | None) -> list[list[int]]:
    prompts = [[1 + row, 2, 3] for row in range(rows)]
    found = generate_batch(model, prompts, Sampling(64, temperature=0.0, autotune=autotune))
    return [one.ids for one in found]


def _behind(model: Any, prompt: list[int], found: list[int]) -> float:
    """How far the scores of the tokens found are behind the best of one whole forward pass, at worst."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *found]])).logits[0, len(prompt) - 1 : -1]
    return float((logits.amax(-1) - logits[range(len(found)), found]).max())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("way", ALONE)
def test_by_every_way_each_token_is_the_likeliest_of_a_whole_forward_pass(
    way: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thin_ways, "measure", _said(way))
    taken, of = [], thin_product.Copy.of

    def made(weights: tuple[Tensor, ...], way: str) -> thin_product.Copy:
        taken.append(way)
        return of(weights, way)

    monkeypatch.setattr(thin_product.Copy, "of", made)
    model = moelab.build(MODEL).eval()
    for row, ids in enumerate(_tokens(model, rows, None)):
        assert _behind(model, [1 + row, 2, 3], ids) < 1e-4
    assert set(taken) == ({way} if way in (ALONE if rows == 1 else SEVERAL) and way != ORIGINAL else set())


@pytest.mark.parametrize("way", [ONEDNN, TURNED, BAGGED, PACKED])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_by_every_way_are_products(way: str, rows: int) -> None:
    first, second, x = torch.randn(24, 33), torch.randn(5, 33), torch.randn(rows, 33)
    with torch.no_grad(), PackedWeights([(first, second)], 1 << 20, rows, lambda some: way).used():
        assert is_packed(first) and is_packed(second)
        for weight in (first, second):
            bias = torch.randn(2 * len(weight))[::2]  # its numbers don't lie next to each other
            expected = x.double() @ weight.double().t() + bias.double()
            torch.testing.assert_close(few_product(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_original_itself_takes_no_memory() -> None:
    weight = torch.randn(24, 33)
    with torch.no_grad(), PackedWeights([(weight,)], 0, 1, lambda some: ONEDNN).used():
        assert is_packed(weight)
    with torch.no_grad(), PackedWeights([(weight,)], 0, 1, lambda some: TURNED).used():
        assert not is_packed(weight)


@pytest.mark.parametrize(("tokens", "way"), [(5, ORIGINAL), (200, PACKED)])
def test_a_copy_must_win_back_what_making_it_takes(tokens: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin_ways, "measure", _said(PACKED, making=10.0))
    group = (torch.randn(24, 33),)
    chosen = measured_way([Matrices(group)], 4, tokens, list, None)
    assert chosen is not None and chosen(Matrices(group)) == way


def test_constants_stand_where_there_are_some_or_the_caller_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [Matrices((torch.randn(24, 33),))]
    assert measured_way(groups, 1, 64, _unasked, False) is None
    monkeypatch.setattr(thin_ways, "reads_matrices_faster", lambda: True)
    assert measured_way(groups, 1, 64, _unasked, None) is None
    monkeypatch.setattr(thin_ways, "measure", _said(TURNED))
    assert measured_way(groups, 1, 64, list, True) is not None


def test_few_tokens_and_matrices_too_small_ask_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin_ways, "table_of", _unasked)
    model = moelab.build(MODEL).eval()
    generate_batch(model, [[1, 2]], Sampling(63, autotune=True))
    generate_batch(model, [[1, 2], [3]], Sampling(31, autotune=True))
    monkeypatch.setattr(thin_product, "LEAST_ELEMENTS", 1 << 15)
    generate_batch(model, [[1, 2]], Sampling(64, autotune=True))


def test_what_was_measured_is_kept_and_asked_in_the_next_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    model = moelab.build(MODEL).eval()
    first = _tokens(model, 3, None)
    (line,) = caplog.messages
    assert line.startswith("autotune: ") and str(_here()) in line
    kept = read_kept(_here(), _machine())
    assert "few rows 4 x 32 to 64 + 32 + 32 float32" not in kept  # query, key and value are one already
    assert kept["few rows 4 x 32 to 2 of 4 experts 32 to 16 float32"].way in (ORIGINAL, TABLES)
    assert all(set(found.seconds) - {found.way} and found.way in (*SEVERAL, TABLES) for found in kept.values())
    assert all(title.startswith("few rows 4 x ") for title in kept)
    table_of.cache_clear()
    monkeypatch.setattr(thin_ways, "measure", _unasked)
    assert _tokens(model, 3, None) == first
    assert len(_tokens(model, 4, None)) == 4, "as 3 are"
    assert len(caplog.messages) == 1


def test_what_another_process_kept_meanwhile_is_taken_and_training_s_ways_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    group, title = (torch.randn(24, 33),), "few rows 1 x 33 to 24 float32"
    keep(_here(), _machine(), {"linear": Found("mkl", {"mkl": 1.0})})

    def measured(problems: Mapping[str, Any], rows: int, between: Any) -> dict[str, Found]:
        keep(_here(), _machine(), {**read_kept(_here(), _machine()), **_said(BAGGED)(problems, rows, between)})
        return _said(TURNED)(problems, rows, between)

    monkeypatch.setattr(thin_ways, "measure", measured)
    chosen = measured_way([Matrices(group)], 1, 64, list, None)
    assert chosen is not None and chosen(Matrices(group)) == BAGGED
    kept = read_kept(_here(), _machine())
    assert kept["linear"].way == "mkl" and kept[title].way == BAGGED


@pytest.mark.parametrize("content", ["{", '{"machine": {"vendor_id": "elsewhere"}, "problems": {}}'])
def test_a_file_of_no_use_is_told_in_a_line_and_measured_anew(
    content: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(thin_ways, "measure", _said(TURNED))
    _here().parent.mkdir(parents=True)
    _here().write_text(content)
    group = (torch.randn(24, 33),)
    for _ in range(2):
        chosen = measured_way([Matrices(group)], 1, 64, list, None)
        assert chosen is not None and chosen(Matrices(group)) == TURNED
    assert sum("it is measured anew" in line for line in caplog.messages) == 1
    assert json.loads(_here().read_text())["problems"].keys() == {"few rows 1 x 33 to 24 float32"}


def test_a_problem_that_was_kept_with_other_ways_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    group, title = (torch.randn(24, 33),), "few rows 1 x 33 to 24 float32"
    keep(_here(), _machine(), {title: Found("magic", {"magic": 1.0, ORIGINAL: 2.0})})
    monkeypatch.setattr(thin_ways, "measure", _said(TURNED))
    chosen = measured_way([Matrices(group)], 1, 64, list, None)
    assert chosen is not None and chosen(Matrices(group)) == TURNED


class _Clock:
    """What is timed moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _Said:
    """A problem whose ways move a clock by what they are said to take."""

    weights = (torch.ones(2, 2),)

    def __init__(self, calls: Mapping[str, Callable[[], object]], making: float | None = None) -> None:
        self._calls = calls
        self._making = {} if making is None else {MAKING + way: [making] for way in (TURNED, PACKED)}

    def title(self, rows: int) -> str:
        return "p"

    def ways(self, rows: int) -> tuple[str, ...]:
        return tuple(self._calls)

    def usual(self, rows: int) -> str:
        return ORIGINAL

    def trials(self, rows: int, clock: Any) -> Any:
        return self._calls, self._making


def test_seconds_are_of_turns_after_other_weights_were_read_and_chance_turns_nothing() -> None:
    clock, took, done = _Clock(), {ORIGINAL: 1.0, ONEDNN: 0.97, TURNED: 0.9, PACKED: 3.0}, []

    def moving(name: str, seconds: Callable[[], float]) -> Callable[[], object]:
        def call() -> None:
            clock.now += seconds()
            done.append(name)

        return call

    alike = [_Said({way: moving(way, partial(took.__getitem__, way)) for way in took}, 7.0)] * 2
    between = [SimpleNamespace(sum=moving("others", lambda: 50.0))]
    found = thin_ways.measure({"p": alike}, 4, between, clock)["p"]  # type: ignore[arg-type]
    assert {way: found.seconds[way] for way in took} == pytest.approx(took)
    assert found.way == TURNED and found.seconds[MAKING + PACKED] == 7.0
    forwards = [name for way in took for name in ("others", way, way)]
    backwards = [name for way in reversed(took) for name in ("others", way, way)]
    assert done == 3 * (forwards + backwards), "a round to warm up, and the fewest"
    took[TURNED] = 0.96
    assert thin_ways.measure({"p": alike}, 4, [], clock)["p"].way == ORIGINAL


def test_what_counts_is_the_lower_quartile_of_the_turns_without_the_first() -> None:
    clock = _Clock()
    times = {ORIGINAL: iter([9.0, 3.0, 1.0, 2.0, 5.0, 4.0]), TURNED: iter([9.0, 2.0, 9.0, 9.0, 1.5, 9.0])}

    def moved(way: str) -> None:
        clock.now += next(times[way])

    found = thin_ways.measure({"p": [_Said({way: partial(moved, way) for way in times})]}, 4, [], clock)["p"]
    assert found.seconds == pytest.approx({ORIGINAL: 2.0, TURNED: 2.0}) and found.way == ORIGINAL


def test_what_is_measured_and_what_is_read_between_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    small = [Matrices((torch.zeros(8, 4),)) for _ in range(9)]
    large = Matrices((torch.zeros(100, 4), torch.zeros(28, 4)))
    monkeypatch.setattr(thin_ways, "MOST_BYTES", 4 * 32 * 5)
    chosen = thin_ways._samples({"large": [large], "small": small})
    assert {title: len(groups) for title, groups in chosen.items()} == {"small": thin_ways.SAMPLES}
    monkeypatch.setattr(thin_ways, "BETWEEN", 4 * 150)
    others = [small[0].weights[0], torch.zeros(100), torch.zeros(10, dtype=torch.int64), torch.zeros(100)]
    between = thin_ways._between(others, chosen)
    assert [one.numel() for one in between] == [100, 50]


def _experts(num_experts: int = 6, top_k: int = 2) -> Experts:
    bank = ExpertBank(ExpertLayout(num_experts, top_k, 16), 24)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    return Experts(bank, top_k)


def test_the_ways_of_experts_compute_the_same_and_are_measured() -> None:
    experts = _experts()
    with torch.no_grad():
        calls, making = experts.trials(4, _Clock())
        one, two = calls[ORIGINAL](), calls[TABLES]()
    assert one.shape == (4, 24)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5 * float(one.abs().max()))
    assert calls.keys() == set(experts.ways(4)) and making.keys() == {MAKING + TABLES}
    found = thin_ways.measure({"p": [experts]}, 4, [])["p"]
    assert found.seconds.keys() == {ORIGINAL, TABLES, MAKING + TABLES} and min(found.seconds.values()) > 0


def test_experts_that_many_rows_choose_or_in_half_precision_are_left_to_constants() -> None:
    assert _experts().ways(thin_ways.MOST // 2) and not _experts().ways(thin_ways.MOST // 2 + 1)
    half = _experts()
    half.bank.bfloat16()
    assert not half.ways(1)
    assert measured_way([half], 1, 64, _unasked, True) is None


@pytest.mark.parametrize(("way", "making"), [(TABLES, 0.0), (ORIGINAL, 0.0), (TABLES, 1000.0)])
def test_tables_of_experts_are_made_where_they_were_measured_faster(
    way: str, making: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thin_ways, "measure", _said(way, making))
    made, of = [], few_rows.ExpertTables.of

    def counted(bank: ExpertBank) -> Any:
        made.append(bank)
        return of(bank)

    monkeypatch.setattr(few_rows.ExpertTables, "of", counted)
    model = moelab.build(MODEL).eval()
    for row, ids in enumerate(_tokens(model, 3, None)):
        assert _behind(model, [1 + row, 2, 3], ids) < 1e-4
    assert len(made) == (2 if way == TABLES and not making else 0)
    made.clear()
    _tokens(model, 3, False)
    assert len(made) == 2, "as constants say"


def test_a_run_does_not_go_by_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its samples are drawn alike wherever it goes on."""
    from moelab.config.run import EvaluationConfig
    from moelab.data.byte_tokenizer import ByteTokenizer
    from moelab.training.evaluate import sample_texts

    monkeypatch.setattr(thin_ways, "table_of", _unasked)
    model = moelab.build(dataclasses.replace(MODEL, vocab_size=512)).eval()
    assert sample_texts(model, ByteTokenizer(), EvaluationConfig(sample_tokens=70, prompts=["a"]), 0)
