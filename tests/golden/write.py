"""Writes every shipped config, fully resolved, beside this file: a default that changes shows in a review.

    python tests/golden/write.py [FOLDER]

A recipe of configs/moe is laid over configs/train/tiny_moe.yaml, a model of configs/model stands alone: of both the
`model` is written. Options of parts stand as they are built; no plugin but the built-in ones is looked at.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / folder) for folder in ("core", "plugins", "upcycling", "tools")]

from moelab import hookspecs  # noqa: E402  (after the path)
from moelab.config.files import file_layers  # noqa: E402
from moelab.config.load import load_config  # noqa: E402
from moelab.config.run import RunConfig  # noqa: E402
from moelab.config.upcycle import UpcycleConfig  # noqa: E402
from moelab.errors import ConfigError  # noqa: E402
from moelab.registry import Registry  # noqa: E402
from moelab.training.setup import resolve_run  # noqa: E402
from moelab_tools.curate.declaration import CurateConfig, stages  # noqa: E402
from moelab_tools.synthesis.declaration import CritiqueConfig  # noqa: E402

TRAIN_BASE = "configs/train/tiny_moe.yaml"
DECLARATION = "experiment.yaml"  # no config: what it declares stands in it, and its hash in its findings
LEFT_OPEN = {"run_dir": "RUN_DIR", "train.steps": "1", "source": "SOURCE", "output": "OUTPUT",
             "train.init_from": "WEIGHTS"}  # fmt: skip
RECIPE_AXES = {
    "experts": hookspecs.EXPERT_INITIALISERS,
    "shared": hookspecs.SHARED_INITIALISERS,
    "router": hookspecs.ROUTER_INITIALISERS,
    "scaling": hookspecs.OUTPUT_SCALINGS,
}
MODEL_PARTS = {
    "layout": hookspecs.EXPERT_LAYOUTS,
    "router": hookspecs.ROUTERS,
    "shared_expert": hookspecs.SHARED_EXPERTS,
}


def golden_texts() -> dict[str, str]:
    """{path below tests/golden: text} of every config; paths in it count from the repository's root."""
    registry = Registry(entry_points=False)
    before = Path.cwd()
    os.chdir(ROOT)  # so that no text holds where the repository lies
    try:
        found = {}
        for path in sorted(Path("configs").rglob("*.yaml")):
            if path.name == DECLARATION:
                continue
            head = f"# {path}, resolved. Rewrite: python tests/golden/write.py\n"
            text = yaml.safe_dump(_resolved(path, registry), sort_keys=False, width=120)
            found[str(path.relative_to("configs"))] = head + text
        return found
    finally:
        os.chdir(before)


def _resolved(path: Path, registry: Registry) -> dict[str, Any]:
    if any("recipe" in layer.tree for layer in file_layers(path)):
        return _upcycling(path, registry)
    kind = path.parts[1]
    if kind == "synthesis":
        open_keys = ["generator={name: checkpoint, path: WEIGHTS}", "data=[PROMPTS]"]
        return dataclasses.asdict(_load([str(path), *open_keys], CritiqueConfig))
    if kind == "data" or any("sources" in layer.tree for layer in file_layers(path)):
        return _curation(path, registry)
    config = _load([TRAIN_BASE, str(path)] if kind == "moe" else [str(path)], RunConfig)
    config.search_path = []
    if config.data.source["name"] == "tokenised":
        config.data.source.setdefault("path", "CORPUS")  # an experiment's, made by its preparation
    resolve_run(config, registry)
    tree = dataclasses.asdict(config)
    return {"model": tree["model"]} if kind in ("model", "moe") else tree


def _load(arguments: list[str], schema: Any) -> Any:
    """The config, with stand-ins for what the file leaves to whoever uses it."""
    try:
        return load_config(arguments, schema).config
    except ConfigError as error:
        key = str(error).split(":", maxsplit=1)[0]
        if key not in LEFT_OPEN or f"{key}={LEFT_OPEN[key]}" in arguments:
            raise
        return _load([*arguments, f"{key}={LEFT_OPEN[key]}"], schema)


def _upcycling(path: Path, registry: Registry) -> dict[str, Any]:
    """Its recipe and the parts of the model that it names; the rest comes from the source."""
    config = _load([str(path)], UpcycleConfig)
    for axis, point in RECIPE_AXES.items():
        setattr(config.recipe, axis, registry.resolve(point, getattr(config.recipe, axis), f"recipe.{axis}"))
    moe = config.model.get("moe") or {}
    for key, point in MODEL_PARTS.items():
        if key in moe:
            moe[key] = registry.resolve(point, moe[key], f"model.moe.{key}")
    return dataclasses.asdict(config)


def _curation(path: Path, registry: Registry) -> dict[str, Any]:
    """Its sources and filters; each stage with the domains that it is for."""
    config = _load([str(path)], CurateConfig)
    config.sources = [
        registry.resolve(hookspecs.DATA_SOURCES, source, f"sources.{number}")
        for number, source in enumerate(config.sources)
    ]
    found = [
        dataclasses.asdict(stage) | registry.resolve(hookspecs.TEXT_FILTERS, stage.part, f"stages.{number}")
        for number, stage in enumerate(stages(config))
    ]
    return dataclasses.asdict(config) | {"stages": [{k: v for k, v in one.items() if k != "part"} for one in found]}


def main(folder: Path) -> None:
    """Write all, and remove what stands for no config any more."""
    texts = golden_texts()
    for old in folder.rglob("*.yaml"):
        if str(old.relative_to(folder)) not in texts:
            old.unlink()
            print(f"removed {old}")
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN)
