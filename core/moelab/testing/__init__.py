"""The conformance kit: a ready test suite for any plugin, a stranger's or ours.

    @pytest.mark.parametrize("check", moelab.testing.ROUTER_CHECKS)
    def test_my_router(check):
        check(moelab.testing.RouterCase(my_component))

or, all at once, `moelab.testing.check_router(my_component)`, which raises ConformanceError naming every check that
failed. Needs no pytest.
"""

from moelab.testing.activations import ACTIVATION_CHECKS, ActivationCase, check_activation
from moelab.testing.attentions import ATTENTION_CHECKS, AttentionCase, check_attention
from moelab.testing.backends import BACKEND_CHECKS, BackendCase, check_backend
from moelab.testing.balance_losses import BALANCE_LOSS_CHECKS, BalanceLossCase, check_balance_loss
from moelab.testing.data_sources import DATA_SOURCE_CHECKS, DataSourceCase, check_data_source
from moelab.testing.dense_sources import DENSE_SOURCE_CHECKS, DenseSourceCase, check_dense_source
from moelab.testing.expert_layouts import EXPERT_LAYOUT_CHECKS, ExpertLayoutCase, check_expert_layout
from moelab.testing.generators import GENERATOR_CHECKS, GeneratorCase, check_generator
from moelab.testing.initialisers import INITIALISER_CHECKS, InitialiserCase, check_initialiser
from moelab.testing.mixers import MIXER_CHECKS, MixerCase, check_mixer
from moelab.testing.observers import OBSERVER_CHECKS, ObserverCase, check_observer
from moelab.testing.optimizers import OPTIMIZER_CHECKS, OptimizerCase, check_optimizer
from moelab.testing.report import ConformanceError
from moelab.testing.rewards import REWARD_CHECKS, RewardCase, check_reward
from moelab.testing.rope_scalings import ROPE_SCALING_CHECKS, RopeScalingCase, check_rope_scaling
from moelab.testing.routers import ROUTER_CHECKS, RouterCase, check_router
from moelab.testing.shared_experts import SHARED_EXPERT_CHECKS, SharedExpertCase, check_shared_expert
from moelab.testing.surgeries import SURGERY_CHECKS, SurgeryCase, check_surgery
from moelab.testing.taggers import TAGGER_CHECKS, TaggerCase, check_tagger
from moelab.testing.text_filters import TEXT_FILTER_CHECKS, TextFilterCase, check_text_filter

__all__ = [
    "ACTIVATION_CHECKS",
    "ATTENTION_CHECKS",
    "BACKEND_CHECKS",
    "BALANCE_LOSS_CHECKS",
    "DATA_SOURCE_CHECKS",
    "DENSE_SOURCE_CHECKS",
    "EXPERT_LAYOUT_CHECKS",
    "GENERATOR_CHECKS",
    "INITIALISER_CHECKS",
    "MIXER_CHECKS",
    "OBSERVER_CHECKS",
    "OPTIMIZER_CHECKS",
    "REWARD_CHECKS",
    "ROPE_SCALING_CHECKS",
    "ROUTER_CHECKS",
    "SHARED_EXPERT_CHECKS",
    "SURGERY_CHECKS",
    "TAGGER_CHECKS",
    "TEXT_FILTER_CHECKS",
    "ActivationCase",
    "AttentionCase",
    "BackendCase",
    "BalanceLossCase",
    "ConformanceError",
    "DataSourceCase",
    "DenseSourceCase",
    "ExpertLayoutCase",
    "GeneratorCase",
    "InitialiserCase",
    "MixerCase",
    "ObserverCase",
    "OptimizerCase",
    "RewardCase",
    "RopeScalingCase",
    "RouterCase",
    "SharedExpertCase",
    "SurgeryCase",
    "TaggerCase",
    "TextFilterCase",
    "check_activation",
    "check_attention",
    "check_backend",
    "check_balance_loss",
    "check_data_source",
    "check_dense_source",
    "check_expert_layout",
    "check_generator",
    "check_initialiser",
    "check_mixer",
    "check_observer",
    "check_optimizer",
    "check_reward",
    "check_rope_scaling",
    "check_router",
    "check_shared_expert",
    "check_surgery",
    "check_tagger",
    "check_text_filter",
]
