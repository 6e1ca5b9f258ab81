"""The same steps on one process and on several: what a spawned process imports and runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import moelab
from moelab.builder import build_balance_losses
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import ParallelConfig
from moelab.data.batches import Batch
from moelab.errors import ConfigError
from moelab.nn.checkpointing import apply_activation_checkpointing
from moelab.nn.count import moe_blocks
from moelab.nn.transformer import TokenContext, Transformer
from moelab.parallel.group import Group
from moelab.parallel.mesh import make_meshes
from moelab.parallel.parallelise import parallelise
from moelab.parallel.ranks import ALONE, Ranks
from moelab.training.failure import NotFinite
from moelab.training.precision import Precision
from moelab.training.step import Observe, StepSettings, train_step

PRECISION = Precision(torch.device("cpu"), torch.float32)
STEPS = 3  # one before the look between two, one after it, and one that starts from what the second moved
GLOBAL = {"name": "load_balance", "weight": 0.5, "scope": "global"}
COMMUNICATION = {
    "name": "communication", "weight": 0.5, "num_devices": 4, "devices_per_token": 2, "scope": "global",
}  # fmt: skip
SEQUENCE = {"name": "load_balance", "weight": 0.5, "scope": "sequence"}

WEIGHTS = [{"name": "router_orthogonality", "weight": 0.1}, {"name": "expert_similarity", "weight": 0.3, "layers": "1"}]
# name -> (router, losses, more of the MoE)
MODELS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {
    "softmax_global": ({"name": "softmax_topk"}, [GLOBAL, {"name": "router_z", "weight": 0.1}], {}),
    "softmax_chunks": ({"name": "softmax_topk"}, [SEQUENCE], {"expert_chunk": 10}),
    "sigmoid_bias": ({"name": "sigmoid_topk"}, [], {}),
    "sigmoid_groups": ({"name": "sigmoid_topk", "n_group": 4, "topk_group": 2}, [GLOBAL], {}),
    "quantile": ({"name": "sigmoid_topk", "balance": "quantile"}, [{"name": "hf_load_balance", "weight": 0.5}], {}),
    "top_p": ({"name": "top_p"}, [SEQUENCE], {}),
    "remoe": ({"name": "remoe"}, [{"name": "remoe_l1", "weight": 0.01}], {}),
    "noisy": ({"name": "noisy_topk"}, [], {}),
    "hash": ({"name": "hash"}, [], {}),
    "weights": ({"name": "softmax_topk"}, WEIGHTS, {}),
    "expert_choice": ({"name": "expert_choice"}, [], {"allow_noncausal": True}),
    "steered": (
        {
            "name": "null_experts",
            "num_null_experts": 4,
            "null_output": "copy",
            "norm_topk_prob": False,
            "balance": "proportional",
            "target_experts": 1.2,
            "bias_update_rate": 0.1,
            "gate": "cosine",
        },
        [],
        {},
    ),
    "thresholds": ({"name": "expert_threshold", "gate_bias": True, "start": "orthogonal"}, [], {}),
    "pools": (
        {"name": "softmax_topk", "document_pool": {"smallest": 2, "largest": 5}, "weights_on": "input"},
        [COMMUNICATION, {"name": "expert_router_coupling", "weight": 0.1}],
        {"allow_noncausal": True},
    ),
    "latent": ({"name": "softmax_topk"}, [GLOBAL], {"moe_latent_size": 16, "moe_latent_norm": True}),
    "densemixer": ({"name": "softmax_topk"}, [], {"backend": {"name": "densemixer"}}),
}
# name -> (parallel, micro-batch size); the batch has 8 sequences
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "replicate2": ({"replicate": 2}, 2),
    "shard2": ({"shard": 2}, 4),
    "shard2_micro": ({"shard": 2}, 2),
    "shard2_kept": ({"shard": 2, "reshard_after_forward": False, "accumulate": "pieces"}, 2),
    "expert2": ({"shard": 2, "expert": 2}, 2),
    "expert4": ({"shard": 4, "expert": 4}, 2),
    "shard4": ({"shard": 4}, 1),
    "shard4_expert2": ({"shard": 4, "expert": 2}, 2),
    "shard4_expert2_kept": ({"shard": 4, "expert": 2, "reshard_after_forward": False}, 1),
    "replicate2_shard2": ({"replicate": 2, "shard": 2}, 2),
    "replicate2_expert2": ({"replicate": 2, "shard": 2, "expert": 2}, 1),
}


@functools.cache
def built_in() -> moelab.Registry:
    return moelab.Registry(entry_points=False)


def model_config(name: str) -> ModelConfig:
    router, losses, more = MODELS[name]
    moe = MoEConfig(
        layout={"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        router=router,
        shared_expert={"name": "gated", "intermediate_size": 24},
        balance_losses=losses,
        **more,
    )
    gpt_oss = {"activation": {"name": "clamped_swiglu"}, "mlp_bias": True, "attention_sinks": True, "o_bias": True}
    return ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True, moe=moe,
        **(gpt_oss if name == "latent" else {}),
    )  # fmt: skip


def batch_of(step: int) -> Batch:
    """8 sequences of 24, of which the last third of some is padding."""
    stream = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 64, (8, 25), generator=stream)
    lengths = torch.tensor([24, 24, 20, 24, 16, 24, 24, 22])
    mask = torch.arange(24) < lengths[:, None]
    same = torch.arange(8)[:, None].expand(8, 24).contiguous()
    targets = ids[:, 1:].masked_fill(~mask, -100)
    return Batch(ids[:, :-1].contiguous(), targets.contiguous(), same, torch.zeros_like(same), mask)


def steps(
    name: str, parallel: dict[str, Any] | None, micro: int, checkpointing: bool = False, dtype: str = "float32"
) -> dict[str, Any]:
    """A few steps of SGD; AdamW would hide a wrong scale and blow up rounding where the gradient is zero."""
    registry = built_in()
    config = model_config(name)
    model = moelab.build_model(config, registry, seed=1)
    losses = build_balance_losses(config, registry)
    if checkpointing:
        apply_activation_checkpointing(model)
    ranks: Ranks = ALONE
    if parallel is not None:
        mesh = ParallelConfig(**parallel)
        ranks = Group(config=mesh)
        meshes = make_meshes(mesh, ranks.size, "cpu")
        parallelise(model, meshes, losses, reshard_after_forward=mesh.reshard_after_forward)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    told = []
    for step in range(STEPS):
        if step == 1:
            _look(model, batch_of(step))
        settings = StepSettings(micro, 1.0, 0, Precision(torch.device("cpu"), getattr(torch, dtype)))
        found = train_step(
            model, optimizer, losses, batch_of(step), step, settings, observe=Observe(True, step == 0), ranks=ranks
        )
        report = found.statistics.reduce(ranks.sum)
        assert found.served is not None
        told.append(
            {
                "losses": {key: float(value) for key, value in found.losses.items()},
                "norm": float(found.grad_norm),
                "served": found.served.tolist(),
                "metrics": report.metrics,
                "routers": None if found.router_norms is None else found.router_norms.tolist(),
                "shares": {name: norms.tolist() for name, norms in found.gradient_norms.items()},
            }
        )
    weights = {key: _whole(value) for key, value in model.state_dict().items()}
    return {"steps": told, "weights": weights, "blocks": len(list(moe_blocks(model)))}


@torch.no_grad()
def _look(model: Transformer, batch: Batch) -> None:
    """As an evaluation between two steps does: what it leaves gathered must be no step's."""
    context = TokenContext(batch.document_id, batch.domain_id)
    model.eval()(batch.input_ids, batch.attention_mask, tokens=context, head=False)
    model.train()


