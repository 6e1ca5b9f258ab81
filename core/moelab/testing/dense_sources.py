"""What every dense source must do: describe a model from config.json's fields, and say what its tensors hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from moelab.components import Component
from moelab.config.model import ModelConfig
from moelab.dense_sources import DenseArchitecture, Part
from moelab.errors import CheckpointError
from moelab.hf.config import described_by
from moelab.hf.fields import Fields
from moelab.hf.names import hf_shapes, parameter_shapes
from moelab.hookspecs import hookimpl
from moelab.registry import Registry
from moelab.testing.report import make_options, run_checks

Shape = tuple[int, ...]
SMALL: Mapping[str, Any] = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip
_ROWS = {"gguf_rows": ("halves", "pairs", None)}


@dataclass
class DenseSourceCase:
    """One dense source under test."""

    component: Component[Mapping[str, Any], DenseArchitecture]
    options: Any = None
    fields: dict[str, Any] = field(default_factory=dict)  # of config.json, over a small model's
    stored: Mapping[str, Shape] | None = None  # tensors of such a folder; None: as Qwen2 calls them

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)
        self.fields = {**SMALL, "model_type": self.component.name, **self.fields}

    def build(self) -> DenseArchitecture:
        """What the component says of the fields."""
        return self.component.build(self.options, self.fields)

    def config(self) -> ModelConfig:
        """The model that the fields describe, read as a folder's are."""
        component = self.component

        class Offer:
            @staticmethod
            @hookimpl
            def moelab_dense_sources() -> list[Component[Mapping[str, Any], DenseArchitecture]]:
                return [component]

        registry = Registry(entry_points=False, points=())
        registry.manager.register(Offer())
        return described_by(Fields(Path("config.json"), self.fields), registry).config

    def refusal(self) -> str | None:
        """Why the fields are refused; None where they are read."""
        try:
            self.config()
        except CheckpointError as error:
            return str(error)
        return None


def gives_an_architecture(case: DenseSourceCase) -> None:
    """A DenseArchitecture, the same each time, of fields that ModelConfig has."""
    built = case.build()
    assert isinstance(built, DenseArchitecture), f"built {type(built).__name__}, not a DenseArchitecture"
    assert built.class_name, "class_name is empty"
    unknown = (built.model.keys() | built.defaults.keys()) - {entry.name for entry in fields(ModelConfig)}
    assert not unknown, f"model and defaults: ModelConfig has no {sorted(unknown)}"
    assert built.gguf_rows in _ROWS["gguf_rows"], f"gguf_rows: must be one of {_ROWS['gguf_rows']}"


def reads_a_model_or_names_why_not(case: DenseSourceCase) -> None:
    """The fields describe a model with what all of the kind have, or are refused naming each reason."""
    built = case.build()
    refusal = case.refusal()
    if refusal is not None:
        assert built.unexpressed, f"refused, though nothing is unexpressed: {refusal}"
        left_out = [reason for reason in built.unexpressed if reason not in refusal]
        assert not left_out, f"the refusal does not name {left_out}"
        return
    assert not built.unexpressed, "read, though something is unexpressed"
    config = case.config()
    wrong = [key for key, value in built.model.items() if getattr(config, key) != value]
    assert not wrong, f"the model has not the said {wrong}"


def refuses_what_it_says_it_refuses(case: DenseSourceCase) -> None:
    """A field of `only` with another value is an error that names it."""
    built = case.build()
    for key in () if built.unexpressed else built.only:
        other = DenseSourceCase(case.component, case.options, {**case.fields, key: "another value"}, case.stored)
        refusal = other.refusal()
        assert refusal is not None, f"{key}: another value is not refused"
        assert key in refusal, f"{key}: the refusal does not name it"


def its_tensors_make_up_the_model_once(case: DenseSourceCase) -> None:
    """Every tensor of the model comes from the stored ones, in its shape, from rows that no other takes."""
    built = case.build()
    if built.unexpressed:
        return
    config = case.config()
    wanted = hf_shapes(parameter_shapes(config, {}))
    found: dict[str, Shape] = {}
    for name, shape in (case.stored or wanted).items():
        parts = built.parts(name, config)
        assert all(isinstance(part, Part) for part in parts), f"{name}: parts() must give a list of Part"
        taken = [row for part in parts for row in range(part.first, part.first + (part.rows or shape[0]))]
        assert not parts or sorted(taken) == list(range(shape[0])), f"{name}: its rows are not taken once each"
        for part in parts:
            assert part.name not in found, f"{part.name}: made of two tensors"
            found[part.name] = shape if part.rows is None else (part.rows, *shape[1:])
    assert found == wanted, f"differs from the model's tensors in {sorted(found.items() ^ wanted.items())[:4]}"


DENSE_SOURCE_CHECKS: tuple[Callable[[DenseSourceCase], None], ...] = (
    gives_an_architecture,
    reads_a_model_or_names_why_not,
    refuses_what_it_says_it_refuses,
    its_tensors_make_up_the_model_once,
)


def check_dense_source(
    component: Component[Mapping[str, Any], DenseArchitecture],
    options: Any = None,
    *,
    fields: dict[str, Any] | None = None,
    stored: Mapping[str, Shape] | None = None,
) -> None:
    """Run every check of DENSE_SOURCE_CHECKS; raises ConformanceError naming those that fail.

    That the loaded model computes what the original does, no kit can know: compare logits, as tests/parity does.
    """
    case = DenseSourceCase(component, options, fields or {}, stored)
    run_checks("dense source", component, case, DENSE_SOURCE_CHECKS)
