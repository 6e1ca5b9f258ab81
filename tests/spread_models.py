"""Models in pieces, saved and read on several processes: what a spawned process imports and runs."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import moelab
import moelab.manifest as manifest_module
import parallel_grid as grid
from moelab.builder import build_balance_losses, build_hollow
from moelab.checkpoint import MODEL, load_model_tensors
from moelab.config.model import ModelConfig
from moelab.config.run import OptimizerConfig, ParallelConfig
from moelab.errors import CheckpointError
from moelab.in_shares import in_shares
from moelab.integrity import newest_whole, verified
from moelab.loading import open_weights
from moelab.manifest import read_manifest
from moelab.moe.balance import NamedLoss
from moelab.nn.optimizing import OptimizerContext, trained_parameters
from moelab.nn.pieces import held, is_piece
from moelab.nn.transformer import Transformer
from moelab.parallel.filling import fill_hollow, make_room
from moelab.parallel.group import Group
from moelab.parallel.mesh import make_meshes
from moelab.parallel.parallelise import parallelise
from moelab.parallel.ranks import ALONE, Ranks
from moelab.stored_weights import StoredWeights
from moelab.training import writing
from moelab.training.checkpoint import TrainingState, own_tensors, restore_checkpoint, save_checkpoint
from moelab.training.optimizer import build_adamw, build_optimizer, optimizer_tensors
from moelab.training.step import StepSettings, train_step
from moelab.training.writing import Staging, Writing

CPU = torch.device("cpu")
NAME = "remoe"  # whose loss has a state of its own
OPTIMIZER = OptimizerConfig(lr=1e-2)
MESHES = {
    "expert2": {"shard": 4, "expert": 2},
    "expert4": {"shard": 4, "expert": 4},
    "replicas": {"replicate": 2, "shard": 2, "expert": 2},
    "shard": {"shard": 4},
}
GO_ON = {"expert2": ("expert2", "replicas", "shard"), "replicas": ("replicas", "expert4")}  # saved on: restored on
CONFIG = b"{}\n"


def config_of(name: str) -> ModelConfig:
    """What the grid has, and experts of unlike widths, which are cut to size after they are drawn."""
    if name != "unlike":
        return grid.model_config(name)
    config = grid.model_config("softmax_global")
    layout = {"name": "heterogeneous", "widths": [16, 8], "num_experts": 8, "num_experts_per_tok": 2}
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, layout=layout, balance_losses=[]))


def spread(name: str, mesh: str, seed: int = 1, stored: StoredWeights | None = None) -> Transformer:
    """A model in pieces over the four processes, as a run makes it."""
    config = config_of(name)
    model = build_hollow(config, moelab.Registry(entry_points=False), device=CPU, seed=seed)
    parallelise(model, make_meshes(ParallelConfig(**MESHES[mesh]), Group().size, "cpu"))
    fill_hollow(model, make_room(model, CPU), stored, config.initializer_range, seed)
    return model


def losses_of(name: str) -> list[NamedLoss]:
    return build_balance_losses(config_of(name), moelab.Registry(entry_points=False))


def trained(model: Transformer, training: TrainingState, steps: range, ranks: Ranks) -> None:
    settings = StepSettings(2, 1.0, 0, grid.PRECISION)
    for step in steps:
        train_step(model, training.optimizer, training.balance_losses, grid.batch_of(step), step, settings, ranks=ranks)


def digest(model: Transformer, training: TrainingState | None = None) -> dict[str, str]:
    """{tensor: SHA-256 of the whole of it}, of weights and, with a training state, moments."""
    tensors = dict(model.state_dict())
    if training is not None:
        tensors |= optimizer_tensors(model, training.optimizer)
    return {name: _hash(tensor) for name, tensor in tensors.items()}


def _hash(tensor: Tensor) -> str:
    whole: Any = tensor
    return hashlib.sha256((whole.full_tensor() if is_piece(tensor) else tensor).detach().numpy().tobytes()).hexdigest()


def fresh(mesh: str | None, seed: int) -> tuple[Transformer, TrainingState]:
    """A model of other numbers, alone (None) or in pieces, to restore into."""
    registry = moelab.Registry(entry_points=False)
    model = moelab.build_model(config_of(NAME), registry, seed=seed) if mesh is None else spread(NAME, mesh, seed)
    return model, TrainingState(build_adamw(model, OPTIMIZER), losses_of(NAME))


def saves(folder: str, hugging_face: str, alone: str) -> dict[str, Any]:
    """On each of four ranks; every entry must be the same on all of them."""
    ranks, found, root = Group(), {}, Path(folder)
    for name in ("softmax_global", "noisy", "sigmoid_bias", "unlike"):
        found[f"drawn {name}"] = digest(spread(name, "expert2"))
    stored = open_weights(Path(hugging_face))
    model = spread("softmax_global", "expert2", 5, stored)
    found["read from Hugging Face"] = digest(model)
    training = TrainingState(build_adamw(model, OPTIMIZER), [])
    save_checkpoint(root / "exported", model, training, {}, {"config.yaml": CONFIG}, ranks)
    model, training = fresh("expert2", 5)
    restore_checkpoint(Path(alone), model, training)
    found["read from one"] = digest(model, training)
    for mesh, others in GO_ON.items():
        model, training = fresh(mesh, 1)
        trained(model, training, range(2), ranks)
        save_checkpoint(root / mesh, model, training, {"step": 2}, {"config.yaml": CONFIG}, ranks)
        found[mesh] = digest(model, training)
        for other in others:
            twin, state = fresh(other, 7)
            restore_checkpoint(root / mesh, twin, state)
            found[f"{mesh} to {other}"] = digest(twin, state)
            if other == mesh:
                trained(twin, state, range(2, 4), ranks)
                found[f"{mesh} resumed"] = digest(twin, state)
        trained(model, training, range(2, 4), ranks)
        found[f"{mesh} went on"] = digest(model, training)
    found |= _in_the_background(root, model, training, ranks)
    return found


def _in_the_background(root: Path, model: Transformer, training: TrainingState, ranks: Group) -> dict[str, Any]:
    before, staging = digest(model), Staging()
    save = Writing(
        root / "behind", staging.copies(own_tensors(model, training, ranks)), {}, {"config.yaml": CONFIG}, ranks
    )
    save.start()
    with torch.no_grad():
        for parameter in model.parameters():
            held(parameter).zero_()
    save.finish()
    load_model_tensors(root / "behind", model)
    found: dict[str, Any] = {"behind": before, "behind read": digest(model)}

    unfinished = Writing(root / "killed", own_tensors(model, training, ranks), {}, {"config.yaml": CONFIG}, ranks)
    unfinished.write()  # and then the process is killed

    kept = writing.write_tensors
    if ranks.rank == 2:

        def full(path: Path, tensors: Any) -> Any:
            if MODEL.partition(".")[0] in path.name:
                raise OSError(28, "No space left on device", str(path))
            return kept(path, tensors)

        writing.write_tensors = full  # type: ignore[assignment]
    try:
        save_checkpoint(root / "full", model, training, {}, {"config.yaml": CONFIG}, ranks)
    except CheckpointError as error:
        found["full"] = str(error)
    finally:
        writing.write_tensors = kept  # type: ignore[assignment]
    return found


def alone_state(folder: Path) -> dict[str, str]:
    """One process trains two steps and saves."""
    model, training = fresh(None, 1)
    trained(model, training, range(2), ALONE)
    save_checkpoint(folder, model, training, {"step": 2}, {"config.yaml": CONFIG})
    return digest(model, training)


def bytes_of(folder: Path) -> int:
    """Of all that a checkpoint's manifest lists."""
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest.nbytes


