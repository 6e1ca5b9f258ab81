"""`train.compile`: which parts become one graph each, that the numbers stay, and who is told of what doesn't.

The graphs are run by torch itself here, since a C++ compiler takes many seconds: benchmarks/compile.py has one.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from moelab import build
from moelab.builder import build_balance_losses
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import ParallelConfig, RunConfig
from moelab.errors import ConfigError
from moelab.hookspecs import ROUTERS, SHARED_EXPERTS
from moelab.moe.batch_statistics import BatchStatistics
from moelab.moe.routing import Routing, TokenInfo
from moelab.nn.transformer import TokenContext, Transformer
from moelab.registry import Registry
from moelab.training.compiled import MOST_GRAPHS, SWITCHES, Compiled, compile_parts
from moelab.training.trainer import train

REGISTRY = Registry(entry_points=False)
DRAWS = {"switch", "gshard", "noisy_topk", "forced_random"}  # noise of their own, from a generator that no graph holds
LAYOUT = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
TOP = {"switch": 1, "base": 1}


@pytest.fixture(autouse=True)
def _forget() -> None:
    torch._dynamo.reset()


def _as_it_is(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> torch.fx.GraphModule:
    return graph


def _config(depth: int = 1, **moe: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=depth, num_attention_heads=2,
        num_key_value_heads=1, moe=MoEConfig(**({"layout": dict(LAYOUT), "allow_noncausal": True} | moe)),
    )  # fmt: skip


def _forward(model: Transformer, length: int = 16) -> tuple[Tensor, Any]:
    ids = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(2)
    output = model(ids, targets=ids, tokens=TokenContext(generator=noise))
    assert output.token_loss is not None
    return output.token_loss.mean(), output.records


def _refused(run: Compiled, kind: str) -> set[str]:
    return {name.split("'")[1] for name in run.refused if name.startswith(kind)}


def test_every_built_in_router_is_one_graph_but_for_those_that_draw_noise(caplog: pytest.LogCaptureFixture) -> None:
    names = sorted(REGISTRY.components(ROUTERS))
    layers = {
        str(place): {
            "router": {"name": name} | ({"num_null_experts": 4} if name == "null_experts" else {}),
            "layout": LAYOUT | {"num_experts_per_tok": TOP.get(name, 2)},
        }
        for place, name in enumerate(names)
    }
    config = _config(len(names), layers=layers)
    plain, model = build(config, seed=0).train(), build(config, seed=0).train()
    run, _ = compile_parts(model, [], "cpu", _as_it_is)
    assert torch.equal(_forward(model)[0], _forward(plain)[0])
    assert _refused(run, "router") == DRAWS
    assert len(run.refused) == len(DRAWS)  # nothing else broke
    assert run.graphs == 1 + len(names) - len(DRAWS)  # all norms are one, and each router
    told = [line for line in caplog.messages if "breaks the graph" in line]
    assert len(told) == len(DRAWS)
    assert all("gate.py:" in line or "forced_random.py:" in line for line in told)


def test_built_in_balance_losses_are_one_graph_each() -> None:
    scopes = [{"name": "load_balance", "weight": 1.0, "scope": scope} for scope in ("global", "micro", "sequence")]
    names = ("hf_load_balance", "router_z", "importance", "entropy", "router_orthogonality", "expert_similarity")
    devices = {"name": "communication", "weight": 1.0, "num_devices": 4, "devices_per_token": 2}
    quiet = {"name": "expert_router_coupling", "weight": 1.0, "noise": False}
    terms = [*scopes, *({"name": name, "weight": 1.0} for name in names), devices, quiet]
    config = _config(2, balance_losses=terms)
    model, losses = build(config, seed=0).train(), build_balance_losses(config, REGISTRY)
    run, compiled = compile_parts(model, losses, "cpu", _as_it_is)
    _, records = _forward(model)
    statistics = BatchStatistics(losses)
    statistics.add(records)
    for plain, one in zip(losses, compiled, strict=True):
        context = statistics.context(plain)
        assert torch.equal(one(records, context), plain(records, context))
    assert run.refused == []


@pytest.mark.parametrize("shared", sorted(REGISTRY.components(SHARED_EXPERTS)))
def test_on_an_accelerator_attention_and_shared_experts_are_graphs_too(shared: str) -> None:
    options = {"gated": {"intermediate_size": 8}, "plain": {"intermediate_size": 8}}.get(shared, {})
    if shared == "several":
        options = {"num_experts": 2, "intermediate_size": 8}
    config = _config(1, shared_expert={"name": shared} | options)
    plain, model = build(config, seed=0).train(), build(config, seed=0).train()
    run, _ = compile_parts(model, [], "cuda", _as_it_is)
    assert torch.equal(_forward(model)[0], _forward(plain)[0])
    assert run.refused == []
    assert len(run.parts) == (3 if shared == "none" else 4)
    assert run.graphs == len(run.parts)


def test_layers_share_what_differs_in_weights_alone() -> None:
    config = _config(3)
    config.use_qk_norm = True
    plain, model = build(config, seed=0).train(), build(config, seed=0).train()
    run, _ = compile_parts(model, [], "cpu", _as_it_is)
    assert torch.equal(_forward(model)[0], _forward(plain)[0])
    assert len(run.parts) == 3 * 5 + 1
    assert run.line() == "train.compile: 16 parts in 4 graphs"  # the stream's norm, a query's, a key's, the router


class _Peeks(nn.Module):
    """A router that looks at a value, which no graph can."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        found: Routing = self.inner(x, info)
        return found if float(x.sum()) > 1e9 else self.inner(x, info)