def _whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone().contiguous()


def run_layouts(
    layouts: Mapping[str, Sequence[str]], folder: str, checkpointing: bool, dtype: str = "float32"
) -> dict[str, Any]:
    """On each rank: under every layout its models; rank 0 writes the weights."""
    results: dict[str, Any] = {}
    for layout, models in layouts.items():
        parallel, micro = LAYOUTS[layout]
        for name in models:
            found = steps(name, parallel, micro, checkpointing, dtype)
            weights = found.pop("weights")
            if torch.distributed.get_rank() == 0:
                save_file(_apart(weights), Path(folder) / f"{layout}-{name}.safetensors")
            results[f"{layout}-{name}"] = found
    return results


def several(asked: list[tuple[str, list[Any]]]) -> list[Any]:
    """What functions of this module find, one after the other on the same processes."""
    return [globals()[name](*arguments) for name, arguments in asked]


def _apart(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in weights.items()}


def poisoned_steps(parallel: dict[str, int]) -> list[str]:
    """What a step says of a NaN that rank 1 alone meets in layer 0: forward, and backward where layers stay whole."""
    backward = {**parallel, "reshard_after_forward": False}
    return [_poisoned_step(parallel, lambda y: y * float("nan")), _poisoned_step(backward, _with_bad_gradient)]


