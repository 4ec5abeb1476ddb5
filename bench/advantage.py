"""Advantages of 4,096 samples x 512 tokens: ours against plain Python loops, in one run.

Both turn rewards, modes and lengths (groups of 16) into one stored advantage per token. Prints the seconds of each, their
ratio and the largest difference; exits 1 when they disagree.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from math import tanh
from typing import TypeVar

import torch

from nemo_ampo.algo.advantage import group_levels
from nemo_ampo.algo.algorithm import PRESETS
from nemo_ampo.algo.credit import Shares

SAMPLES, TOKENS, GROUP = 4096, 512, 16
REPEATS = 15
Rows = list[list[float]]
T = TypeVar("T")


def loops(rewards: list[float], modes: list[int], lengths: list[int], groups: list[int]) -> Rows:
    """AMPO as one would write it down: a dictionary of groups, then each token of each sample."""
    members: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    out: Rows = []
    terms: dict[int, dict[int, float]] = {}
    scores: dict[int, tuple[float, float]] = {}
    for group, own in members.items():
        values = [rewards[i] for i in own]
        scores[group] = statistics.fmean(values), statistics.stdev(values) + 1e-6
        users = {k: [i for i in own if modes[i] == k] for k in (1, 2, 3, 4)}
        if any(modes[i] == 0 for i in own) or any(len(u) < 2 for u in users.values()):
            continue
        m = {k: statistics.fmean([rewards[i] for i in u]) for k, u in users.items()}
        n = {k: statistics.fmean([lengths[i] for i in u]) for k, u in users.items()}
        m_mean, m_std = statistics.fmean(m.values()), statistics.stdev(m.values()) + 1e-6
        n_mean, n_std = statistics.fmean(n.values()), statistics.stdev(n.values()) + 1e-6
        if all(abs(value - m_mean) <= 1e-6 for value in m.values()):
            terms[group] = {k: tanh(-(n[k] - n_mean) / n_std) for k in m}
        else:
            terms[group] = {k: (m[k] - m_mean) / m_std for k in m}
    for i, group in enumerate(groups):
        mean, std = scores[group]
        advantage = (rewards[i] - mean) / std + terms.get(group, {}).get(modes[i], 0.0)
        row = []
        for _ in range(TOKENS):
            row.append(advantage)
        out.append(row)
    return out


def ours(
    rewards: torch.Tensor, modes: torch.Tensor, lengths: torch.Tensor, groups: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """The trainer's own path. It keeps a view per token; here every token is written too, as the loops do."""
    levels = group_levels(rewards, modes, lengths, groups, rules=PRESETS["ampo"])
    every_token = torch.ones(1, dtype=torch.bool).expand(SAMPLES, TOKENS)
    shares = Shares(levels.sample_B.float(), levels.mode_B.float(), every_token[:, 0], None)
    return out.copy_(shares.per_token(every_token))


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Fewest seconds after one run that warms caches and allocator up, and the result."""
    result = work()
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds), result


def main() -> int:
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(1)
    rewards = torch.rand(SAMPLES, generator=g, dtype=torch.float64)
    modes = torch.randint(1, 5, (SAMPLES,), generator=g)
    lengths = torch.randint(16, TOKENS + 1, (SAMPLES,), generator=g)
    groups = torch.arange(SAMPLES) // GROUP
    inputs = (rewards, modes, lengths, groups)
    lists = tuple(tensor.tolist() for tensor in inputs)
    slow, expected = timed(lambda: loops(*lists))
    # Written into memory that is there: the system's first pages for 8 MiB would take longer than the arithmetic.
    out = torch.zeros(SAMPLES, TOKENS)
    fast, result = timed(lambda: ours(*inputs, out))
    difference = float((result - torch.tensor(expected)).abs().max())
    print(f"advantage: {SAMPLES:,} samples x {TOKENS} tokens, groups of {GROUP}, best of {REPEATS}")
    print(f"  Python loops {slow:.3f} s, ours {fast * 1000:.2f} ms: ratio {slow / fast:.0f}")
    print(f"  largest difference {difference:.1e}")
    return int(difference > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
