"""moelab: find out which mixture-of-experts language model is better, and why.

The public names below are imported when first used, so that `python -m moelab --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelab.builder import build, build_model
    from moelab.components import Component, component
    from moelab.data.corpus import Corpus, DataContext, Document, TokenStream, build_corpus
    from moelab.errors import CheckpointError, ConfigError, DataError, RunFailure, UserError
    from moelab.hookspecs import hookimpl
    from moelab.loading import load
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
    from moelab.paths import user_path
    from moelab.registry import Registry

__version__ = "0.2.0"

_HOMES = {
    "moelab.builder": ("build", "build_model"),
    "moelab.components": ("Component", "component"),
    "moelab.data.corpus": ("Corpus", "DataContext", "Document", "TokenStream", "build_corpus"),
    "moelab.errors": ("CheckpointError", "ConfigError", "DataError", "RunFailure", "UserError"),
    "moelab.hookspecs": ("hookimpl",),
    "moelab.loading": ("load",),
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
    "moelab.paths": ("user_path",),
    "moelab.registry": ("Registry",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BackendContext",
    "BalanceContext",
    "BalanceLoss",
    "BalanceLossContext",
    "CheckpointError",
    "Component",
    "ConfigError",
    "Corpus",
    "DataContext",
    "DataError",
    "Document",
    "ExpectedAssignments",
    "ExpertBackend",
    "ExpertLayout",
    "LayerRecord",
    "LayoutContext",
    "MoEContext",
    "Registry",
    "Router",
    "Routing",
    "RunFailure",
    "SharedExpert",
    "TokenInfo",
    "TokenStream",
    "UserError",
    "build",
    "build_corpus",
    "build_model",
    "component",
    "hookimpl",
    "load",
    "user_path",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moelab' has no attribute '{name}'")
    return getattr(import_module(_HOME_OF[name]), name)