def goes_on(run: str, port: int) -> dict[str, Any]:
    """What a process that torchrun started hears of a run's checkpoints, and how much of the second one it read."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {
        "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    read, hashing = [0], manifest_module.checksum_of_span

    def counted(descriptor: int, offset: int, nbytes: int) -> str:
        read[0] += nbytes * ("step_00000001" in os.readlink(f"/proc/self/fd/{descriptor}"))
        return hashing(descriptor, offset, nbytes)

    manifest_module.checksum_of_span = counted
    choice, once = newest_whole(Path(run), verify=in_shares(True)), read[0]
    try:
        verified(Path(run), verify=in_shares(True))
    except CheckpointError as error:
        return {"choice": repr(choice), "read": once, "refused": str(error)}
    raise AssertionError("was not refused")


def muon_steps(mesh: str | None) -> dict[str, list[float]]:
    """{parameter: some of its numbers} after three steps of Muon, alone (None) or in pieces."""
    registry, ranks = moelab.Registry(entry_points=False), ALONE if mesh is None else Group()
    config = grid.model_config("softmax_global")
    model = moelab.build_model(config, registry, seed=1) if mesh is None else spread("softmax_global", mesh)
    settings = OptimizerConfig({"name": "muon", "ns_dtype": "float32"}, lr=1e-2)
    context = OptimizerContext(trained_parameters(model, {}), settings, ranks.size)
    trained(model, TrainingState(build_optimizer(context, registry), []), range(3), ranks)
    found: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        tensor: Any = parameter
        found[name] = (tensor.full_tensor() if is_piece(tensor) else tensor).detach().flatten()[::7].tolist()
    return found
