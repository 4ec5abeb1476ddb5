"""The clipped policy loss, the KL estimators and the entropy, on tensors of log-probabilities [B, T].

Every quantity is one value per token; how tokens become one number is a separate choice: a weight for each token
(:func:`token_weights`), so that a mean over a batch can be summed up micro-batch by micro-batch.
A token outside the mask contributes nothing, neither value nor gradient, even where its log-probability is
infinite or NaN.

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from nemo_ampo.algo.algorithm import AlgorithmConfig, Kl
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
    log_ratio_BT = _wide(ref_logprobs_BT) - _wide(logprobs_BT)
    if mask_BT is not None:
        log_ratio_BT = _masked(log_ratio_BT, mask_BT)
    return estimate(log_ratio_BT)


@dataclass(frozen=True)
class Totals:
    """What a mean is over.

    Attributes:
        tokens: in the mask.
        sequences: with at least one token in the mask.
    """

    tokens: float
    sequences: float

    @classmethod
    def of(cls, mask_BT: Tensor) -> Totals:
        """The totals of one tensor."""
        tokens_B = mask_BT.bool().sum(-1)
        return cls(float(tokens_B.sum()), float((tokens_B > 0).sum()))


def _each_token_alike(tokens_B1: Tensor, totals: Totals, constant_tokens: float) -> Tensor:
    return torch.full_like(tokens_B1, 1 / max(totals.tokens, 1))


def _each_sequence_alike(tokens_B1: Tensor, totals: Totals, constant_tokens: float) -> Tensor:
    return 1 / (tokens_B1.clamp(min=1) * max(totals.sequences, 1))


def _by_constant(tokens_B1: Tensor, totals: Totals, constant_tokens: float) -> Tensor:
    return torch.full_like(tokens_B1, 1 / (constant_tokens * max(totals.sequences, 1)))


_WEIGHTS: dict[str, Callable[[Tensor, Totals, float], Tensor]] = {
    "token_mean": _each_token_alike,
    "sequence_mean": _each_sequence_alike,
    "constant": _by_constant,
}


def token_weights(
    mask_BT: Tensor, aggregate: str, totals: Totals | None = None, constant_tokens: float | None = None
) -> Tensor:
    """What each token's value is multiplied by before summing.

    With N tokens and S sequences in ``totals`` and n tokens in the token's own sequence::

        token_mean      1 / N          the authors' code, DAPO
        sequence_mean   1 / (S n)      the GRPO and GSPO papers
        constant        1 / (S L)      Dr. GRPO: no sequence's weight depends on its length; L = constant_tokens

    Args:
        mask_BT: the tokens that count; a sequence without any is no sequence.
        aggregate: one of the three names.
        totals: of all that the mean is over; None takes those of the mask itself.
        constant_tokens: L; None takes T.

    Returns:
        float64 [B, T], 0 outside the mask.

    Raises:
        ConfigError: unknown aggregate.
    """
    weigh = _choose("algorithm.aggregate", _WEIGHTS, aggregate)
    mask_BT = mask_BT.bool()
    tokens_B1 = mask_BT.sum(-1, keepdim=True).double()
    weights_B1 = weigh(tokens_B1, totals or Totals.of(mask_BT), constant_tokens or mask_BT.size(-1))
    return torch.where(mask_BT, weights_B1, 0.0)


def update_weights(
    mask_BT: Tensor, micro_batches: int, rules: AlgorithmConfig, totals: Totals | None, replicas: int
) -> Tensor:
    """Weights of one replica's tokens in an update whose framework averages over micro-batches and replicas.

    Over the whole batch they are :func:`token_weights` of the job times both counts, which undoes the two averages: the
    loss is then the same however the batch is split. Over micro-batches each one has its own mean.

    Args:
        mask_BT: of this replica's rows; equal, unbroken parts of them are the micro-batches.
        micro_batches: of this replica.
        rules: ``aggregate`` and ``constant_tokens`` are read.
        totals: of the rows of all replicas; None for means over each micro-batch.
        replicas: of the job.

    Returns:
        float64 [B, T].
    """
    if totals is not None:
        weights_BT = token_weights(mask_BT, rules.aggregate, totals, rules.constant_tokens)
        return weights_BT * micro_batches * replicas
    parts = mask_BT.chunk(micro_batches)
    return torch.cat([token_weights(part, rules.aggregate, None, rules.constant_tokens) for part in parts])


def filled_micro_batches(mask_BT: Tensor, micro_batches: int) -> int:
    """How many of the equal parts of the rows hold a token that counts."""
    return sum(bool(part.any()) for part in mask_BT.chunk(micro_batches))


def weighted_sum(values_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Sum of weight times value, a scalar; a token of weight 0 contributes nothing, NaN and infinity included."""
    return (_masked(values_BT, weights_BT != 0) * weights_BT.to(values_BT.dtype)).sum()


