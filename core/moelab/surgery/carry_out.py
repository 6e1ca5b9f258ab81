"""From plans to a run folder that `moelab train --resume` goes on with: one tensor in memory at a time.

What stays: every tensor of other layers and parts, the step, the tokens, the seconds, the schedule, the order of the
data (which follows from seed and step), the optimizer's moments. What goes: the loads of the layers that changed, the
best evaluation (which was another model's), and the files that observers had put in, which count experts by number.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial as bound
from pathlib import Path
from typing import Any

from moelab.across_versions import part_as_ever
from moelab.atomic import check_place, lock_beside, partial, put_in_place, sync
from moelab.builder import build_balance_losses, build_model
from moelab.checkpoint import CHECKPOINTS, CONFIG, MODEL, STATE, TRAINING, model_tensors
from moelab.config.adapters import KEY as ADAPTERS
from moelab.config.files import read_file
from moelab.config.interpolation import escape
from moelab.config.model import ModelConfig
from moelab.config.text import write_tree
from moelab.data.lineage import LINEAGE, converted, lineage_of
from moelab.data.seen import carried_record
from moelab.errors import CheckpointError, ConfigError, UserError
from moelab.hf.carried import tokenizer_side_files
from moelab.hookspecs import SURGERIES
from moelab.lock import hold_file
from moelab.manifest import MANIFEST, manifest_bytes, plain_entry
from moelab.origin import model_files, read_origin
from moelab.surgery.layout_change import with_layouts
from moelab.surgery.patient import Patient
from moelab.surgery.tensors import COUNT, LINEAR, SECOND, VALUES, LayerSurgery
from moelab.tensor_file import Made, write_tensors
from moelab.tensor_parts import Shape, Stored
from moelab.training.format import BEST_EVALUATION
from moelab.training.limits import check_disk
from moelab.training.summary import LOADS

logger = logging.getLogger("moelab")

OPTIMIZER, LOSSES = "optimizer/", "balance_losses/"
REPORT = "surgery.json"  # of the run folder: what was done, and what it cost


@dataclass(frozen=True)
class Operation:
    """Plans for some layers of a checkpoint, checked against the model that its new config builds."""

    patient: Patient
    layers: Mapping[int, LayerSurgery]
    model: ModelConfig  # after the surgery
    identity: Mapping[str, Any]  # name, options, layers, what it was decided by: goes into the lineage
    seed: int

    def tensors(self) -> dict[str, dict[str, Made]]:
        """{file: {tensor: how it is made}}."""
        weights = {name: self._weight(name, stored) for name, stored in self.patient.tensors.items()}
        kept = self.patient.training
        if self.patient.config.train.adapters:  # which are in the weights, and begin anew on what is made of these
            kept = {name: stored for name, stored in kept.items() if name.startswith(LOSSES)}
        training = {name: self._moment(name, stored) for name, stored in kept.items()}
        return {MODEL: weights, TRAINING: training}

    def _weight(self, name: str, stored: Stored) -> Made:
        place = self._place(name)
        if place is None:
            return Made(stored.shape, stored.dtype, stored.read)
        layer, own = place
        return Made(layer.shape(own, stored.shape), stored.dtype, bound(layer.make, own, VALUES, stored))

    def _moment(self, name: str, stored: Stored) -> Made:
        """Of what training.safetensors holds."""
        parameter, _, moment = name.removeprefix(OPTIMIZER).rpartition("/")
        place = self._place(parameter) if name.startswith(OPTIMIZER) else None
        if place is None or moment == COUNT:
            return Made(stored.shape, stored.dtype, stored.read)
        if moment not in (*LINEAR, SECOND):
            raise CheckpointError(
                f"{self.patient.folder / TRAINING}: holds '{name}', and surgery knows the state of AdamW and Muon "
                "alone; operate on a run that one of them trained, or on one of a single step (train.init_from)"
            )
        layer, own = place
        return Made(layer.shape(own, stored.shape), stored.dtype, bound(layer.make, own, moment, stored))

    def _place(self, name: str) -> tuple[LayerSurgery, str] | None:
        """(surgery, the tensor's name in its layer) of one that changes."""
        parts = name.split(".", 3)
        if len(parts) < 4 or parts[0] != "layers" or parts[2] != "mlp" or not parts[1].isdigit():
            return None
        layer = self.layers.get(int(parts[1]))
        return (layer, parts[3]) if layer is not None and layer.touches(parts[3]) else None


def prepare_operation(
    patient: Patient, layers: Mapping[int, LayerSurgery], identity: Mapping[str, Any], seed: int
) -> Operation:
    """Raises ConfigError where no config says the new layers, or where another tensor would have to change shape."""
    wanted = patient.layouts | {layer: one.plan.layout for layer, one in layers.items()}
    model = with_layouts(patient.config.model, wanted, patient.registry)
    operation = Operation(patient, layers, model, identity, seed)
    built = build_model(model, patient.registry, device="meta", seed=None)
    shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in model_tensors(built).items()}
    made = {name: one.shape for name, one in operation.tensors()[MODEL].items()}
    differing = sorted(name for name in shapes.keys() | made.keys() if shapes.get(name) != made.get(name))
    if differing:
        name = differing[0]
        raise ConfigError(
            f"{name}: would have to become {shapes.get(name)}, and the surgery leaves {made.get(name)}: it is no row "
            "of its experts; the part that owns it decides its shape by their number, so they can't be operated on"
        )
    if patient.config.train.adapters:
        logger.warning("%s: what they learned is operated on as part of the weights; new ones begin at zero", ADAPTERS)
    build_balance_losses(model, patient.registry)  # that each is still one of these layers
    return operation


