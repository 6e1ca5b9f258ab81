"""Multi-head latent attention: keys and values of all heads are read from one narrow vector a token, which is cached.

DeepSeek-V2 (2405.04434) 2.1 and DeepSeek-V3 (2412.19437) 2.1.1 (sections not opened); as transformers 5.23 computes it,
models/deepseek_v3/modeling_deepseek_v3.py: DeepseekV3Attention. With c a token's latent vector, k_r its rotary key:
q = W_uq norm(W_dq x), c = norm(W_dkv x), k = [W_uk c, k_r], v = W_uv c, softmax(q k^T / sqrt(n + r)) v in each head.

A cache holds c and k_r alone. Where a few new tokens follow many, keys and values are not made of it at all: W_uk goes
to the query and W_uv to the output, as 2405.04434 has it for inference, and c is the one key and value of all heads.
B sequences, S new positions, L with the cached ones, H heads, n and r parts of a head without and with position,
v size of a value head, c also the latent vector's size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelab.config.latent_attention import LatentAttentionConfig
from moelab.config.model import ModelConfig
from moelab.nn.attention_inputs import AttentionInputs, AttentionKernel, TurnedKernel
from moelab.nn.full_attention import FullAttention
from moelab.nn.linear import Linear
from moelab.nn.norm import RMSNorm
from moelab.nn.positional_promises import attended, kernel_part
from moelab.nn.rope import RopeScaling, rotate
from moelab.plugin_faults import PluginPart

NORM_EPS = 1e-6  # of the latent vectors' norms, whatever rms_norm_eps says: theirs and transformers' default


class LatentAttention(nn.Module):
    """x [B, S, D] -> [B, S, D]. Parameters have transformers' names and order of rows."""

    def __init__(self, config: ModelConfig, sizes: LatentAttentionConfig, layer_id: int) -> None:
        super().__init__()
        hidden_size, heads = config.hidden_size, config.num_attention_heads
        self.sizes, self.num_heads, self.layer_id = sizes, heads, layer_id
        queries, bias = heads * sizes.qk_head_dim, sizes.attention_bias
        self.q_proj: Linear | None = None
        self.q_a_proj: Linear | None = None
        if sizes.q_lora_rank is None:
            self.q_proj = Linear(hidden_size, queries, bias=False)
        else:
            self.q_a_proj = Linear(hidden_size, sizes.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(sizes.q_lora_rank, NORM_EPS)
            self.q_b_proj = Linear(sizes.q_lora_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden_size, sizes.kv_lora_rank + sizes.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(sizes.kv_lora_rank, NORM_EPS)
        self.kv_b_proj = Linear(sizes.kv_lora_rank, heads * (sizes.qk_nope_head_dim + sizes.v_head_dim), bias=False)
        self.o_proj = Linear(heads * sizes.v_head_dim, hidden_size, bias=bias)
        self.score_factor = 1.0  # on the scores: of a rotary embedding that is stretched
        self.kernel: TurnedKernel = FullAttention(layer_id)

    def take(self, kernel: AttentionKernel, scaling: RopeScaling | None) -> None:
        """Compute the heads by `kernel` from now on, under this scaling of the rotary embedding."""
        assert isinstance(kernel, TurnedKernel), "moelab.builder refuses the others"
        self.kernel = kernel
        self.score_factor = getattr(scaling, "score_factor", 1.0)

    def plugin_parts(self) -> list[tuple[PluginPart, object]]:
        """As `Attention`'s."""
        return [(kernel_part(self.kernel, self.layer_id), self.kernel)]

    @property
    def cache_mode(self) -> str:
        """What a cache of it holds."""
        return f"latent vectors, {self.kernel.cache_mode}"

    @property
    def reach(self) -> float | None:
        """As `AttentionKernel`'s."""
        return self.kernel.reach

    @property
    def key_products(self) -> int:
        """Multiplications with one key and value: H (n + r + v)."""
        return self.num_heads * (self.sizes.qk_head_dim + self.sizes.v_head_dim)

    @property
    def cached_numbers(self) -> int:
        """What a cache keeps of a token: c + r."""
        return self.kv_a_proj_with_mqa.out_features

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        query, latent = self._query(x, inputs), self._latent(x, inputs)
        if inputs.cache is not None:
            latent, _ = inputs.cache.append(self.layer_id, latent, latent[..., :0])  # values are among the keys
        heads = self._absorbed if self._absorbs(inputs) else self._expanded
        out = heads(query, latent, inputs)  # [B, H, S, v]
        if (fault := attended(out, query, self.sizes.v_head_dim)) is not None:
            raise kernel_part(self.kernel, self.layer_id).fault(fault, self.kernel)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected

    def _query(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """[B, H, S, n + r], its second part turned."""
        if self.q_a_proj is None:
            assert self.q_proj is not None
            query = self.q_proj(x)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        plain, turning = query.split([self.sizes.qk_nope_head_dim, self.sizes.qk_rope_head_dim], -1)
        return torch.cat([plain, self._turned(turning, inputs)], -1)

    def _latent(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """What a cache keeps of the tokens: normed latent vectors and turned rotary keys, [B, 1, S, c + r]."""
        both = self.kv_a_proj_with_mqa(x).unsqueeze(1)
        latent, turning = both.split([self.sizes.kv_lora_rank, self.sizes.qk_rope_head_dim], -1)
        return torch.cat([self.kv_a_layernorm(latent), self._turned(turning, inputs)], -1)

    def _turned(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """x [B, heads, S, r] turned by its positions."""
        cos, sin = inputs.rotation()
        if self.sizes.rope_interleave:
            x = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
        return rotate(x, cos.to(x.dtype), sin.to(x.dtype))

    def _expanded(self, query: Tensor, latent: Tensor, inputs: AttentionInputs) -> Tensor:
        """query [B, H, S, n + r], latent [B, 1, L, c + r] -> [B, H, S, v], by each head's own keys and values."""
        sizes = self.sizes
        both = self.kv_b_proj(latent[:, 0, :, : sizes.kv_lora_rank]).unflatten(-1, (self.num_heads, -1))
        key, value = both.transpose(1, 2).split([sizes.qk_nope_head_dim, sizes.v_head_dim], -1)
        turned = latent[..., sizes.kv_lora_rank :].to(key.dtype).expand(-1, self.num_heads, -1, -1)
        if self.score_factor != 1.0:
            query = query * self.score_factor
        return self.kernel.on_turned(query, torch.cat([key, turned], -1), value, inputs)

    def _absorbed(self, query: Tensor, latent: Tensor, inputs: AttentionInputs) -> Tensor:
        """As `_expanded`, by latent vectors as the one key and value of all heads."""
        sizes = self.sizes
        plain, turned = query.split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], -1)
        matrices = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))  # [H, n + v, c]
        to_key, to_value = matrices.split([sizes.qk_nope_head_dim, sizes.v_head_dim], 1)
        query = torch.cat([_by_head(plain, to_key), turned], -1)  # [B, H, S, c + r]
        # A kernel divides by the root of the width that it sees.
        query = query * (self.score_factor * (query.shape[-1] / sizes.qk_head_dim) ** 0.5)
        # Rotary keys among the values cost little, and equal widths are what torch's own kernels take.
        out = self.kernel.on_turned(query, latent, latent, inputs)[..., : sizes.kv_lora_rank]
        return _by_head(out, to_value.transpose(1, 2))

    def _absorbs(self, inputs: AttentionInputs) -> bool:
        """Whether a cache is read as it is: where that is fewer multiplications than making keys and values of it."""
        if inputs.past == 0:
            return False
        new, length, sizes = inputs.positions.shape[1], inputs.length, self.sizes
        rank, matrices = sizes.kv_lora_rank, sizes.kv_lora_rank * (sizes.qk_nope_head_dim + sizes.v_head_dim)
        absorbed = new * (length * 2 * (rank + sizes.qk_rope_head_dim) + matrices)
        expanded = new * length * (sizes.qk_head_dim + sizes.v_head_dim) + length * matrices
        return absorbed < expanded


def _by_head(x: Tensor, matrices: Tensor) -> Tensor:
    """x [B, H, S, a], matrices [H, a, b] -> [B, H, S, b]; each matrix is read once for all sequences."""
    rows = x.transpose(0, 1).flatten(1, 2)  # [H, B S, a]
    return torch.bmm(rows, matrices).unflatten(1, (len(x), -1)).transpose(0, 1)