def _with_bad_gradient(y: torch.Tensor) -> torch.Tensor:
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * float("nan"))
    return y


def _poisoned_step(parallel: dict[str, Any], poison: Callable[[torch.Tensor], torch.Tensor]) -> str:
    registry = built_in()
    config = model_config("softmax_global")
    model, losses = moelab.build_model(config, registry, seed=1), build_balance_losses(config, registry)
    mesh = ParallelConfig(**parallel)
    ranks = Group(config=mesh)
    meshes = make_meshes(mesh, ranks.size, "cpu")
    parallelise(model, meshes, losses, reshard_after_forward=mesh.reshard_after_forward)
    if ranks.rank == 1:
        model.layers[0].self_attn.register_forward_hook(lambda module, inputs, y: poison(y))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    try:
        train_step(model, optimizer, losses, batch_of(0), 0, StepSettings(2, 1.0, 0, PRECISION), ranks=ranks)
    except NotFinite as error:
        return str(error)
    return "nothing was said"


def refusals() -> list[str]:
    """What is said of meshes and parts that can't be."""
    registry = built_in()
    config = model_config("softmax_global")
    assert config.moe is not None
    three = dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, layout=config.moe.layout | {"num_experts": 3})
    )
    stubborn = moelab.build_model(config, registry, seed=1)
    next(iter(moe_blocks(stubborn))).router.shardable = False
    size = Group().size
    mixed = dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, backend={"name": "densemixer"}, expert_chunk=10)
    )
    undealt = moelab.build_model(config, registry, seed=1)
    vars(next(iter(moe_blocks(undealt))).backend)["dealable"] = False
    tries: list[Callable[[], object]] = [
        lambda: parallelise(
            moelab.build_model(mixed, registry, seed=1), make_meshes(ParallelConfig(shard=2, expert=2), size, "cpu")
        ),
        lambda: parallelise(undealt, make_meshes(ParallelConfig(shard=2, expert=2), size, "cpu")),
        lambda: make_meshes(ParallelConfig(replicate=3), size, "cpu"),
        lambda: make_meshes(ParallelConfig(replicate=2, expert=2), size, "cpu"),
        lambda: parallelise(
            moelab.build_model(three, registry, seed=1), make_meshes(ParallelConfig(shard=2, expert=2), size, "cpu")
        ),
        lambda: parallelise(stubborn, make_meshes(ParallelConfig(shard=2), size, "cpu")),
    ]
    told = []
    for attempt in tries:
        try:
            attempt()
        except ConfigError as error:
            told.append(str(error))
    return told


def reductions(tries: list[tuple[int, str]]) -> list[int]:
    """Of one step of a model that needs no routing pass, for each (micro-batch size, way to accumulate)."""
    registry = built_in()
    config = model_config("softmax_chunks")
    found = []
    for micro, accumulate in tries:
        model, losses = moelab.build_model(config, registry, seed=1), build_balance_losses(config, registry)
        ranks = Group(config=ParallelConfig(shard=2, accumulate=accumulate))
        parallelise(model, make_meshes(ParallelConfig(shard=2), ranks.size, "cpu"), losses)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        counting = _Counting()
        with counting:
            train_step(model, optimizer, losses, batch_of(0), 0, StepSettings(micro, 1.0, 0, PRECISION), ranks=ranks)
        found.append(counting.names.count("c10d::alltoall_base_"))
    return found


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))
