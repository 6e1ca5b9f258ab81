"""Whether a folder was begun by a plan, though an earlier version of moelab may have begun it.

What its recipe does not say, since there was no such key then, is today's default, an initialiser's options included:
the same bytes. Such a folder keeps the hash that it was begun under, which its manifest names too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moelab.across_versions import as_today
from moelab.config.upcycle import RecipeConfig
from moelab.hookspecs import (
    EXPERT_INITIALISERS,
    OUTPUT_SCALINGS,
    ROUTER_INITIALISERS,
    SHARED_INITIALISERS,
    ExtensionPoint,
)
from moelab.records import Record
from moelab.registry import Registry
from moelab_upcycling.plan import Plan, identity_hash

AXES: dict[str, ExtensionPoint[Any, Any]] = {
    "experts": EXPERT_INITIALISERS,
    "shared": SHARED_INITIALISERS,
    "router": ROUTER_INITIALISERS,
    "scaling": OUTPUT_SCALINGS,
}


def hash_there(stored: Record, plan: Plan, registry: Registry) -> str | None:
    """The plan's hash in what upcycle.json holds, which may be an earlier version's; None: it is another plan's."""
    there, identity = stored.text("plan"), stored.record("identity", optional=True).values
    if there == plan.hash:
        return there
    if identity_hash(identity) != there:  # what it says is not what it was begun by
        return None
    return there if identity_hash(completed(identity, registry)) == plan.hash else None


def completed(identity: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """An identity as it was stored, with today's defaults where its recipe says nothing."""
    if not isinstance(identity.get("recipe"), Mapping):
        return dict(identity)
    return {**identity, "recipe": as_today(identity["recipe"], RecipeConfig, registry, "recipe")}
