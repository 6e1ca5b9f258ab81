"""The built-in plugins, as import strings: core never imports what stands above it."""

from __future__ import annotations

BUILTIN_PLUGINS = (
    "moelab_plugins.routers.softmax_topk",
    "moelab_plugins.routers.sigmoid_topk",
    "moelab_plugins.routers.sqrtsoftplus_topk",
    "moelab_plugins.routers.expert_choice",
    "moelab_plugins.shared_experts.gated",
    "moelab_plugins.shared_experts.none",
    "moelab_plugins.shared_experts.plain",
    "moelab_plugins.expert_layouts.uniform",
    "moelab_plugins.expert_layouts.granular",
    "moelab_plugins.expert_layouts.first_dense",
    "moelab_plugins.balance_losses.load_balance",
    "moelab_plugins.balance_losses.hf_load_balance",
    "moelab_plugins.balance_losses.router_z",
    "moelab_plugins.expert_backends.loop",
    "moelab_plugins.expert_backends.grouped_mm",
    "moelab_plugins.expert_backends.cpu_threads",
    "moelab_plugins.expert_backends.auto",
    "moelab_plugins.data_sources.embedded",
    "moelab_plugins.observers.tensorboard",
    "moelab_plugins.data_sources.text",
    "moelab_plugins.data_sources.jsonl",
    "moelab_plugins.data_sources.tokens",
    "moelab_upcycling.initialisers.experts.qwen2",
    "moelab_upcycling.initialisers.experts.sparse",
    "moelab_upcycling.initialisers.experts.random",
    "moelab_upcycling.initialisers.shared.copy",
    "moelab_upcycling.initialisers.router.normal",
    "moelab_upcycling.initialisers.scaling.none",
)
