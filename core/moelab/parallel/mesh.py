"""`parallel:` -> the meshes of a run. Every axis reads data of its own; they differ in what they hold of the model.

    replicate   ranks that hold the same
    shard       ranks among which parameters, gradients and optimizer state are cut (FSDP2)
    expert      of the shard axis, those among which whole experts are dealt out; the rest of it cuts what each got

The world is replicate x shard; expert divides shard. Two meshes over the same ranks: (replicate, shard) for all that
every token passes through, (replicate, eshard, expert) with eshard = shard / expert for routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moelab.config.run import ParallelConfig
from moelab.errors import ConfigError


@dataclass(frozen=True)
class Meshes:
    """Where dense parts and where experts lie."""

    dense: DeviceMesh  # (replicate, shard)
    sparse: DeviceMesh  # (replicate, eshard, expert)

    @property
    def expert(self) -> DeviceMesh:
        return self.sparse["expert"]

    @property
    def bank(self) -> DeviceMesh:
        """Over which the experts that a rank owns are cut further."""
        return self.sparse["replicate", "eshard"]


def check_world(config: ParallelConfig, world: int) -> None:
    """Raise ConfigError where another number of processes runs than the config lays out."""
    if config.world != world:
        raise ConfigError(
            f"parallel: replicate {config.replicate} x shard {config.shard} is {config.world}, and {world} "
            f"process{'es run' if world > 1 else ' runs'}; start it with torchrun --nproc-per-node {config.world} -m "
            "moelab train ..., or change one of the two"
        )


def make_meshes(config: ParallelConfig, world: int, device: str) -> Meshes:
    """Raises ConfigError where the axes don't multiply to the world."""
    config.check()
    check_world(config, world)
    eshard = config.shard // config.expert
    return Meshes(
        init_device_mesh(device, (config.replicate, config.shard), mesh_dim_names=("replicate", "shard")),
        init_device_mesh(
            device, (config.replicate, eshard, config.expert), mesh_dim_names=("replicate", "eshard", "expert")
        ),
    )
