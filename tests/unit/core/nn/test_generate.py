"""Generation over the cache: what a whole forward pass says, in any company, and as transformers generates."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
import torch

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.errors import CheckpointError, ConfigError
from moelab.moe import thin_product
from moelab.nn.generate import generate, generate_batch
from moelab.nn.norm import RMSNorm
from moelab.nn.plain_attention import PRODUCTS, HeldHeads, Norm, Turn
from moelab.nn.rope import Rope, rotate
from moelab.nn.sampling import Sampling
from moelab.nn.texts import Speech, continue_texts
from moelab.nn.transformer import Transformer

LAYOUT = {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MOE = MoEConfig(layout=LAYOUT)
MODEL = ModelConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, moe=MOE,
)  # fmt: skip
RAGGED = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13], [3, 2, 1, 0]]


def _build(**changes: Any) -> Transformer:
    return moelab.build(dataclasses.replace(MODEL, **changes)).eval()


def _tokens(**settings: Any) -> list[int]:
    return list(generate(moelab.build(MODEL), [1, 2, 3], Sampling(**settings)))


def _behind(model: Transformer, prompt: list[int], found: list[int]) -> float:
    """How far the scores of the tokens found are behind the best of one whole forward pass, at worst."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *found]])).logits[0, len(prompt) - 1 : -1]
    assert logits.std() > 0.3
    return float((logits.amax(-1) - logits[range(len(found)), found]).max())


def test_a_prompt_with_a_seed_of_its_own_goes_on_the_same_in_any_place_of_any_company() -> None:
    model, sampling = _build(), Sampling(8, temperature=1.0, seed=3)
    seeds = [11, 12, 13, 14, 15]
    whole = [one.ids for one in generate_batch(model, RAGGED, sampling, seeds=seeds)]
    back = generate_batch(model, RAGGED[::-1], sampling, seeds=seeds[::-1])[::-1]
    assert [one.ids for one in back] == whole
    assert generate_batch(model, [RAGGED[3]], sampling, seeds=[14])[0].ids == whole[3]
    assert generate_batch(model, [RAGGED[3]], sampling, seeds=[15])[0].ids != whole[3]


# One for each router; those that look ahead while training don't in evaluation. Capacity in evaluation: one by one.
ROUTERS: list[dict[str, Any]] = [
    {"name": "softmax_topk"},
    {"name": "softmax_topk", "norm_topk_prob": True, "gate": "cosine", "cosine_size": 8},
    {"name": "sigmoid_topk", "weights_on": "input"},
    {"name": "sqrtsoftplus_topk"},
    {"name": "gshard"},
    {"name": "noisy_topk"},
    {"name": "sinkhorn"},
    {"name": "hash"},
    {"name": "top_p", "top_p": 0.6},
    {"name": "remoe"},
    {"name": "null_experts", "num_null_experts": 2, "null_output": "copy"},
    {"name": "moe_plus_plus"},
    {"name": "expert_choice"},
    {"name": "expert_threshold"},
    {"name": "mixture_of_depths"},
    {"name": "token_rounding"},
    {"name": "forced_random"},
    {"name": "forced_round_robin"},
]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: "-".join(map(str, router.values())))
def test_texts_of_a_batch_are_what_each_is_alone(router: dict[str, Any]) -> None:
    """Prompts of unlike lengths, within 1e-4 of scores that spread over several units: batches round differently."""
    model = _build(moe=dataclasses.replace(MOE, router=router, allow_noncausal=True))
    found = generate_batch(model, RAGGED, Sampling(6, temperature=0.0))
    assert [(one.prompt, len(one.ids)) for one in found] == [(number, 6) for number in range(5)]
    for one in found:
        assert _behind(model, RAGGED[one.prompt], one.ids) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": {"name": "dual_chunk", "preset": None, "chunk": 8, "local": 4, "max_position": 12}},
        {"attention": {"name": "sliding_window", "window": 4}},
        {"use_qk_norm": True, "qkv_bias": False, "head_dim": 10},
        {"attention_sinks": True, "o_bias": True},
        {"o_bias": True, "moe": None},
        {"attention_sinks": True, "attention": {"name": "sliding_window", "window": 4, "layers": "0"}},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"rope_scaling": {"name": "dynamic", "factor": 2.0}, "max_position_embeddings": 64},
        {"moe": None},
    ],
    ids=str,
)
def test_other_attention_and_positions_go_on_as_they_read(changes: dict[str, Any]) -> None:
    model = _build(**changes)
    for one in generate_batch(model, RAGGED, Sampling(12, temperature=0.0)):
        assert _behind(model, RAGGED[one.prompt], one.ids) < 1e-4


