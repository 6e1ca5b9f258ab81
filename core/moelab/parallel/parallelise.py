"""The one door to FSDP2 and DTensor: a built model is laid over meshes, in place, and stays unaware.

Sums, never means: every term of a loss is divided by the global batch's tokens already, so gradients add over ranks.
FSDP's own default divides dense gradients by the dense mesh and experts' by their smaller one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from moelab.errors import ConfigError
from moelab.moe.balance import NamedLoss
from moelab.moe.block import MoEBlock
from moelab.nn.count import moe_blocks
from moelab.nn.transformer import Transformer
from moelab.parallel.exchange import ExchangeBackend, whole_experts
from moelab.parallel.mesh import Meshes
from moelab.parallel.reduce import SumOfPieces


def parallelise(
    model: Transformer, meshes: Meshes, losses: Sequence[NamedLoss] = (), *, reshard_after_forward: bool = True
) -> None:
    """Lay `model` over the meshes: experts to their owners, the rest cut by FSDP2, a layer a unit.

    Call it before the optimizer is built; all ranks with equal weights, or none yet (`parallel.filling`).
    `reshard_after_forward`: whether a layer is cut again between its passes; the run's `Group` must be told the same.
    Raises ConfigError for experts that don't divide, and for a part that declares `shardable = False`.
    """
    _refuse_unshardable(model, meshes, losses)
    cut = partial(_cut, reduce=SumOfPieces(), reshard=reshard_after_forward)
    # Records hold views of what routers return; nothing of moelab writes in place to what a layer returns.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    for block in moe_blocks(model):
        bank = block.experts
        if meshes.expert.size() > 1:
            for name, parameter in list(bank.named_parameters()):
                dealt = distribute_tensor(parameter.detach(), meshes.expert, [Shard(0)], src_data_rank=None)
                bank.register_parameter(name, nn.Parameter(dealt, requires_grad=parameter.requires_grad))
            block.dealt = partial(ExchangeBackend, mesh=meshes.expert)
            cut(bank, meshes.bank)  # a unit of its own only where its ranks are others than its layer's
        block.whole_experts = whole_experts
        block.shows_experts = any(
            getattr(named.loss, "needs_expert_weights", False)
            and (named.layers is None or block.layer_id in named.layers)
            for named in losses
        )
    for layer in model.layers:
        cut(layer, meshes.dense)
        if isinstance(layer.mlp, MoEBlock):
            units = [layer] if layer.mlp.dealt is None else [layer, layer.mlp.experts]
            layer.mlp.gathered = partial(_gathered, units)
    # What is gathered last in the forward pass comes first in the backward one.
    cut(model, meshes.dense, reshard=False)


@contextmanager
def _gathered(units: Sequence[Any]) -> Iterator[None]:
    """Outside of a forward pass; all ranks alike."""
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def _cut(module: nn.Module, mesh: DeviceMesh, *, reduce: SumOfPieces, reshard: bool) -> None:
    unit = fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)
    unit.set_reduce_scatter_unused_params(True)  # a router that no token of this rank reached
    if mesh.device_type == "cpu":
        unit.set_custom_reduce_scatter(cast(Any, reduce))  # its base class is private


def _refuse_unshardable(model: Transformer, meshes: Meshes, losses: Sequence[NamedLoss]) -> None:
    ranks = meshes.expert.size()
    for block in moe_blocks(model):
        if block.layout.num_experts % ranks:
            raise ConfigError(
                f"parallel.expert: {ranks} does not divide the {block.layout.num_experts} experts of layer "
                f"{block.layer_id}; take a number that divides those of all layers"
            )
        if ranks > 1 and not getattr(block.backend, "dealable", True):
            raise ConfigError(
                f"parallel.expert: {block.parts['backend'].title} can't have its experts on other processes: it needs "
                "more of a token than its row; take parallel.expert=1, with which parallel.shard cuts them too"
            )
        if ranks > 1 and block.chunk is not None and hasattr(block.backend, "around"):
            raise ConfigError(
                f"model.moe.expert_chunk: {block.parts['backend'].title} can't have its experts on other processes in "
                "chunks: it needs more of a token than they carry; leave it null, or take parallel.expert=1"
            )
        for part, built in block.plugin_parts():
            if not getattr(built, "shardable", True):
                raise ConfigError(f"parallel: {part.title} declares that it can't be laid over several processes")
    for named in losses:
        if not getattr(named.loss, "shardable", True):
            raise ConfigError(f"parallel: {named.part.title} declares that it can't be laid over several processes")
