"""A model as transformers' causal language model: what it computes, and which folders it comes from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moelab
from moelab.config.latent_attention import LatentAttentionConfig
from moelab.config.model import ModelConfig, MoEConfig
from moelab.errors import CheckpointError, ConfigError
from moelab.nn.transformer import Transformer

transformers = pytest.importorskip("transformers")
from parity.reference import DENSE, MOE, reference_model  # noqa: E402 (it imports transformers)

UNIFORM = {"name": "uniform", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTERS = ["softmax_topk", "sigmoid_topk", "null_experts", "hash", "top_p", "remoe"]
# fp32 in another order of sums; a wrong position or mask moves these logits by 0.1 and more.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def built(router: str | None = "softmax_topk", **fields: Any) -> Transformer:
    moe = None if router is None else MoEConfig(layout=dict(UNIFORM), router={"name": router})
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return moelab.build(ModelConfig(**sizes | heads | fields, moe=moe)).eval()


def some_ids(batch: int = 2, seq: int = 9) -> Tensor:
    return torch.randint(0, 61, (batch, seq), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=[DENSE, MOE], ids=["dense", "moe"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """transformers' own model, and ours of the same folder through the adapter."""
    folder = tmp_path_factory.mktemp("both") / "reference"
    reference = reference_model(request.param)
    reference.save_pretrained(folder)
    return reference, moelab.as_transformers(moelab.load(folder))


@pytest.mark.parametrize("router", [None, *ROUTERS])
@torch.no_grad()
def test_it_computes_what_the_model_does(router: str | None) -> None:
    model = built(router)
    expected = model(some_ids()).logits
    assert torch.equal(moelab.as_transformers(model)(some_ids()).logits, expected)


@torch.no_grad()
def test_padding_on_either_side_is_left_out_and_positions_follow_transformers(both: tuple[Any, Any]) -> None:
    ids = torch.arange(5, 17).reshape(2, 6)
    for mask in ([[0, 0, 1, 1, 1, 1], [1] * 6], [[1, 1, 1, 1, 0, 0], [1] * 6]):
        real = torch.tensor(mask)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        theirs, ours = (m(ids, attention_mask=real, position_ids=positions).logits for m in both)
        torch.testing.assert_close(ours[real.bool()], theirs[real.bool()], **CLOSE)


def test_loss_hidden_states_and_attentions_are_transformers_own(both: tuple[Any, Any]) -> None:
    ids = torch.arange(5, 17).reshape(2, 6)
    labels = ids.clone()
    labels[0, :3] = -100
    both[0].set_attn_implementation("eager")
    theirs, ours = (m(ids, labels=labels, output_hidden_states=True, output_attentions=True) for m in both)
    torch.testing.assert_close(ours.loss, theirs.loss, **CLOSE)
    for name in ("hidden_states", "attentions"):
        for mine, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(mine, other, **CLOSE)


@pytest.mark.parametrize(
    "said", [{}, {"num_items_in_batch": torch.tensor(7)}, {"shift_labels": torch.arange(12).reshape(2, 6)}]
)
def test_a_loss_has_the_gradients_of_transformers_own(both: tuple[Any, Any], said: dict[str, Any]) -> None:
    ids = torch.arange(5, 17).reshape(2, 6)
    adapted = both[1]
    found = []
    for hooked in (False, True):  # with a hook on the head it is transformers' function
        hook = adapted.model.lm_head.register_forward_hook(lambda *_: None) if hooked else None
        adapted.zero_grad()
        loss = adapted(ids, labels=ids, **said).loss
        loss.backward()
        found.append((loss.detach(), adapted.model.embed_tokens.weight.grad.clone()))
        if hook is not None:
            hook.remove()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(found[0][0], both[0](ids, labels=ids, **said).loss.detach(), **CLOSE)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_a_left_padded_batch_is_continued_as_transformers_does(both: tuple[Any, Any], how: dict[str, Any]) -> None:
    """Weights this strong leave no near-ties among so few steps; a wrong cache or position changes the text."""
    ids, mask = torch.arange(5, 17).reshape(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    theirs, ours = (m.generate(ids, **given | how) for m in both)
    assert ours.tolist() == theirs.tolist()


@torch.no_grad()
@pytest.mark.parametrize("router", ["softmax_topk", "hash", "top_p"])
def test_a_padded_sequence_gives_what_it_gives_alone(router: str) -> None:
    adapted = moelab.as_transformers(built(router))
    ids = some_ids(1, 5)
    alone = adapted(ids).logits
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1), torch.tensor([[0] * 3 + [1] * 5])
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])
    beside = adapted(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(beside, alone, **CLOSE)


@torch.no_grad()
def test_sequences_packed_into_one_row_do_not_see_each_other() -> None:
    adapted = moelab.as_transformers(built())
    first, second = some_ids(1, 4), some_ids(1, 9)[:, 4:]
    packed = adapted(torch.cat([first, second], 1), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])).logits
    torch.testing.assert_close(packed[:, :4], adapted(first).logits, **CLOSE)
    torch.testing.assert_close(packed[:, 4:], adapted(second).logits, **CLOSE)


def test_checkpointed_layers_give_the_same_gradients() -> None:
    """Also where a caller asks for the reentrant kind, which would cut the records off."""
    model = built()
    adapted = moelab.as_transformers(model).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            adapted.gradient_checkpointing_enable({"use_reentrant": True})
        adapted.zero_grad()
        adapted(some_ids(), labels=some_ids()).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert adapted.is_gradient_checkpointing
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("router", [None, "softmax_topk", "hash"])
@torch.no_grad()
def test_what_save_pretrained_writes_is_read_again_by_its_auto_class(router: str | None, tmp_path: Path) -> None:
    moelab.register_with_transformers()
    moelab.register_with_transformers()  # twice is once
    model = built(router, tie_word_embeddings=True)
    moelab.as_transformers(model).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"register_with_transformers.*`\.model` is moelab's"):
        moelab.load(tmp_path)  # any router has no format but transformers' own
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(some_ids()).logits, model(some_ids()).logits, **CLOSE)
    assert again.model.config == moelab.as_transformers(model).config.model_config()