def test_a_router_that_looks_at_others_makes_texts_one_by_one_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    router = {"name": "softmax_topk", "eval_capacity_factor": 1.0}
    model = _build(moe=dataclasses.replace(MOE, router=router, allow_noncausal=True))
    with caplog.at_level(logging.WARNING, "moelab"):
        found = generate_batch(model, RAGGED, Sampling(5, temperature=0.0))
    assert "one text at a time: router 'softmax_topk'" in caplog.text
    for one in found:
        assert one.ids == list(generate(model, RAGGED[one.prompt], Sampling(5, temperature=0.0)))


def test_drawn_texts_hang_on_neither_batch_nor_neighbours() -> None:
    """In float64, where no rounding of a batch is near a random number's edge."""
    model = _build().double()
    sampling = Sampling(9, temperature=1.3, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=3)
    whole = [one.ids for one in generate_batch(model, RAGGED, sampling, samples=3)]
    assert len({tuple(ids) for ids in whole}) > 12
    for size in (1, 2, 7):
        assert [one.ids for one in generate_batch(model, RAGGED, sampling, samples=3, batch_size=size)] == whole
    assert [one.ids for one in generate_batch(model, RAGGED[:2], sampling)] == [whole[0], whole[3]]
    longer = generate_batch(model, RAGGED, dataclasses.replace(sampling, max_new_tokens=14), samples=3)
    assert [one.ids[:9] for one in longer] == whole
    assert list(generate(model, RAGGED[0], sampling)) == whole[0]


def test_greedy_texts_are_those_of_transformers() -> None:
    """Qwen2-MoE with our weights, padded on the left; with its repetition penalty too."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    from moelab.hf.names import pieces

    gated = {"name": "gated", "intermediate_size": 24}
    model = _build(moe=dataclasses.replace(MOE, shared_expert=gated))
    config = Qwen2MoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=24, norm_topk_prob=False, rope_theta=1e6, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = Qwen2MoeForCausalLM(config).eval()
    state = theirs.state_dict()
    fused = any(name.endswith("experts.gate_up_proj") for name in state)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            for piece in pieces(name, tuple(tensor.shape), fused=fused):
                state[piece.name].copy_(piece.view(tensor))
    ids = torch.tensor([[0] * (7 - len(prompt)) + prompt for prompt in RAGGED])
    mask = torch.arange(7) >= torch.tensor([[7 - len(prompt)] for prompt in RAGGED])
    for penalty in (1.0, 1.5):
        given = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "repetition_penalty": penalty}
        expected = theirs.generate(ids, attention_mask=mask.long(), eos_token_id=7, **given)[:, 7:].tolist()
        sampling = Sampling(20, temperature=0.0, end_token_ids=(7,), repetition_penalty=penalty)
        for one, row in zip(generate_batch(model, RAGGED, sampling), expected, strict=True):
            ended = row.index(7) + 1 if 7 in row else 20
            assert one.ids == row[:ended]


def test_greedy_takes_the_likeliest_token_of_a_full_forward_pass() -> None:
    model = moelab.build(MODEL)
    assert _behind(model, [1, 2, 3], _tokens(max_new_tokens=10, temperature=0.0)) < 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_long_texts_are_made_with_copies_of_the_weights_and_are_the_same(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experts' from 128 tokens on, of 5 texts together; the others' from 32 of a text on, and gone afterwards."""
    monkeypatch.setattr(thin_product, "reads_matrices_faster", lambda: True)
    monkeypatch.setattr(thin_product, "LEAST_ELEMENTS", 1)
    model, packs = _build(tie_word_embeddings=tied), []
    kept = thin_product.PackedWeights.__init__

    def keeping(self: Any, weights: Any, *rest: int) -> None:
        packs.append(len(list(weights)))
        kept(self, weights, *rest)

    monkeypatch.setattr(thin_product.PackedWeights, "__init__", keeping)
    for one in generate_batch(model, RAGGED, Sampling(33, temperature=0.0)):
        assert _behind(model, RAGGED[one.prompt], one.ids) < 1e-4
    assert packs == [2 * 2 + 1], "query, key and value of each layer as one, output, and the head"
    with torch.no_grad():
        assert not thin_product.is_packed(model.lm_head.weight)