def test_a_plugin_that_breaks_the_graph_is_named_once_with_its_line_and_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build(_config(2), seed=0).train()
    for layer in model.layers:
        layer.mlp.router = _Peeks(layer.mlp.router)
    expected = _forward(model)[0]
    run, _ = compile_parts(model, [], "cpu", _as_it_is)
    assert torch.equal(_forward(model)[0], expected)
    assert len(_refused(run, "router")) == 1
    (line,) = [message for message in caplog.messages if "breaks the graph" in message]
    assert "router 'softmax_topk'" in line
    assert "(test_compiled.py:" in line
    assert "eager: router" in run.line()


def test_new_shapes_are_counted_and_a_part_that_needs_too_many_graphs_is_eager_in_all_layers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain, model = build(_config(2), seed=0).train(), build(_config(2), seed=0).train()
    run, _ = compile_parts(model, [], "cpu", _as_it_is)
    for number in range(MOST_GRAPHS):
        for _ in range(2):
            assert torch.equal(_forward(model, 4 + number)[0], _forward(plain, 4 + number)[0])
            assert run.graphs == 2 * (number + 1)  # a norm and the router
    with torch.no_grad():
        _forward(model, 20)  # evaluation compiles nothing
    assert run.graphs == 2 * MOST_GRAPHS and not run.refused
    assert torch.equal(_forward(model, 20)[0], _forward(plain, 20)[0])
    assert run.graphs == 2 * MOST_GRAPHS and len(run.refused) == len(run.parts)
    told = [line for line in caplog.messages if line.startswith("train.compile: ")]
    assert len(told) == 2 and all(
        "is eager from here on: it would be compiled more than 8 times" in line for line in told
    )
    assert run.line().count("a norm") == 1


class _Waits(_Peeks):
    """A router that calls what torch's compiler warns of in four lines, and a place in Python's own code."""

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        logging.getLogger("test_compiled").debug("%s", threading.Event().is_set())
        found: Routing = self.inner(x, info)
        return found


