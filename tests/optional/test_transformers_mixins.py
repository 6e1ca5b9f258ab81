"""transformers' own common tests of models and of generation, over the adapter: dense, and with several routers.

Only with MOELAB_TRANSFORMERS_CHECKOUT=FOLDER, a checkout of transformers of the installed version, and its test
dependencies (`parameterized`); README.md has the commands. Nothing of it is copied here.
"""

from __future__ import annotations

import importlib
import os
import sys
import unittest
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = os.environ.get("MOELAB_TRANSFORMERS_CHECKOUT", "")
if not CHECKOUT:
    pytest.skip("needs a checkout of transformers: MOELAB_TRANSFORMERS_CHECKOUT=FOLDER", allow_module_level=True)
pytest.importorskip("transformers")
pytest.importorskip("parameterized", reason="transformers' tests need the package parameterized")
if not (Path(CHECKOUT) / "tests/test_modeling_common.py").is_file():
    pytest.fail(f"MOELAB_TRANSFORMERS_CHECKOUT: {CHECKOUT} has no tests/test_modeling_common.py", pytrace=False)
# Their folder is called `tests` as ours is: theirs becomes the package, and ours is found in it, too.
ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "tests"}
sys.path.insert(0, CHECKOUT)
importlib.import_module("tests").__path__.append(str(Path(__file__).parents[1]))
sys.modules |= {name: module for name, module in ours.items() if name != "tests"}
common = importlib.import_module("tests.test_modeling_common")
generation = importlib.import_module("tests.generation.test_utils")

from moelab.adapter.causal_lm import MoelabConfig, MoelabForCausalLM  # noqa: E402 (after what it needs is known)

pytestmark = pytest.mark.slow
LAYOUT = {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, dict[str, Any] | None] = {
    "Dense": None,
    "SoftmaxTopk": {"router": {"name": "softmax_topk"}, "shared_expert": {"name": "gated", "intermediate_size": 24}},
    "SigmoidTopk": {"router": {"name": "sigmoid_topk"}},
    "NullExperts": {"router": {"name": "null_experts"}},
    "Hash": {"router": {"name": "hash"}},
}
# Tests that ask for what a model does not have, and why; the reason is shown beside the skip.
NO_EMBEDDINGS = "this router reads token ids, so embeddings in their place are refused by name"
NO_NEW_IDS = "this router has a row for each token id, so new ids are refused by name"
LEFT_OUT = {
    "TestHash": {
        "test_inputs_embeds": NO_EMBEDDINGS,
        "test_generate_continue_from_inputs_embeds": NO_EMBEDDINGS,
        "test_generate_from_inputs_embeds_0_greedy": NO_EMBEDDINGS,
        "test_generate_from_inputs_embeds_1_beam_search": NO_EMBEDDINGS,
        "test_generate_from_random_inputs_embeds": NO_EMBEDDINGS,
        "test_inputs_embeds_matches_input_ids": NO_EMBEDDINGS,
        "test_resize_tokens_embeddings": NO_NEW_IDS,
        "test_tie_model_weights": NO_NEW_IDS,
        "test_resize_embeddings_untied": NO_NEW_IDS,
        "test_resize_embeddings_untied_no_reinit_on_post_init": NO_NEW_IDS,
        "test_all_tensors_are_parameter_or_buffer": "a table of what memory held is refused by name",
    }
}


class Tester:
    """A tiny model and a batch, as the common tests ask for them."""

    is_training = True
    batch_size, seq_length, num_hidden_layers = 3, 7, 2
    hidden_size, num_attention_heads = 32, 4

    def __init__(self, parent: unittest.TestCase, moe: dict[str, Any] | None) -> None:
        self.parent, self.moe = parent, moe

    def get_config(self) -> MoelabConfig:
        return MoelabConfig(
            vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            moe=None if self.moe is None else {"layout": dict(LAYOUT)} | self.moe,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[MoelabConfig, dict[str, Any]]:
        ids = common.ids_tensor([self.batch_size, self.seq_length], 99)
        mask = common.torch.tril(common.torch.ones_like(ids))
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class OverTheAdapter(common.ModelTesterMixin, generation.GenerationTesterMixin):
    """The two mixins with one model."""

    moe: dict[str, Any] | None = None
    all_model_classes = (MoelabForCausalLM,)
    # Experts that no token went to have no gradient.
    test_all_params_have_gradient = False
    # Of encoders; transformers' own decoders say the same in 4.57, and 5 has none of it.
    test_pruning = test_head_masking = False

    def _prepare_for_class(self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False) -> Any:
        """Labels too: the mixin gives them to the classes that transformers itself lists."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        return inputs | ({"labels": inputs["input_ids"]} if return_labels else {})

    def setUp(self) -> None:
        reason = LEFT_OUT.get(type(self).__name__, {}).get(self._testMethodName)  # type: ignore[attr-defined]
        if reason is not None:
            self.skipTest(reason)  # type: ignore[attr-defined]
        self.model_tester = Tester(self, self.moe)  # type: ignore[arg-type]


for name, moe in MODELS.items():
    globals()[f"Test{name}"] = type(f"Test{name}", (OverTheAdapter, unittest.TestCase), {"moe": moe})
