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

from moelab.errors import ConfigError


@dataclass
class ParallelConfig:
    """How a run is laid over processes; their number is torchrun's."""

    replicate: int = 1  # groups of ranks that hold the same
    shard: int = 1  # ranks that share parameters, gradients and optimizer state
    expert: int = 1  # of them, ranks that share out the experts
    timeout: float = 600.0  # seconds that a rank waits for another one before the run ends

    @property
    def world(self) -> int:
        return self.replicate * self.shard

    def check(self) -> None:
        """Raise ConfigError for what can't be, naming the key."""
        for key in ("replicate", "shard", "expert"):
            if getattr(self, key) < 1:
                raise ConfigError(f"parallel.{key}: must be at least 1, not {getattr(self, key)}")
        if self.shard % self.expert:
            raise ConfigError(
                f"parallel.expert: {self.expert} does not divide parallel.shard {self.shard}, of which it is a part"
            )
        if self.timeout <= 0:
            raise ConfigError(f"parallel.timeout: must be positive, not {self.timeout}")


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


def make_meshes(config: ParallelConfig, world: int, device: str) -> Meshes:
    """Raises ConfigError where the axes don't multiply to the world."""
    config.check()
    if config.world != world:
        raise ConfigError(
            f"parallel: replicate {config.replicate} x shard {config.shard} is {config.world}, and {world} processes "
            f"run; start torchrun with --nproc-per-node {config.world}, or change one of the two"
        )
    eshard = config.shard // config.expert
    return Meshes(
        init_device_mesh(device, (config.replicate, config.shard), mesh_dim_names=("replicate", "shard")),
        init_device_mesh(
            device, (config.replicate, eshard, config.expert), mesh_dim_names=("replicate", "eshard", "expert")
        ),
    )