def test_narrow_weights_and_hooked_layers_are_generated_from_too() -> None:
    """What can't be computed part by part goes through the model's own forward pass."""
    narrow = _build().to(torch.bfloat16)
    assert all(len(one.ids) == 4 for one in generate_batch(narrow, RAGGED, Sampling(4)))
    model, calls = _build(), []
    plain = generate_batch(model, RAGGED, Sampling(8, temperature=0.0))
    model.layers[0].register_forward_hook(lambda *call: calls.append(1))
    hooked = generate_batch(model, RAGGED, Sampling(8, temperature=0.0))
    assert len(calls) == 8
    for one in (*plain, *hooked):
        assert _behind(model, RAGGED[one.prompt], one.ids) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_of_generation_are_those_of_the_layers(dtype: torch.dtype) -> None:
    """Of rows of zeros too, which the number under the root keeps finite; a hook on a norm is called."""
    norm, x = RMSNorm(24, 1e-6).to(dtype), torch.randn(5, 24, dtype=dtype)
    x[1], x[2] = 0, x[2] * 1e-5
    with torch.no_grad():
        norm.weight.normal_()
        expected = norm.weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(Norm(norm)(x).double(), expected, rtol=1e-5, atol=1e-7)
        norm.register_forward_hook(lambda *call: torch.ones(1))
        assert torch.equal(Norm(norm)(x), torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch", [1, PRODUCTS])
def test_heads_of_few_and_of_many_texts_are_those_of_the_formula(batch: int, padded: bool, dtype: torch.dtype) -> None:
    """What prompts left and what is written behind them; rows taken again, in another order."""
    groups, each, prompt, size, room = 2, 3, 9, 8, 14
    rope, order = Rope(size, 100.0), torch.arange(size).view(2, -1).t().flatten()
    keys, values = (torch.randn(batch, groups, room, size, dtype=dtype) for _ in range(2))
    cos, sin = rope.tables(torch.arange(room)[None], dtype)
    turned, turn = rotate(keys, cos, sin), Turn.of(rope, torch.arange(room), dtype, room)
    with torch.inference_mode():
        held = HeldHeads.of_prompts(turned[:, :, :prompt], values[:, :, :prompt], order, room)
        taken = torch.arange(batch).flip(0)
        held, keys, values, turned = (x.take_rows(taken) if isinstance(x, HeldHeads) else x[taken]
                                      for x in (held, keys, values, turned))  # fmt: skip
        for position in range(prompt, prompt + 2):
            stored = torch.stack([keys[:, :, position, order], values[:, :, position]], 1)
            held.write(torch.view_as_complex(stored.view(batch, 2, groups, -1, 2)), turn.at(position).stored, position)
        query, length = torch.randn(batch, groups * each, size, dtype=dtype), prompt + 2
        hidden = torch.zeros(batch, 1, 1, length, dtype=dtype)
        if padded:
            hidden[0, ..., :4] = float("-inf")
        paired = torch.view_as_complex(query[..., order].contiguous().view(*query.shape[:2], -1, 2))
        ready = torch.view_as_real(paired * turn.at(length - 1).query)
        found = held.attended(ready, length, hidden if padded else None)
    exact = rotate(query.unsqueeze(2), cos[:, :, length - 1 : length], sin[:, :, length - 1 : length]).double()
    grouped = exact.view(batch, groups, each, size)
    scores = torch.einsum("bgqd,bgld->bgql", grouped, turned[:, :, :length].double()) / size**0.5 + hidden.double()
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    expected = torch.einsum("bgql,bgld->bgqd", weights, values[:, :, :length].double())
    fine = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.double(), expected.reshape(batch, -1), rtol=10 * fine, atol=fine)


@pytest.mark.parametrize("hooked", [False, True])
def test_routes_are_those_of_a_whole_forward_pass_of_each_text(hooked: bool) -> None:
    """Also of rows that go on when others have ended, and of samples that share the pass over their prompt."""
    model = _build(moe=dataclasses.replace(MOE, router={"name": "sigmoid_topk"}))
    if hooked:
        model.layers[0].register_forward_hook(lambda *given: None)
    ends = (generate_batch(model, RAGGED, Sampling(6, seed=3), samples=2)[0].ids[1],)
    found = generate_batch(model, RAGGED, Sampling(6, seed=3, end_token_ids=ends), samples=2, routes=True)
    assert {len(one.ids) for one in found} > {6}
    for one in found:
        text = [*RAGGED[one.prompt], *one.ids]
        with torch.no_grad():
            records = model(torch.tensor([text[:-1]])).records
        assert one.routes is not None and sorted(one.routes) == [record.layer_id for record in records]
        for record in records:
            whole = record.routing.expert.view(-1, 2)
            assert torch.equal(one.routes[record.layer_id].sort(-1).values, whole.sort(-1).values)


