"""Evaluation at length: what is asked for, what is filled in, and what is counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moelab
from moelab.config.latent_attention import LatentAttentionConfig
from moelab.config.model import ModelConfig
from moelab.config.run import RunConfig
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.corpus import TokenStream
from moelab.errors import ConfigError, DataError, UserError
from moelab.training.precision import choose_precision
from moelab_tools.lengths import board, kept
from moelab_tools.lengths.asked import AS_IT_IS, KNOWN, parse_lengths, read_ways, way_of
from moelab_tools.lengths.measure import Loads, Looked, at_lengths, moved, rehearse
from moelab_tools.passkey import make_trials, passkey_accuracy
from moelab_tools.positions import Positions

REGISTRY = moelab.Registry(entry_points=False)
TOKENIZER = ByteTokenizer()


def model() -> moelab.nn.transformer.Transformer:  # type: ignore[name-defined]
    config = ModelConfig(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096,
    )  # fmt: skip
    return moelab.build_model(config)


def test_lengths_are_multiples_or_tokens() -> None:
    assert parse_lengths("1x, 2x,0.5x,300", 64) == [64, 128, 32, 300]
    for wrong in ("x", "2y", "", "0x", "-1"):
        with pytest.raises(ConfigError, match=r"--length: '.*' is no length"):
            parse_lengths(wrong, 64)


def test_what_an_option_leaves_out_is_filled_in_and_told() -> None:
    """From the length that the run was trained on, not from max_position_embeddings."""
    net = model()
    told = Positions("dual_chunk", "yarn").apply(net, REGISTRY, 300, 128)
    assert told == [
        "--attention dual_chunk: original_max_position_embeddings 128",
        "--rope-scaling yarn: original_max_position_embeddings 128, factor 3",
    ]
    assert net.config.rope_scaling == {"name": "yarn", "original_max_position_embeddings": 128, "factor": 3}
    assert (
        Positions(None, "{name: yarn, factor: 8, original_max_position_embeddings: 64}").apply(net, REGISTRY, 300, 128)
        == []
    )
    with pytest.raises(ConfigError, match="no rope scaling 'yarm', did you mean 'yarn'"):
        Positions(None, "yarm").apply(net, REGISTRY, 300, 128)


def test_a_key_lies_at_its_depth_in_a_text_of_the_length() -> None:
    tokens = np.full(5000, ord("x"))
    stream = TokenStream(tokens, np.array([0, 5000]), np.zeros(1, np.int64), ["d"])
    trials = make_trials(stream, TOKENIZER, 400, 2)
    assert [trial.depth for trial in trials] == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
    assert len({trial.key for trial in trials}) > 5
    for trial in trials:
        text = TOKENIZER.decode(trial.prompt)
        assert len(trial.prompt) + len(trial.key) == 400
        assert text.count(trial.key) == 2
        assert text.endswith("The pass key is ")
        fillers = text.split("\n")[0].count("x"), text.count("x")
        assert fillers[0] == round(trial.depth * fillers[1])
    assert make_trials(stream, TOKENIZER, 400, 2) == trials
    with pytest.raises(DataError, match="--passkey: of 60 tokens the words that hide a key and ask for it take 104"):
        make_trials(stream, TOKENIZER, 60, 1)
    assert passkey_accuracy(model(), TOKENIZER, trials[:4]) == {"0": 0.0, "0.25": 0.0}


def test_what_moves_is_half_the_difference_of_shares() -> None:
    assert moved(torch.tensor([2, 2]), torch.tensor([7, 7])) == 0
    assert moved(torch.tensor([4, 0]), torch.tensor([0, 1])) == 1
    assert moved(torch.tensor([3, 1]), torch.tensor([1, 3])) == 0.5


def test_ways_are_read_by_name_and_what_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ways.yaml"
    path.write_text(
        "plain: {}\nyarn: {rope_scaling: yarn}\ndca: {attention: {name: dual_chunk, temperature: per_query}}\n"
    )
    ways = read_ways(str(path))
    assert [way.name for way in ways] == ["plain", "yarn", "dca"]
    assert ways[0].positions == Positions()
    told = ways[2].positions.apply(model(), REGISTRY, 300, 128)
    assert told == ["--attention dual_chunk: original_max_position_embeddings 128"]
    for text, wrong in (
        ("[yarn]", "must hold ways by name"), ("a/b: {}", "a way's name is of letters"),
        ("a: yarn", "must be {attention"),
        ("a: {rope: yarn}", "a.rope: unknown"), ("a: {attention: [1]}", "a.attention: must be a name"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConfigError, match=wrong):
            read_ways(str(path))
    assert [way.name for way in read_ways("all")] == list(KNOWN)
    assert way_of(Positions()).name == AS_IT_IS
    assert way_of(Positions("dual_chunk", "{name: yarn, factor: 4}")).name == "name-yarn-factor-4+dual_chunk"


def looked(tokens: int = 512, trained: int = 64) -> Looked:
    """A model of random weights that was trained on so many tokens, and text of two documents in a domain each."""
    ids = np.random.default_rng(0).integers(0, 250, 4000)
    stream = TokenStream(ids, np.array([0, 1500, 4000]), np.arange(2), ["first", "second"])
    corpus = SimpleNamespace(validation=stream, fingerprint="f", domains=["a", "b"])
    run = RunConfig(run_dir="unused")
    run.train.sequence_length = trained
    return Looked(model(), run, REGISTRY, corpus, choose_precision(run.train), tokens)  # type: ignore[arg-type]


def test_a_model_is_looked_at_in_each_way_and_then_what_it_was() -> None:
    given = looked()
    own, kernel = given.model.config, given.model.layers[0].self_attn.kernel
    short, long = at_lengths(given, way_of(Positions("sliding_window", "yarn")), "1x,4x")
    assert short.filled == [
        "--attention sliding_window: window 64", "--rope-scaling yarn: original_max_position_embeddings 64, factor 1",
    ]  # fmt: skip
    assert given.model.config is own
    assert type(given.model.layers[0].self_attn.kernel) is type(kernel)
    assert (short.length, short.tokens, short.beyond, long.length, long.tokens) == (64, 512, None, 256, 512)
    assert long.beyond is not None
    nats, tokens = (sum(pair[i] for pair in long.documents.values()) for i in (0, 1))
    assert tokens == 2 * (256 - 63), "targets with 64 to 256 tokens before them, of two windows"
    assert nats / tokens == pytest.approx(long.beyond)
    assert set(long.entropy) == {"0"}
    assert list(long.entropy["0"]) == list(long.positions)
    assert long.entropy["0"]["128-255"] <= np.log(64), "a window sees no more"


def test_beyond_begins_at_the_trained_length_whatever_it_is() -> None:
    """A length that is no power of two has a border of its own among the places."""
    given = looked(trained=48)
    short, long = at_lengths(given, way_of(Positions()), "1x,1.25x")
    assert (short.beyond, short.tokens, long.length) == (None, 480, 60)
    assert sum(tokens for _, tokens in long.documents.values()) == 8 * (60 - 47), "targets with 48 to 60 before them"
    assert list(long.positions)[-2:] == list(long.entropy["0"])[-2:] == ["32-47", "48-60"]
    assert long.beyond == pytest.approx(long.positions["48-60"])


def test_it_reads_the_domains_that_the_run_is_evaluated_on() -> None:
    given = looked()
    given.run.evaluation.domains = ["b"]
    (found,) = at_lengths(given, way_of(Positions()), "2x")
    assert list(found.documents) == ["second"]
    with pytest.raises(DataError, match=r"--length: 4000 tokens and a target more.*has 4000; ask for at most 3999"):
        at_lengths(given, way_of(Positions()), "1x,4000")


def test_a_way_that_can_not_be_is_refused_before_the_first_is_looked_at() -> None:
    given = looked()
    ways = [way_of(Positions()), way_of(Positions("{name: dual_chunk, chunk: 9999}"))]
    with pytest.raises(ConfigError, match="chunk 9999"):
        rehearse(given, ways, "1x,2x")
    assert given.model.config.attention is None, "left as it was"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (Positions("dual_chunkk"), "--attention: no attention 'dual_chunkk'"),
        (Positions("{name: sliding_window, windw: 4}"), "--attention, windw: 'sliding_window'"),
        (Positions("{name: sliding_window, window: 0}"), "--attention: 'sliding_window'"),
        (Positions(rope_scaling="yarnn"), "--rope-scaling: no rope scaling 'yarnn'"),
        (Positions("dual_chunkk", typed=False), "attention: no attention 'dual_chunkk'"),
    ],
)
def test_a_complaint_names_what_was_typed(asked: Positions, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        asked.apply(model(), REGISTRY, 128, 64)
    assert str(caught.value).startswith(told)


def test_of_all_known_ways_those_are_looked_at_that_a_model_can_take(caplog: pytest.LogCaptureFixture) -> None:
    """Latent attention turns a part of each head, which dual chunks don't."""
    sizes = LatentAttentionConfig(kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)
    net = moelab.build_model(replace(model().config, latent_attention=sizes, num_key_value_heads=2, qkv_bias=False))
    ways = rehearse(replace(looked(), model=net), read_ways("all"), "1x,2x")
    assert [way.name for way in ways] == [name for name in KNOWN if not name.startswith("dca")]
    assert "--ways: dca is left out: attention: 'dual_chunk' turns whole heads" in caplog.text


