"""Megatron's local (no Transformer Engine) layer spec, quick on a CPU.

The local spec repeats keys and values to all heads over the whole cache, caches keys before rotation, so that every
decoding step rotates the whole cache again, and makes a new tensor of every factor of the gated MLP. All of it is avoided
here, the last only without gradients; results are equal (golden tests compare with transformers). Internal names are
Megatron-core 0.11.0's, which :mod:`nemo_ampo.compat.versions` pins.

The linear layers stay Megatron's: called as plain products they were quicker, but added up in another order, which the
large activations of SmolLM2 showed as 1e-4 in the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec


class SdpaAttention(DotProductAttention):
    """Grouped-query attention through torch's fused kernel. Tensors are [S, B, heads, head dim]."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Mask is True where attention is forbidden; None means causal (or one new token over its whole cache)."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if query.shape[0] == 1 and query.device.type == "cpu" and not self.training:
            out = _one_new_token(q, k, v, attention_mask)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if attention_mask is None else ~attention_mask.bool(),
                is_causal=attention_mask is None and q.shape[2] > 1,
                dropout_p=self.config.attention_dropout if self.training else 0.0,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def _one_new_token(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of one token over the cache in two batched products, half the time of torch's fused kernel at this shape.

    The heads that share keys become rows of one query, so that the cache is read once for all of them.

    Args:
        q: [B, heads, 1, head dim].
        k, v: [B, key/value heads, S, head dim].
        mask: bool [B, 1, 1, S], True where forbidden, or None.

    Returns:
        [B, heads, 1, head dim].
    """
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3]) * q.shape[3] ** -0.5
    scores = torch.matmul(grouped, k.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    return torch.matmul(scores.softmax(dim=-1), v).reshape(q.shape)


class RotatedCacheSelfAttention(SelfAttention):
    """Stores keys in the cache after rotation, so that a step rotates one position and not the whole cache.

    The cache is laid out by row and head, [B, heads, S, head dim], and shown to Megatron as [S, B, heads, head dim]: what
    one head reads in a step then lies together in memory.
    """

    def _allocate_memory(self, max_length: int, rows: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        heads = self.num_query_groups_per_partition
        device = torch.cuda.current_device()
        return torch.zeros(rows, heads, max_length, dim, dtype=dtype, device=device).permute(2, 0, 1, 3)

    def _adjust_key_value_for_inference(
        self,
        inference_params: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if inference_params is not None and rotary_pos_emb is not None:
            begin = inference_params.sequence_len_offset
            end = begin + key.size(0)
            q_angles, k_angles = rotary_pos_emb
            query = _rotated(query, q_angles[begin:end], self.config)
            key = _rotated(key, k_angles[begin:end], self.config)
            rotary_pos_emb = None
        return super()._adjust_key_value_for_inference(inference_params, query, key, value, rotary_pos_emb, *args, **kwargs)


def _rotated(heads: torch.Tensor, angles: torch.Tensor, config: Any) -> torch.Tensor:
    """Megatron's rotation in three passes over the heads instead of six.

    Args:
        heads: queries or keys, [S, B, heads, head dim].
        angles: [S, 1, 1, head dim].
        config: Megatron's, for the layouts that are left to it.

    Returns:
        [S, B, heads, head dim].
    """
    if config.rotary_interleaved or angles.size(-1) != heads.size(-1):
        return apply_rotary_pos_emb(heads, angles, config=config)
    half = heads.size(-1) // 2
    sine = angles.sin()
    sine[..., :half].neg_()
    return (heads * angles.cos().to(heads.dtype)).addcmul_(heads.roll(half, -1), sine.to(heads.dtype))


class QuickMlp(MLP):
    """SwiGLU in the memory of its own input: a fresh tensor of that size costs more than what is computed in it."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, hidden] to ([S, B, hidden], None)."""
        config = self.config
        swiglu = config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
        if torch.is_grad_enabled() or config.add_bias_linear or not swiglu:
            return super().forward(hidden_states)
        gate, up = self.linear_fc1(hidden_states)[0].chunk(2, dim=-1)
        return self.linear_fc2(torch.nn.functional.silu(gate, inplace=True).mul_(up))


def cpu_layer_spec() -> ModuleSpec:
    """Layer spec for :class:`megatron.core.models.gpt.GPTModel` without any compiled extension."""
    spec = get_gpt_layer_local_spec()
    attention, mlp = spec.submodules.self_attention, spec.submodules.mlp
    attention.module = RotatedCacheSelfAttention
    attention.submodules.core_attention = SdpaAttention
    mlp.module = QuickMlp
    return spec