def _aggregate(name: str, values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return weighted_sum(values_BT, token_weights(mask_BT, name))


AGGREGATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {name: partial(_aggregate, name) for name in _WEIGHTS}
"""(values_BT, mask_BT) -> scalar, each over all there is in the mask; 0 without gradient when nothing is."""

token_mean = AGGREGATES["token_mean"]


@dataclass(frozen=True)
class Surrogate:
    """PPO's surrogate at each token, [B, T], 0 (ratio: 1) outside the mask.

    Attributes:
        loss_BT: to be minimised, with gradient.
        ratio_BT: new over old probability, of the token or of its sequence.
        clipped_BT: the clip range removed the gradient.
        capped_BT: the dual clip did.
    """

    loss_BT: Tensor
    ratio_BT: Tensor
    clipped_BT: Tensor
    capped_BT: Tensor


def surrogate(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    ratio: str = "token",
) -> Surrogate:
    """PPO's clipped surrogate per token.

    With x = logprob - old_logprob, clamped to [-20, 20] before the exponential, and n the tokens of the sequence::

        ratio=token       q = exp(x)
        ratio=sequence    q = exp(mean of x over the sequence)       (GSPO; each token gets the gradient of its own x)
        loss = max(-A q, -A clip(q, 1 - clip_low, 1 + clip_high))
        dual_clip=c       where A < 0: loss = min(loss, -A c)        (Ye et al. 2020)

    Args:
        logprobs_BT: of the policy, with gradient.
        old_logprobs_BT: of the policy that the tokens are attributed to.
        advantages_BT: one per token, or [B, 1].
        mask_BT: bool or 0/1, the tokens the policy drew.
        clip_low, clip_high: half widths of the clip range below and above 1.
        dual_clip: c, above 1, or None.
        ratio: ``token`` or ``sequence``.

    Raises:
        ConfigError: unknown ratio, or an impossible range.
        ValueError: shapes differ.
    """
    if not (0 <= clip_low < 1 and clip_high >= 0):
        raise ConfigError(
            "algorithm.clip_low, algorithm.clip_high: need 0 <= clip_low < 1 and clip_high >= 0, "
            f"got {clip_low} and {clip_high}"
        )
    if dual_clip is not None and dual_clip <= 1:
        raise ConfigError(f"algorithm.dual_clip: must be above 1, got {dual_clip}")
    _same_shape(logprobs_BT=logprobs_BT, old_logprobs_BT=old_logprobs_BT, mask_BT=mask_BT)
    log_ratio_BT = _masked(_wide(logprobs_BT) - _wide(old_logprobs_BT), mask_BT)
    log_ratio_BT = _choose("algorithm.ratio", _LOG_RATIOS, ratio)(log_ratio_BT, mask_BT)
    ratio_BT = log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    loss_BT = torch.maximum(free_BT, clipped_BT)
    capped_BT = torch.zeros_like(loss_BT, dtype=torch.bool)
    if dual_clip is not None:
        cap_BT = (-advantages_BT * dual_clip).expand_as(loss_BT)
        capped_BT = (advantages_BT < 0) & (loss_BT > cap_BT)
        loss_BT = torch.where(capped_BT, cap_BT, loss_BT)
    return Surrogate(
        loss_BT=_masked(loss_BT, mask_BT),
        ratio_BT=ratio_BT.detach(),
        clipped_BT=(clipped_BT > free_BT).detach() & mask_BT.bool(),
        capped_BT=capped_BT & mask_BT.bool(),
    )


@dataclass(frozen=True)
class TokenLoss:
    """What is minimised at each token, [B, T], and what it is made of.

    Attributes:
        loss_BT: surrogate + kl_coef * KL (``kl=in_loss``) - entropy_coef * entropy.
        policy: the surrogate.
        kl_BT: estimate of KL(policy || reference), whether it is part of the loss or not.
    """

    loss_BT: Tensor
    policy: Surrogate
    kl_BT: Tensor


def token_loss(logprobs_BT: Tensor, entropy_BT: Tensor, batch: Mapping[str, Tensor], rules: AlgorithmConfig) -> TokenLoss:
    """The whole objective per token.

    Args:
        logprobs_BT: of the policy, with gradient.
        entropy_BT: of its next-token distributions.
        batch: ``old_logprobs_BT``, ``ref_logprobs_BT``, ``advantages_BT`` and ``mask_BT``.
        rules: of the algorithm.
    """
    mask_BT = batch["mask_BT"]
    policy = surrogate(
        logprobs_BT,
        batch["old_logprobs_BT"],
        batch["advantages_BT"],
        mask_BT,
        rules.clip_low,
        rules.clip_high,
        rules.dual_clip,
        rules.ratio,
    )
    kl_BT = kl_estimate(logprobs_BT, batch["ref_logprobs_BT"], rules.kl_kind, mask_BT)
    loss_BT = policy.loss_BT - rules.entropy_coef * _masked(entropy_BT, mask_BT)
    if rules.kl == Kl.in_loss:
        loss_BT = loss_BT + rules.kl_coef * kl_BT
    return TokenLoss(loss_BT, policy, kl_BT)


def _of_token(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return log_ratio_BT


def _of_sequence(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    mean_B1 = log_ratio_BT.sum(-1, keepdim=True) / mask_BT.bool().sum(-1, keepdim=True).clamp(min=1)
    return _masked(mean_B1.detach() + log_ratio_BT - log_ratio_BT.detach(), mask_BT)


_LOG_RATIOS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"token": _of_token, "sequence": _of_sequence}


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
    aggregate: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate of one batch as one number: :func:`surrogate` and :func:`token_weights` together.

    Args:
        logprobs_BT: of the policy, with gradient.
        old_logprobs_BT: of the policy that the tokens are attributed to.
        advantages_B: one per sequence.
        mask_BT: bool or 0/1, the tokens the policy drew.
        clip_low, clip_high: half widths of the clip range below and above 1.
        aggregate: a key of :data:`AGGREGATES`; ``token-mean`` is ``token_mean``.

    Returns:
        The loss, a scalar (0 with zero gradient when no token is in the mask), and detached scalars over the
        tokens in the mask: ``clip_fraction`` (share whose gradient the clip removed), ``ratio_mean``,
        ``ratio_max``, and ``approx_kl``, the mean of old_logprob - logprob.

    Raises:
        ConfigError: unknown aggregate, or an impossible clip range.
        ValueError: shapes differ.
    """
    reduce = _choose("algorithm.aggregate", AGGREGATES, aggregate.replace("-", "_"))
    if logprobs_BT.dim() != 2 or advantages_B.shape != logprobs_BT.shape[:1]:
        shapes = f"{tuple(logprobs_BT.shape)} and {tuple(advantages_B.shape)}"
        raise ValueError(f"logprobs_BT must be [B, T] and advantages_B [B], got {shapes}")
    tokens = surrogate(logprobs_BT, old_logprobs_BT, advantages_B[:, None], mask_BT, clip_low, clip_high)
    with torch.no_grad():
        metrics = {
            "clip_fraction": token_mean(tokens.clipped_BT.to(tokens.ratio_BT.dtype), mask_BT),
            "ratio_mean": token_mean(tokens.ratio_BT, mask_BT),
            "ratio_max": torch.nn.functional.pad(_masked(tokens.ratio_BT, mask_BT).flatten(), (0, 1)).max(),
            "approx_kl": token_mean(_masked(old_logprobs_BT - logprobs_BT, mask_BT), mask_BT),
        }
    return reduce(tokens.loss_BT, mask_BT), metrics


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


def _wide(values: Tensor) -> Tensor:
    """At least float32: the exponential of a clamped log-ratio does not fit into half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


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
