"""How far the engine that drew the tokens is from the trainer that learns from them, and weights that correct for it.

Engine and trainer hold the same weights but compute with other kernels, precisions and filters, so a token drawn with
log-probability q has log-probability p in the trainer. Legend: B samples, T tokens; d = p - q inside the mask, float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ampo.algo.algorithm import AlgorithmConfig, Correction, Ratio
from nemo_ampo.algo.loss import MAX_LOG_RATIO


@dataclass(frozen=True)
class Mismatch:
    """Sums over the drawn tokens of one replica; :func:`mismatch_metrics` joins the replicas.

    Attributes:
        tokens: drawn tokens.
        gap: sum of |d|.
        error: sum of exp(|d|), the factor by which the two probabilities of a token differ.
        kl: sum of exp(d) - 1 - d, the k3 estimate of KL(engine || trainer).
        sequence_max: largest mean of exp(|d|) over the tokens of one response.
        weight: sum of the importance weights.
        changed: tokens whose weight was cut or set to zero.
    """

    tokens: int
    gap: float
    error: float
    kl: float
    sequence_max: float
    weight: float
    changed: int


def importance_weights(
    logprobs_BT: Tensor | None, sampling_logprobs_BT: Tensor, mask_BT: Tensor, rules: AlgorithmConfig
) -> Tensor:
    """Weight of each token's policy loss.

    With ratio = exp(d) of the token, or exp(sum of d) of its response with ``mismatch_level=sequence``, every exponent
    clamped to [-20, 20] in float32 first::

        mismatch=off        weight = 1
        mismatch=truncate   weight = min(ratio, mismatch_high)                       (truncated importance sampling)
        mismatch=mask       weight = ratio inside [mismatch_low, mismatch_high], else 0   (masked importance sampling)

    Args:
        logprobs_BT: the trainer's log-probabilities before the update; None where ``mismatch=off`` reads none.
        sampling_logprobs_BT: the engine's.
        mask_BT: the tokens that were drawn.
        rules: ``mismatch*`` is read.

    Returns:
        float32 [B, T] without gradient, 1 outside the mask.
    """
    if rules.mismatch == Correction.off:
        return torch.ones_like(sampling_logprobs_BT, dtype=torch.float32)
    assert logprobs_BT is not None
    ratio_BT = _ratio(_gap(logprobs_BT, sampling_logprobs_BT, mask_BT), rules)
    if rules.mismatch == Correction.truncate:
        weights_BT = ratio_BT.clamp(max=rules.mismatch_high)
    else:
        inside_BT = (ratio_BT >= rules.mismatch_low) & (ratio_BT <= rules.mismatch_high)
        weights_BT = torch.where(inside_BT, ratio_BT, 0.0)
    return torch.where(mask_BT.bool(), weights_BT, 1.0)


def mismatch(logprobs_BT: Tensor, sampling_logprobs_BT: Tensor, mask_BT: Tensor, rules: AlgorithmConfig) -> Mismatch:
    """How far engine and trainer are apart on the tokens of the mask; arguments of :func:`importance_weights`."""
    mask_BT = mask_BT.bool()
    gap_BT = _gap(logprobs_BT, sampling_logprobs_BT, mask_BT)
    error_BT = torch.where(mask_BT, _exp(gap_BT.abs()), 0.0)
    exponent_BT = gap_BT.double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl_BT = exponent_BT.expm1() - exponent_BT  # in float32 the usual gaps of 1e-4 would drown in rounding
    tokens_B = mask_BT.sum(-1)
    weights_BT = importance_weights(logprobs_BT, sampling_logprobs_BT, mask_BT, rules)
    changed_BT = weights_BT != _ratio(gap_BT, rules) if rules.mismatch != Correction.off else torch.zeros_like(mask_BT)
    return Mismatch(
        tokens=int(tokens_B.sum()),
        gap=float(gap_BT.abs().sum()),
        error=float(error_BT.sum()),
        kl=float(kl_BT.sum()),
        sequence_max=float((error_BT.sum(-1) / tokens_B.clamp(min=1)).max()),
        weight=float(weights_BT[mask_BT].sum()),
        changed=int(changed_BT[mask_BT].sum()),
    )


def _gap(logprobs_BT: Tensor, sampling_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT.bool(), logprobs_BT.detach().float() - sampling_logprobs_BT.float(), 0.0)


def _ratio(gap_BT: Tensor, rules: AlgorithmConfig) -> Tensor:
    by_sequence = rules.mismatch_level == Ratio.sequence
    return _exp(gap_BT.sum(-1, keepdim=True).expand_as(gap_BT) if by_sequence else gap_BT)


def mismatch_metrics(parts: Sequence[Mismatch]) -> dict[str, float]:
    """The ``mismatch/`` metrics of a step from what every replica measured; nothing when no token was drawn."""
    tokens = sum(part.tokens for part in parts)
    if not tokens:
        return {}
    return {
        "engine/logprob_gap": sum(part.gap for part in parts) / tokens,
        "mismatch/error": sum(part.error for part in parts) / tokens,
        "mismatch/kl": sum(part.kl for part in parts) / tokens,
        "mismatch/sequence_max": max(part.sequence_max for part in parts),
        "mismatch/weight": sum(part.weight for part in parts) / tokens,
        "mismatch/changed_fraction": sum(part.changed for part in parts) / tokens,
    }


def _exp(log_BT: Tensor) -> Tensor:
    return log_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
