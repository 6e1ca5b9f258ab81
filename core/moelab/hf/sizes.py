"""Whether the sizes that a config.json speaks of can be those of the weights beside it, before anything is counted out.

Every size of a model is the length of some stored tensor's axis, or a count of tensors. A tensor that holds numbers has
no axis longer than its file, so a config.json that promises more than lies there is told at once. Free of torch.
"""

from __future__ import annotations

from moelab.config.model import ModelConfig
from moelab.errors import CheckpointError
from moelab.hf.files import TensorFolder


def check_sizes(config: ModelConfig, stored: TensorFolder) -> None:
    """Raises CheckpointError naming the key whose size the stored tensors can't have."""
    shapes = [tensor.shape for tensor in stored.tensors.values() if tensor.nbytes]
    longest = max((axis for shape in shapes for axis in shape), default=0)
    fused = max((shape[0] for shape in shapes if len(shape) == 3), default=0)  # a bank of experts in one tensor
    layout = {} if config.moe is None else config.moe.layout
    shared = {} if config.moe is None else config.moe.shared_expert
    sizes = {
        "num_hidden_layers": (config.num_hidden_layers, len(shapes)),
        "num_experts": (layout.get("num_experts", 0), max(len(shapes), fused)),
        "vocab_size": (config.vocab_size, longest),
        "hidden_size": (config.hidden_size, longest),
        "intermediate_size": (
            0 if config.moe else config.intermediate_size,
            longest,
        ),  # maybe of no layer
        "num_attention_heads x head_dim": (config.num_attention_heads * config.attention_head_dim, longest),
        "moe_intermediate_size": (layout.get("moe_intermediate_size", 0), longest),
        "shared_expert_intermediate_size": (shared.get("intermediate_size", 0), longest),
    }
    for key, (size, most) in sizes.items():
        if size > most:
            raise CheckpointError(
                f"{stored.folder / 'config.json'}: {key}: {size}, but the weights beside it are {len(shapes)} tensors "
                f"of which the longest axis is {longest}: they are another model's; download both again"
            )