@contextmanager
def room_for(output: Path) -> Iterator[Path]:
    """A folder beside `output`, held by this process, which is gone at the end unless it was put in place.

    Raises UserError where `output` holds something.
    """
    check_place(output)
    beside = partial(output)
    with hold_file(lock_beside(output), what=f"{output}:", otherwise="choose another folder"):
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
        except OSError as error:
            raise UserError(f"{output}: can't be written: {error.strerror}; choose another folder") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def write_run(operation: Operation, beside: Path, output: Path) -> Path:
    """The run folder in `beside`, as it will be in `output`; -> its checkpoint. CheckpointError for a full disk."""
    patient = operation.patient
    config = _config_text(operation, output).encode()
    checkpoint = beside / CHECKPOINTS / f"step_{patient.state['step']:08d}"
    checkpoint.mkdir(parents=True)
    tensors = operation.tensors()
    sizes = {file: sum(one.nbytes for one in found.values()) for file, found in tensors.items()}
    check_disk(checkpoint, sizes, then="operate again")
    entries = {}
    for file, found in tensors.items():
        entries[file] = write_tensors(checkpoint / file, found).entry()
        sync(checkpoint / file)
    small = {STATE: _state(operation), CONFIG: config, **_carried(operation)}
    listed = {name: plain_entry(content) for name, content in small.items()} | entries
    for name, content in {**small, MANIFEST: manifest_bytes(listed)}.items():
        (checkpoint / name).write_bytes(content)
        sync(checkpoint / name)
    (beside / CONFIG).write_bytes(config)
    return checkpoint


def finish(beside: Path, output: Path, report: Mapping[str, Any]) -> None:
    """Write what was done and what it cost, and put the whole folder in its place."""
    (beside / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for path in (beside / REPORT, beside / CONFIG, beside / CHECKPOINTS, beside):
        sync(path)
    put_in_place(beside, output)


def left_out(patient: Patient, run: Path) -> list[str]:
    """Files of the checkpoint that did not go along into that of `run`: what observers had put in."""
    kept = {path.name for path in (run / CHECKPOINTS).rglob("*")}
    return sorted(p.name for p in patient.folder.iterdir() if p.name not in kept and p.suffix != ".safetensors")


def _carried(operation: Operation) -> dict[str, bytes]:
    folder = operation.patient.folder
    tokenizer = read_origin(folder).own_tokenizer()
    files = tokenizer_side_files(folder) | model_files(folder, ids=True) | (tokenizer.files() if tokenizer else {})
    files |= carried_record([folder])
    return files | {LINEAGE: _lineage(operation).to_bytes()}


def _lineage(operation: Operation) -> Any:
    folder = operation.patient.folder
    part = part_as_ever(SURGERIES, copy.deepcopy(operation.identity["surgery"]), operation.patient.registry)
    identity = {**operation.identity, "surgery": part}
    return converted(identity, operation.seed, [lineage_of(folder, folder.name)])


def _state(operation: Operation) -> bytes:
    """state.json: the counters as they are, without what was the other model's."""
    state = dict(operation.patient.state)
    loads = state.get(LOADS) or {}
    state[LOADS] = {layer: load for layer, load in loads.items() if int(layer) not in operation.layers}
    state.pop(BEST_EVALUATION, None)
    state["counts"] = []
    state["lineage"] = _lineage(operation).to_json()
    return (json.dumps({**state, "manifest": MANIFEST}, indent=2) + "\n").encode()


def _config_text(operation: Operation, output: Path) -> str:
    """The checkpoint's own config, to the letter, but for the layouts, the folder and where the weights come from."""
    tree = read_file(operation.patient.folder / CONFIG, quick=True)
    moe, changed = tree["model"]["moe"], operation.model.moe
    assert changed is not None
    moe["layout"] = changed.layout
    moe["layers"] = {
        pattern: {key: part for key, part in parts.items() if key != "layout"}
        for pattern, parts in (moe.get("layers") or {}).items()
        if set(parts) != {"layout"}
    }
    tree |= {"run_dir": escape(str(output)), "resume": False}
    tree["train"] |= {"init_from": escape(str(operation.patient.folder)), "init_overrides": []}
    return write_tree(tree)
