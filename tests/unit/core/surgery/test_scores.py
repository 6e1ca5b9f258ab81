"""What is measured of experts is what a loop over tokens and experts counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moelab.data.batches import ValidationBatches
from moelab.errors import DataError
from moelab.moe.block import MoEBlock
from moelab.moe.overrides import ByLayer, Remove
from moelab.moe.routing import LayerRecord
from moelab.moe.surgery import MEASURES
from moelab.nn.transformer import TokenContext, Transformer
from moelab.surgery.scores import from_trace, measure
from traced_models import PRECISION, make_model, make_stream, traced

ROUTERS = [{"name": "softmax_topk"}, {"name": "top_p", "top_p": 0.5}]


def _batches() -> ValidationBatches:
    return ValidationBatches(make_stream(), 11, 16, 4)


def _layer_inputs(model: Transformer, layer: int) -> tuple[torch.Tensor, list[LayerRecord]]:
    """What each token brings to the experts of a layer, and the layer's records."""
    block, seen, records = model.layers[layer].mlp, [], []
    assert isinstance(block, MoEBlock)

    def hear(module: torch.nn.Module, args: tuple[torch.Tensor, ...], result: tuple[torch.Tensor, LayerRecord]) -> None:
        seen.append(args[0])
        records.append(result[1])

    handle = block.register_forward_hook(hear)
    with torch.no_grad():
        for batch in _batches():
            model.hidden_states(batch.input_ids, tokens=TokenContext(batch.document_id, batch.domain_id))
    handle.remove()
    return torch.cat(seen), records


def _expert(model: Transformer, layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
    bank = model.layers[layer].mlp.experts
    gate, up = (x.double() @ bank.gate_up[expert].double().T).chunk(2, dim=-1)
    return ((torch.nn.functional.silu(gate) * up) @ bank.down[expert].double()).detach()


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: r["name"])
def test_one_pass_finds_what_loops_find(router: dict[str, object]) -> None:
    model = make_model(router)
    found = measure(model, _batches(), PRECISION, [0, 1], MEASURES)
    for layer in (0, 1):
        x, records = _layer_inputs(model, layer)
        load, saliency, together = np.zeros(8), np.zeros(8), np.zeros((8, 8))
        first = 0
        for record in records:
            routing = record.routing.compact()
            sets: dict[int, list[int]] = {}
            for token, expert, weight in zip(
                *(t.tolist() for t in (routing.token, routing.expert, routing.weight)), strict=True
            ):
                load[expert] += 1
                saliency[expert] += weight * float(_expert(model, layer, expert, x[first + token]).norm())
                sets.setdefault(token, []).append(expert)
            for chosen in sets.values():
                together[np.ix_(chosen, chosen)] += 1
            first += routing.num_tokens
        scores = found[layer]
        assert scores.tokens == first == len(x)
        assert scores.load.tolist() == load.tolist()
        assert np.array_equal(scores.together, together)
        np.testing.assert_allclose(scores.saliency, saliency / np.maximum(load, 1), rtol=1e-5)
        outputs = np.stack([_expert(model, layer, expert, x).mean(0).numpy() for expert in range(8)])
        np.testing.assert_allclose(scores.outputs, outputs, rtol=1e-4, atol=1e-6)


def test_a_knock_out_is_the_loss_without_the_expert_less_the_loss() -> None:
    model = make_model(ROUTERS[0])
    found = measure(model, _batches(), PRECISION, [1], {"knockout"})[1].knockout

    def loss(override: ByLayer | None) -> float:
        total, count = 0.0, 0
        for batch in _batches():
            with torch.no_grad():
                logits = model(
                    batch.input_ids, tokens=TokenContext(batch.document_id, routing_override=override)
                ).logits
            nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
            total, count = total + float(nats.double().sum()), count + nats.numel()
        return total / count

    for expert in (0, 5):
        wanted = loss(ByLayer({1: Remove(frozenset({expert}))})) - loss(None)
        assert found[expert] == pytest.approx(wanted, abs=1e-6)


def test_the_look_changes_nothing_and_a_trace_tells_the_same_loads() -> None:
    model, trace = traced(ROUTERS[0])
    measured = measure(model, _batches(), PRECISION, [0, 1], {"load", "together"})
    told = from_trace(trace, {0: 8, 1: 8})
    for layer in (0, 1):
        assert np.array_equal(measured[layer].load, told[layer].load)
        assert np.array_equal(measured[layer].together, told[layer].together)
    assert measured[0].saliency is None and measured[0].outputs is None
    with pytest.raises(DataError, match="layer 1 has 4 experts, and the trace has 8 experts there"):
        from_trace(trace, {1: 4})
    with pytest.raises(DataError, match="has no such layer"):
        from_trace(trace, {2: 8})