def test_of_a_part_that_is_eager_one_line_is_told_with_a_place_in_its_own_code(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    model = build(_config(2), seed=0).train()
    for layer in model.layers:
        layer.mlp.router = _Waits(layer.mlp.router)
    run, _ = compile_parts(model, [], "cpu", _as_it_is)
    _forward(model)
    assert _refused(run, "router") == {"softmax_topk"}
    (line,) = [message for message in caplog.messages if "breaks the graph" in message]
    assert "(test_compiled.py:" in line
    assert not recwarn.list
    assert not logging.getLogger("torch._inductor.codecache").isEnabledFor(logging.WARNING)


class _Counts(_Peeks):
    """A router whose code reads what each call changes."""

    calls = 0

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        self.calls += 1
        found: Routing = self.inner(x * (1 + 0.01 * self.calls), info)
        return found


def test_a_plugin_that_would_be_compiled_at_every_step_is_bounded_and_counts_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = [build(_config(2), seed=0).train() for _ in range(2)]
    for model in models:
        for layer in model.layers:
            layer.mlp.router = _Counts(layer.mlp.router)
    run, _ = compile_parts(models[1], [], "cpu", _as_it_is)
    for _ in range(MOST_GRAPHS + 3):
        assert torch.equal(_forward(models[1])[0], _forward(models[0])[0])
    assert run.graphs == 1 + MOST_GRAPHS
    assert _refused(run, "router") == {"softmax_topk"}
    assert len([line for line in caplog.messages if "is eager from here on" in line]) == 1


def test_many_runs_of_one_process_are_compiled_as_the_first() -> None:
    for _ in range(9):  # torch.compile would stop at as many of one code, of all layers and runs together
        model = build(_config(1), seed=0).train()
        run, _ = compile_parts(model, [], "cpu", _as_it_is)
        _forward(model)
        assert run.line() == "train.compile: 4 parts in 2 graphs"


def test_a_backward_pass_that_cannot_be_compiled_is_found_before_it_is_needed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def forward_alone(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
        return aot_autograd(fw_compiler=_as_it_is, bw_compiler=_refuses_products)(graph, examples)

    models = [build(_config(1), seed=0).train() for _ in range(2)]
    run, _ = compile_parts(models[1], [], "cpu", forward_alone)
    for model in models:
        _forward(model)[0].backward()
    assert _refused(run, "router") == {"softmax_topk"}
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)
    (line,) = [line for line in caplog.messages if line.startswith("train.compile: ")]
    assert "router 'softmax_topk'" in line and "can't be compiled" in line


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _lacks(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
    raise FileNotFoundError("g++")


def test_a_run_is_the_same_compiled_and_goes_on_without_a_compiler(
    small_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small_run.model = copy.deepcopy(small_run.model)
    losses = [{"name": "load_balance", "weight": 0.01, "scope": "global"}]
    small_run.model.moe = MoEConfig(layout=dict(LAYOUT), balance_losses=losses)
    small_run.train.activation_checkpointing, small_run.evaluation.every = 1, 0
    found = []
    for name, compiler in (("plain", None), ("compiled", _as_it_is), ("without", _lacks)):
        torch._dynamo.reset()
        small_run.run_dir, small_run.train.compile = str(tmp_path / name), compiler is not None
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compiler)
        caplog.clear()
        with caplog.at_level(logging.INFO, "moelab"):
            found.append([row["train/loss"] for row in _rows(train(small_run)) if "train/loss" in row])
        told = [line for line in caplog.messages if line.startswith("train.compile:")]
        if name == "compiled":
            assert told == ["train.compile: 5 parts in 3 graphs"]
        if name == "without":
            assert len(told) == 2
            assert told[0].startswith("train.compile: there is no working compiler here (")
    plain, compiled, without = found
    assert plain == without
    # Forward the norms are eager's; backward they are torch's own passes there and one node here, which round apart.
    assert compiled[0] == plain[0] and compiled == pytest.approx(plain, rel=1e-4)


def _broken(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
    raise torch._inductor.exc.InductorError(IndexError("list index"), inspect.currentframe())  # as of a killed one


def _full(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
    raise OSError(28, "No space left on device")


def _refuses_products(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
    products = ("linear", "aten.mm")
    if any(node.op == "call_function" and any(p in str(node.target) for p in products) for node in graph.graph.nodes):
        _broken(graph, examples)
    return graph


@pytest.mark.parametrize("compiler", [_broken, _full])
def test_a_compiler_that_fails_at_everything_is_not_a_parts_fault(
    compiler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(_config(2), seed=0).train()
    expected = _forward(model)[0]
    run, _ = compile_parts(model, [], "cpu", compiler)
    assert torch.equal(_forward(model)[0], expected)
    (line,) = [message for message in caplog.messages if message.startswith("train.compile")]
    assert line.startswith("train.compile: there is no working compiler here (")
    assert run.line().startswith("train.compile: nothing is compiled (")


def test_a_compiler_that_fails_at_one_part_names_it_and_compiles_the_others(caplog: pytest.LogCaptureFixture) -> None:
    model = build(_config(1), seed=0).train()
    run, _ = compile_parts(model, [], "cpu", _refuses_products)
    _forward(model)
    assert _refused(run, "router") == {"softmax_topk"}
    assert run.graphs > 0
    assert "router 'softmax_topk'" in caplog.text


@pytest.mark.parametrize("switch", SWITCHES)
def test_where_the_environment_switches_torch_compile_off_a_run_goes_on_and_says_so(
    switch: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(switch, "1")
    model = build(_config(1), seed=0).train()
    expected = _forward(model)[0]
    run, _ = compile_parts(model, [], "cpu", _as_it_is)
    assert torch.equal(_forward(model)[0], expected)
    (line,) = [message for message in caplog.messages if message.startswith("train.compile")]
    assert line == f"train.compile: {switch}=1 in the environment switches torch.compile off: the run goes on without"
    assert run.line() == f"train.compile: nothing is compiled ({switch}=1 in the environment)"


def test_several_processes_are_refused(small_run: RunConfig) -> None:
    small_run.train.compile, small_run.parallel = True, ParallelConfig(shard=2)
    with pytest.raises(ConfigError, match=r"train\.compile: is for one process"):
        small_run.check()