LATENT = LatentAttentionConfig(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
ATTENTIONS: dict[str, dict[str, Any]] = {
    "latent": {"latent_attention": LATENT, "num_key_value_heads": 4, "qkv_bias": False},
    "sinks": {"attention_sinks": True, "o_bias": True},
}


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_what_is_read_again_gives_the_same_bits(attention: str, tmp_path: Path) -> None:
    """Products with one token took another order of sums where weights lay wherever their file had them."""
    moelab.register_with_transformers()
    adapted = moelab.as_transformers(built(**ATTENTIONS[attention]))
    adapted.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in again.named_parameters():
        assert parameter.data_ptr() % 64 == 0, name
    for ids in (some_ids(), some_ids(1, 1)):
        assert torch.equal(again(ids).logits, adapted(ids).logits)


STRETCHED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@torch.no_grad()
def test_no_field_of_a_model_is_lost_on_the_way(tmp_path: Path) -> None:
    """Llama's and Qwen3's ways too; `STORED` is made of the fields there are, so a new one can't be forgotten."""
    model = built(None, rope_scaling=STRETCHED, qkv_bias=False, use_qk_norm=True, head_dim=6, rms_norm_eps=1e-3)
    adapted = moelab.as_transformers(model)
    adapted.save_pretrained(tmp_path)
    again = type(adapted).from_pretrained(tmp_path)
    assert again.config.model_config() == model.config
    torch.testing.assert_close(again(some_ids(seq=80)).logits, model(some_ids(seq=80)).logits, **CLOSE)


def test_a_run_is_read_by_transformers_auto_class(tmp_path: Path) -> None:
    """A run folder and its checkpoint, though neither has a config.json."""
    moelab.register_with_transformers()
    found = moelab.train(
        "train/tiny_moe", f"run_dir={tmp_path / 'run'}", "train.steps=1", "model.num_hidden_layers=1",
        "data.source.max_bytes_per_domain=100000", "evaluation.sequences=1", "evaluation.sample_tokens=0",
        progress=False,
    )  # fmt: skip
    (checkpoint,) = (found.run_dir / "checkpoints").iterdir()
    for folder in (found.run_dir, checkpoint):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(model(some_ids()).logits, found.model(some_ids()).logits, **CLOSE)
        assert model.generation_config.eos_token_id is not None
        config = transformers.AutoConfig.from_pretrained(folder)
        assert config.architectures == ["MoelabForCausalLM"] and config.name_or_path == str(folder)
        assert model.config.name_or_path == str(folder)
        with pytest.raises(CheckpointError, match="max_memory"):
            transformers.AutoModelForCausalLM.from_pretrained(folder, max_memory={0: "1GB"})


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    adapted = moelab.as_transformers(built())
    adapted.config.save_pretrained(tmp_path)
    torch.save(adapted.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        type(adapted).from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="pickle"):
        type(adapted).from_pretrained(tmp_path, use_safetensors=False)


def test_a_config_of_a_stranger_is_typed_key_by_key() -> None:
    from moelab.adapter.causal_lm import MoelabConfig, MoelabForCausalLM

    for fields, key in (({"hidden_size": "wide"}, "hidden_size"), ({"moe": {"gate": {}}}, "gate")):
        with pytest.raises(ConfigError, match=key):
            MoelabForCausalLM(MoelabConfig(num_attention_heads=4, head_dim=8, **fields))


def test_embeddings_in_place_of_ids_are_refused_where_a_router_reads_ids() -> None:
    model = built("hash")
    embeddings = model.embed_tokens(some_ids())
    with pytest.raises(ConfigError, match="reads token ids"):
        moelab.as_transformers(model)(inputs_embeds=embeddings)
    with pytest.raises(ConfigError, match="a row for each"):
        moelab.as_transformers(model).resize_token_embeddings(70)
    plain = built()
    taken = moelab.as_transformers(plain)(inputs_embeds=plain.embed_tokens(some_ids())).logits
    assert torch.equal(taken, plain(some_ids()).logits)


def test_new_token_ids_get_rows_and_old_ones_keep_theirs() -> None:
    model = built(tie_word_embeddings=True)
    before = model.embed_tokens.weight.detach().clone()
    moelab.as_transformers(model).resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.embed_tokens.weight[:61], before)


def test_a_mask_of_another_length_is_named() -> None:
    adapted = moelab.as_transformers(built())
    with pytest.raises(ValueError, match="attention_mask"):
        adapted(some_ids(), attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="exactly one"):
        adapted()
    with pytest.raises(ValueError, match="past_key_values"):
        adapted(some_ids(), past_key_values=((torch.zeros(1), torch.zeros(1)),))


def test_wrapping_copies_nothing_and_can_be_done_again() -> None:
    model = built()
    weights = {name: p.data_ptr() for name, p in model.named_parameters()}
    for _ in range(2):
        adapted = moelab.as_transformers(model)
        assert {name: p.data_ptr() for name, p in adapted.model.named_parameters()} == weights
    assert adapted.get_input_embeddings() is model.embed_tokens
    assert isinstance(adapted.get_output_embeddings(), nn.Linear)
    assert adapted.to(torch.bfloat16)(some_ids()).logits.dtype == torch.bfloat16


def test_moelab_alone_imports_no_transformers() -> None:
    code = "import sys, moelab, moelab.loading, moelab.session; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
