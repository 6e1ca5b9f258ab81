"""recorder.safetensors: what the flight recorder saw, one file in the run folder; docs/metrics.md lists its arrays."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from moelab.atomic import write_file
from moelab.errors import UserError
from moelab.safe_files import Reading, read_arrays

logger = logging.getLogger("moelab")
FILE = "recorder.safetensors"
MOST_LOOKS = 16  # that are kept: when they are more, every second goes, but not the first and the last


@dataclass
class Looks:
    """The maps of the probe at the looks that are kept, packed to bits."""

    steps: list[int] = field(default_factory=list)
    token_id: NDArray[np.int64] | None = None  # [T]
    domain_id: NDArray[np.int64] | None = None  # [T]
    maps: dict[int, list[NDArray[np.uint8]]] = field(default_factory=dict)  # layer -> [T, ceil(E / 8)] each
    experts: dict[int, int] = field(default_factory=dict)  # layer -> E

    def add(self, step: int, maps: dict[int, NDArray[np.bool_]]) -> None:
        """One look: {layer: [T, E] bool}. The same step again replaces it."""
        self.drop_after(step - 1)
        self.steps.append(step)
        for layer, found in maps.items():
            self.experts[layer] = found.shape[-1]
            self.maps.setdefault(layer, []).append(np.packbits(found, axis=-1))
        if len(self.steps) > MOST_LOOKS:
            self._keep([i for i in range(len(self.steps)) if i % 2 == 0 or i == len(self.steps) - 1])

    def map(self, layer: int, look: int) -> NDArray[np.bool_]:
        """[T, E] bool of one look; -1 is the newest."""
        unpacked = np.unpackbits(self.maps[layer][look], axis=-1, count=self.experts[layer])
        return unpacked.astype(bool)

    def drop_after(self, step: int) -> None:
        """Forget what a run saw beyond the checkpoint that it goes on from."""
        self._keep([i for i, known in enumerate(self.steps) if known <= step])

    def _keep(self, indices: list[int]) -> None:
        self.steps = [self.steps[i] for i in indices]
        self.maps = {layer: [found[i] for i in indices] for layer, found in self.maps.items()}


def write(run_dir: Path, looks: Looks, domains: list[str], matrices: dict[str, NDArray[np.generic]]) -> None:
    """Whole or not at all. `matrices`: what was derived from the newest look, by name."""
    assert looks.token_id is not None
    assert looks.domain_id is not None
    tensors = {"steps": np.array(looks.steps, np.int64), "token_id": looks.token_id, "domain_id": looks.domain_id}
    tensors |= {f"layer_{layer:02d}/activated": np.stack(found) for layer, found in looks.maps.items()}
    about = {"format": "moelab recorder 1", "domains": json.dumps(domains), "experts": json.dumps(looks.experts)}
    write_file(run_dir / FILE, save({**tensors, **matrices}, about))


def read(run_dir: Path, step: int) -> Looks:
    """The looks up to `step`, of a run that goes on; none, and a warning, where the file is not what `write` leaves."""
    path = run_dir / FILE
    if not path.exists():
        return Looks()
    try:
        looks = _unpack(read_arrays(path, Reading()))
    except (UserError, KeyError, ValueError, TypeError) as error:
        logger.warning("%s: can't be read (%s); the recorder begins again from here", path, error)
        return Looks()
    looks.drop_after(step)
    return looks


def _unpack(tensors: dict[str, NDArray[np.generic]]) -> Looks:
    """Raises KeyError or ValueError for arrays that don't fit together."""
    token_id, domain_id = tensors["token_id"].astype(np.int64), tensors["domain_id"].astype(np.int64)
    looks = Looks([int(known) for known in tensors["steps"].astype(np.int64).reshape(-1)], token_id, domain_id)
    for name, found in tensors.items():
        if not name.endswith("/activated"):
            continue
        if found.dtype != np.uint8 or found.ndim != 3 or found.shape[:2] != (len(looks.steps), len(token_id)):
            raise ValueError(f"{name} is {found.dtype} of shape {found.shape}")
        layer = int(name.removeprefix("layer_").removesuffix("/activated"))
        looks.maps[layer], looks.experts[layer] = list(found.astype(np.uint8)), 8 * found.shape[-1]
    return looks
