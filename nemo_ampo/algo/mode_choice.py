"""How undecided the policy is about its thinking mode: the entropy of the digit after ``Thinking Level: ``.

No extra forward pass is needed. All replies to a prompt begin with the same words, so the log-probabilities that the
trainer has computed anyway hold, at the digit, the exact probability of every mode that was drawn in the group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nemo_ampo.reply.modes import MODES


def mode_distribution(modes: Sequence[int], logprobs: Sequence[float]) -> dict[int, float]:
    """Probability of each mode for one prompt.

    A drawn mode has its policy probability (the mean over its samples, should their first tokens differ). What is left
    of 1 is shared equally by the modes that were not drawn; when all were, or nothing is left, the drawn ones are scaled
    to 1.

    Args:
        modes: 1..4 of each sample, at least one.
        logprobs: log-probability of its mode token.
    """
    drawn = {k: [math.exp(p) for m, p in zip(modes, logprobs, strict=True) if m == k] for k in MODES}
    known = {k: math.fsum(values) / len(values) for k, values in drawn.items() if values}
    total = math.fsum(known.values())
    absent = [k for k in MODES if k not in known]
    if not absent or total >= 1:
        return {k: known.get(k, 0.0) / total for k in MODES}
    return known | {k: (1 - total) / len(absent) for k in absent}


def entropy(distribution: Mapping[int, float]) -> float:
    """-sum p log p, nats; log 4 = 1.386 at most for four modes."""
    return -math.fsum(p * math.log(p) for p in distribution.values() if p > 0)


def choice_metrics(groups: Sequence[int], modes: Sequence[int], logprobs: Sequence[float | None]) -> dict[str, float]:
    """Entropy of the mode choice over the groups of a step.

    ``mode/entropy`` is the mean over prompts of H(mode | prompt), ``mode/entropy_overall`` the entropy of the mean
    distribution, and their difference ``mode/adaptivity``, the mutual information of mode and prompt: 0 when every prompt
    gets the same mix of modes, log 4 when each prompt has one mode of its own and all four are used equally.

    Args:
        groups: of each sample.
        modes: 1..4, 0 for a reply that breaks the grammar, which is left out.
        logprobs: of the mode token, None when there is none.
    """
    by_group: dict[int, list[tuple[int, float]]] = {}
    for group, mode, logprob in zip(groups, modes, logprobs, strict=True):
        if mode in MODES and logprob is not None:
            by_group.setdefault(group, []).append((mode, logprob))
    if not by_group:
        return {}
    distributions = [mode_distribution(*zip(*rows, strict=True)) for rows in by_group.values()]
    overall = {k: math.fsum(d[k] for d in distributions) / len(distributions) for k in MODES}
    within = math.fsum(map(entropy, distributions)) / len(distributions)
    return {
        "mode/entropy": within,
        "mode/entropy_overall": entropy(overall),
        "mode/adaptivity": entropy(overall) - within,
    }
