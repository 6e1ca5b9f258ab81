"""Virtual-group upcycling (He et al. 2024, 2410.07524): the FFN in G shards, all copies of a shard alike.

With `tied_groups` as the router, top-k takes whole groups, each of which is the dense FFN.
"""

from __future__ import annotations

from dataclasses import dataclass

from moelab import Component, component, hookimpl
from moelab.initialisers import ExpertInitialiser, UpcycleContext
from moelab_upcycling.initialisers.experts._shards import Shards
from moelab_upcycling.neurons import check_fraction


@dataclass
class VirtualGroupOptions:
    reinit_fraction: float = 0.0  # above 0 the copies of a shard differ, and the start is no longer exact

    def __post_init__(self) -> None:
        check_fraction("reinit_fraction", self.reinit_fraction)


class VirtualGroupExperts(Shards):
    """Expert e holds shard e mod G of one fixed shuffle of the dense neurons."""

    def __init__(self, options: VirtualGroupOptions, context: UpcycleContext) -> None:
        super().__init__(context, options.reinit_fraction)


@hookimpl
def moelab_expert_initialisers() -> list[Component[UpcycleContext, ExpertInitialiser]]:
    return [component("virtual_group", VirtualGroupOptions, VirtualGroupExperts)]
