"""moelab: find out which mixture-of-experts language model is better, and why.

The public names below are imported when first used, so that `python -m moelab --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelab.adapter.registration import (
        as_classifier,
        as_transformers,
        register_with_transformers,
        transformers_tokenizer,
    )
    from moelab.alignment.mixin import RoutedTrainer
    from moelab.builder import build, build_model
    from moelab.components import Component, component
    from moelab.config.run import RunConfig
    from moelab.data.corpus import Corpus, DataContext, Document, TokenStream, build_corpus
    from moelab.data.filtering import FilterContext, Rejected, TextFilter
    from moelab.data.generating import GeneratorContext, Question, Reply, TextGenerator
    from moelab.data.mixing import MixContext, Mixer, Phase
    from moelab.data.rewards import Attempt, Reward, RewardContext
    from moelab.data.tagging import Tagger
    from moelab.errors import CheckpointError, ConfigError, DataError, RunFailure, UserError
    from moelab.hookspecs import hookimpl
    from moelab.loading import load
    from moelab.moe.activation import Activation, ActivationContext
    from moelab.moe.batch_statistics import BatchStatistics
    from moelab.moe.contracts import (
        BackendContext,
        BalanceContext,
        BalanceLoss,
        BalanceLossContext,
        ExpectedAssignments,
        ExpertBackend,
        MoEContext,
        Router,
        SharedExpert,
    )
    from moelab.moe.layout import ExpertLayout, LayoutContext
    from moelab.moe.routing import LayerRecord, Routing, TokenInfo
    from moelab.moe.surgery import Evidence, ExpertRows, LayerPlan, NewExpert, Surgery, SurgeryContext
    from moelab.nn.optimizing import Kept, OptimizerContext, Trained
    from moelab.nn.transformer import TokenContext
    from moelab.paths import Places, user_path
    from moelab.registry import Registry
    from moelab.run_table.frame import run_records, runs
    from moelab.run_table.record import RunRecord
    from moelab.seeds import derive_seed, generator
    from moelab.session import TrainedRun, align, generate, load_config, prepare, train
    from moelab.training.for_trainers import optimizer_for
    from moelab.training.schedule import learning_rate_factor

__version__ = "0.2.0"

_HOMES = {
    "moelab.adapter.registration": (
        "as_classifier",
        "as_transformers",
        "register_with_transformers",
        "transformers_tokenizer",
    ),
    "moelab.alignment.mixin": ("RoutedTrainer",),
    "moelab.data.rewards": ("Attempt", "Reward", "RewardContext"),
    "moelab.builder": ("build", "build_model"),
    "moelab.components": ("Component", "component"),
    "moelab.config.run": ("RunConfig",),
    "moelab.data.filtering": ("FilterContext", "Rejected", "TextFilter"),
    "moelab.data.generating": ("GeneratorContext", "Question", "Reply", "TextGenerator"),
    "moelab.data.mixing": ("MixContext", "Mixer", "Phase"),
    "moelab.data.tagging": ("Tagger",),
    "moelab.data.corpus": ("Corpus", "DataContext", "Document", "TokenStream", "build_corpus"),
    "moelab.errors": ("CheckpointError", "ConfigError", "DataError", "RunFailure", "UserError"),
    "moelab.hookspecs": ("hookimpl",),
    "moelab.loading": ("load",),
    "moelab.moe.activation": ("Activation", "ActivationContext"),
    "moelab.moe.batch_statistics": ("BatchStatistics",),
    "moelab.moe.contracts": (
        "BackendContext",
        "BalanceContext",
        "BalanceLoss",
        "BalanceLossContext",
        "ExpectedAssignments",
        "ExpertBackend",
        "MoEContext",
        "Router",
        "SharedExpert",
    ),
    "moelab.moe.layout": ("ExpertLayout", "LayoutContext"),
    "moelab.moe.routing": ("LayerRecord", "Routing", "TokenInfo"),
    "moelab.moe.surgery": ("Evidence", "ExpertRows", "LayerPlan", "NewExpert", "Surgery", "SurgeryContext"),
    "moelab.nn.optimizing": ("Kept", "OptimizerContext", "Trained"),
    "moelab.nn.transformer": ("TokenContext",),
    "moelab.paths": ("Places", "user_path"),
    "moelab.registry": ("Registry",),
    "moelab.seeds": ("derive_seed", "generator"),
    "moelab.session": ("TrainedRun", "align", "generate", "load_config", "prepare", "train"),
    "moelab.training.for_trainers": ("optimizer_for",),
    "moelab.training.schedule": ("learning_rate_factor",),
    "moelab.run_table.frame": ("run_records", "runs"),
    "moelab.run_table.record": ("RunRecord",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Activation",
    "ActivationContext",
    "Attempt",
    "BackendContext",
    "BalanceContext",
    "BalanceLoss",
    "BalanceLossContext",
    "BatchStatistics",
    "CheckpointError",
    "Component",
    "ConfigError",
    "Corpus",
    "DataContext",
    "DataError",
    "Document",
    "Evidence",
    "ExpectedAssignments",
    "ExpertBackend",
    "ExpertLayout",
    "ExpertRows",
    "FilterContext",
    "GeneratorContext",
    "Kept",
    "LayerPlan",
    "LayerRecord",
    "LayoutContext",
    "MixContext",
    "Mixer",
    "MoEContext",
    "NewExpert",
    "OptimizerContext",
    "Phase",
    "Places",
    "Question",
    "Registry",
    "Rejected",
    "Reply",
    "Reward",
    "RewardContext",
    "RoutedTrainer",
    "Router",
    "Routing",
    "RunConfig",
    "RunFailure",
    "RunRecord",
    "SharedExpert",
    "Surgery",
    "SurgeryContext",
    "Tagger",
    "TextFilter",
    "TextGenerator",
    "TokenContext",
    "TokenInfo",
    "TokenStream",
    "Trained",
    "TrainedRun",
    "UserError",
    "__version__",
    "align",
    "as_classifier",
    "as_transformers",
    "build",
    "build_corpus",
    "build_model",
    "component",
    "derive_seed",
    "generate",
    "generator",
    "hookimpl",
    "learning_rate_factor",
    "load",
    "load_config",
    "optimizer_for",
    "prepare",
    "register_with_transformers",
    "run_records",
    "runs",
    "train",
    "transformers_tokenizer",
    "user_path",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moelab' has no attribute '{name}'")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    """The public names, for Tab: what is not imported yet is there too."""
    return sorted(__all__)