def test_routes_of_a_router_without_a_fixed_number_are_refused() -> None:
    model = _build(moe=dataclasses.replace(MOE, router={"name": "top_p"}))
    with pytest.raises(ConfigError, match="unlike numbers of experts"):
        generate_batch(model, [[1]], Sampling(2), routes=True)


def test_weights_that_change_between_calls_are_read_anew() -> None:
    """As between the steps of a trainer that samples."""
    model = _build()
    generate_batch(model, RAGGED, Sampling(2))
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight.mul_(-3)
    for one in generate_batch(model, RAGGED, Sampling(6, temperature=0.0)):
        assert _behind(model, RAGGED[one.prompt], one.ids) < 1e-4
    loss = model.train()(torch.tensor([[1, 2]]), targets=torch.tensor([[2, 3]])).token_loss
    assert loss is not None
    loss.sum().backward()


def test_the_same_seed_gives_the_same_text_and_another_another() -> None:
    first = _tokens(max_new_tokens=20, temperature=1.0, seed=1)
    assert first == _tokens(max_new_tokens=20, temperature=1.0, seed=1)
    assert first != _tokens(max_new_tokens=20, temperature=1.0, seed=2)


def test_a_tiny_nucleus_is_greedy() -> None:
    greedy = _tokens(max_new_tokens=8, temperature=0.0)
    assert _tokens(max_new_tokens=8, top_p=1e-6) == greedy
    assert _tokens(max_new_tokens=8, top_k=1) == greedy
    assert _tokens(max_new_tokens=8, min_p=1.0) == greedy
    assert _tokens(max_new_tokens=8, temperature=1e-300) == greedy


def test_it_stops_behind_the_end_token_and_the_others_go_on() -> None:
    model = _build()
    free = [one.ids for one in generate_batch(model, RAGGED, Sampling(12, temperature=0.0))]
    end = free[0][4]
    stopped = generate_batch(model, RAGGED, Sampling(12, temperature=0.0, end_token_ids=(end,)))
    for one, ids in zip(stopped, free, strict=True):
        cut = ids.index(end) + 1 if end in ids else 12
        assert one.ids == ids[:cut]
        assert one.ended == (end if end in ids else None)


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    model = moelab.build(MODEL).train()
    next(generate(model, [1], Sampling(max_new_tokens=2)))
    assert model.training
    list(generate(model, [1], Sampling(max_new_tokens=2)))
    assert model.training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: next(generate(model, [], Sampling())), "prompt: must hold at least one token"),
        (lambda model: generate_batch(model, [[1], []], Sampling()), "prompt 2: must hold at least one token"),
        (
            lambda model: generate_batch(model, [[1], [50]], Sampling()),
            r"prompt 2: holds ids in 50 \.\. 50, .* 50 rows",
        ),
        (
            lambda model: generate_batch(model, [[1]], Sampling(), samples=0),
            "samples and batch_size must be at least 1",
        ),
        (lambda model: generate_batch(model, [[1]], Sampling(stop=("x",))), "stop texts need a tokenizer"),
    ],
)
def test_prompts_without_sense_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(moelab.build(MODEL))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_weights_that_are_not_finite_are_named(temperature: float) -> None:
    model = moelab.build(MODEL)
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.o_proj\.weight: 1 of"):
        list(generate(model, [1, 2], Sampling(2, temperature=temperature)))


def test_a_text_beyond_the_models_reach_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = _build(max_position_embeddings=8)
    with caplog.at_level(logging.WARNING, "moelab"):
        generate_batch(model, [[1] * 6], Sampling(6))
    assert "9 tokens: the model reaches 8" in caplog.text


class Letters:
    """A tokenizer of letters whose every id decodes to something, also the one that ends a text."""

    vocab_size, eos_token_id = 50, 0

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(letter) - 97 for letter in text], np.int32)

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + number) for number in ids)


def test_a_text_ends_before_what_ends_it() -> None:
    letters: Any = Letters()
    model, greedy = moelab.build(MODEL), Sampling(12, temperature=0.0)
    found = list(generate(model, [1, 2, 3], greedy))
    end = found[5]
    text = letters.decode(found)

    def goes_on(ends: tuple[int, ...], **more: Any) -> str:
        speech = Speech(letters, ends)
        sampling = dataclasses.replace(greedy, end_token_ids=ends, **more)
        return continue_texts(model, ["bcd"], speech, sampling)[0][0]

    assert goes_on((end, 49)) == "bcd" + letters.decode(found[: found.index(end)])
    assert goes_on(()) == "bcd" + text
    stop = text[4:7]
    assert goes_on((), stop=("?", stop)) == "bcd" + text[: text.index(stop)]
