"""The clipped policy loss, the KL estimators and the entropy, on tensors of log-probabilities [B, T].

Every quantity is one value per token; how tokens become one number is a separate choice (:data:`AGGREGATES`).
A token outside the mask contributes nothing, neither value nor gradient, even where its log-probability is
infinite or NaN.

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from nemo_ampo.errors import ConfigError

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +- this before the exponential, so that no ratio and no gradient overflows."""

MAX_K3 = 10.0
"""The k3 estimate of one token is clamped to +- this, as in the reference."""


def _k1(log_ratio_BT: Tensor) -> Tensor:
    return -log_ratio_BT


def _k2(log_ratio_BT: Tensor) -> Tensor:
    return 0.5 * log_ratio_BT.square()


def _k3(log_ratio_BT: Tensor) -> Tensor:
    x_BT = log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (x_BT.exp() - x_BT - 1).clamp(-MAX_K3, MAX_K3)


KL_KINDS: dict[str, Callable[[Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}
"""Estimators of KL(policy || reference) from x = ref_logprob - logprob of a token the policy drew."""


def kl_estimate(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, kind: str = "k3", mask_BT: Tensor | None = None) -> Tensor:
    """Estimate of KL(policy || reference) at each drawn token (Schulman, "Approximating KL divergence").

    With x = ref_logprob - logprob: k1 = -x, k2 = x^2 / 2, k3 = exp(x) - x - 1. k3 clamps x to [-20, 20]
    before the exponential and the result to [-10, 10], so its gradient is 0 far from the reference, not NaN.

    Args:
        logprobs_BT: of the policy, with gradient.
        ref_logprobs_BT: of the reference.
        kind: a key of :data:`KL_KINDS`.
        mask_BT: tokens that count; the others give 0 without gradient. None when all count.

    Returns:
        [B, T], in nats.

    Raises:
        ConfigError: unknown kind.
        ValueError: shapes differ.
    """
    estimate = _choose("algorithm.kl_kind", KL_KINDS, kind)
    _same_shape(logprobs_BT=logprobs_BT, ref_logprobs_BT=ref_logprobs_BT, mask_BT=mask_BT)
    log_ratio_BT = ref_logprobs_BT - logprobs_BT
    if mask_BT is not None:
        log_ratio_BT = _masked(log_ratio_BT, mask_BT)
    return estimate(log_ratio_BT)


def token_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over all tokens in the mask, each counting the same; 0 when there is none."""
    return _masked(values_BT, mask_BT).sum() / mask_BT.bool().sum().clamp(min=1)


def sequence_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the sequences that have tokens of their token means; 0 when none has any."""
    tokens_B = mask_BT.bool().sum(-1)
    means_B = _masked(values_BT, mask_BT).sum(-1) / tokens_B.clamp(min=1)
    return means_B.sum() / (tokens_B > 0).sum().clamp(min=1)


AGGREGATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
}
"""(values_BT, mask_BT) -> scalar. The authors' code uses ``token_mean``, the GRPO paper ``sequence_mean``."""


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
    aggregate: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, to be minimised.

    Per token max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high)); A is the advantage of the
    token's sequence and ratio = exp(logprob - old_logprob), the log-ratio clamped to [-20, 20].

    Args:
        logprobs_BT: of the policy, with gradient.
        old_logprobs_BT: of the policy that the tokens are attributed to.
        advantages_B: one per sequence.
        mask_BT: bool or 0/1, the tokens the policy drew.
        clip_low, clip_high: half widths of the clip range below and above 1.
        aggregate: a key of :data:`AGGREGATES`.

    Returns:
        The loss, a scalar (0 with zero gradient when no token is in the mask), and detached scalars over the
        tokens in the mask: ``clip_fraction`` (share whose gradient the clip removed), ``ratio_mean``,
        ``ratio_max``, and ``approx_kl``, the mean of old_logprob - logprob.

    Raises:
        ConfigError: unknown aggregate, or an impossible clip range.
        ValueError: shapes differ.
    """
    reduce = _choose("algorithm.aggregate", AGGREGATES, aggregate)
    if not (0 <= clip_low < 1 and clip_high >= 0):
        raise ConfigError(
            "algorithm.clip_low, algorithm.clip_high: need 0 <= clip_low < 1 and clip_high >= 0, "
            f"got {clip_low} and {clip_high}"
        )
    _same_shape(logprobs_BT=logprobs_BT, old_logprobs_BT=old_logprobs_BT, mask_BT=mask_BT)
    if logprobs_BT.dim() != 2 or advantages_B.shape != logprobs_BT.shape[:1]:
        shapes = f"{tuple(logprobs_BT.shape)} and {tuple(advantages_B.shape)}"
        raise ValueError(f"logprobs_BT must be [B, T] and advantages_B [B], got {shapes}")

    log_ratio_BT = _masked(logprobs_BT - old_logprobs_BT, mask_BT)
    ratio_BT = log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free_BT = -advantages_B[:, None] * ratio_BT
    clipped_BT = -advantages_B[:, None] * ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    loss = reduce(torch.maximum(free_BT, clipped_BT), mask_BT)
    with torch.no_grad():
        metrics = {
            "clip_fraction": token_mean((clipped_BT > free_BT).to(ratio_BT.dtype), mask_BT),
            "ratio_mean": token_mean(ratio_BT, mask_BT),
            "ratio_max": _masked(ratio_BT, mask_BT).max(),
            "approx_kl": token_mean(-log_ratio_BT, mask_BT),
        }
    return loss, metrics


def entropy_from_logits(logits_BTV: Tensor) -> Tensor:
    """Entropy of the next-token distribution at each position, nats.

    Args:
        logits_BTV: over the whole vocabulary; -inf rules a token out.

    Returns:
        [B, T], at least float32.
    """
    dtype = torch.promote_types(logits_BTV.dtype, torch.float32)
    logprobs_BTV = torch.log_softmax(logits_BTV, dim=-1, dtype=dtype)
    probs_BTV = logprobs_BTV.exp()
    # 0 * log 0 is 0 in the limit but NaN in floating point.
    return -(probs_BTV * logprobs_BTV.masked_fill(probs_BTV == 0, 0.0)).sum(-1)


def _masked(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Values in the mask, 0 elsewhere. Unlike a product with the mask it stops NaN, in both directions."""
    return torch.where(mask_BT.bool(), values_BT, 0.0)


Choice = TypeVar("Choice")


def _choose(key: str, choices: Mapping[str, Choice], name: str) -> Choice:
    if name not in choices:
        raise ConfigError(f"{key}: must be one of {', '.join(choices)}, got {name!r}")
    return choices[name]


def _same_shape(**tensors: Tensor | None) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