def test_loads_are_told_by_place() -> None:
    """One expert within the trained length, another beyond it."""
    loads = Loads(length=16, trained=4)
    routing = SimpleNamespace(token=torch.arange(32), expert=(torch.arange(32) % 16 >= 4).long(), num_experts=3)
    routing.compact = lambda: routing
    batch = SimpleNamespace(input_ids=torch.zeros(2, 16))
    loads.add(batch, [SimpleNamespace(layer_id=7, routing=routing)])  # type: ignore[arg-type, list-item]
    assert loads.within() == {"7": 0.0}
    assert loads.beyond() == {"7": 1.0}
    assert loads.by_place() == {"7": {"01": 0.0, "02-03": 0.0, "04-07": 0.75, "08-15": 1.0}}, (
        "target 4 is foretold by place 3"
    )
    assert loads.counts["7"].sum() == 32


def test_what_is_kept_is_read_again_beside_other_ways_of_the_same_text(tmp_path: Path) -> None:
    given = looked()
    found = at_lengths(given, way_of(Positions()), "1x,2x")
    first = kept.keep(tmp_path, given, {"plain": found})
    assert kept.read_kept(tmp_path / kept.FILE) == json.loads(json.dumps(first))
    assert list(kept.keep(tmp_path, given, {"yarn": found})["ways"]) == ["plain", "yarn"]
    assert list(kept.keep(tmp_path, replace(given, tokens=1024), {"dca": found})["ways"]) == ["dca"], "other text"
    content = json.loads((tmp_path / kept.FILE).read_text())
    for change, wrong in (
        ({"format_version": 9}, "format_version 9"), ({"trained": 0}, "trained"),
        ({"ways": {"a": [{"length": "x"}]}}, "length"), ({"ways": {}}, "ways"), ({"ways": {"a": []}}, "ways"),
        ({"ways": {"../../a": content["ways"]["dca"]}}, "no name of a way"),
        ({"ways": {"a": [content["ways"]["dca"][0] | {"positions": {"far": 1.0}}]}}, "a number of places"),
    ):  # fmt: skip
        (tmp_path / kept.FILE).write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=rf"lengths.json.*{wrong}.*delete it, and evaluate again"):
            kept.read_kept(tmp_path / kept.FILE)


def test_tensorboard_has_every_way_as_a_run_with_tokens_as_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = looked()
    found = at_lengths(given, way_of(Positions()), "1x,4x")
    content = kept.keep(tmp_path, given, {"plain": found})
    for _ in range(2):  # written again, it is there once
        board.write_board(tmp_path, content)
    events = EventAccumulator(str(tmp_path / "plain")).Reload()
    by_place = events.Scalars("length/loss_by_place")
    assert [one.step for one in by_place] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert [one.value for one in by_place] == pytest.approx(list(found[1].positions.values()))
    assert [one.step for one in events.Scalars("length/loss")] == [64, 256]
    assert [one.step for one in events.Scalars("length/loss_beyond")] == [256]
    assert "length/entropy_by_place/layer_0" in events.Tags()["scalars"]
    assert "custom_scalars__config__" in events.Tags()["tensors"], "drawn without smoothing"
