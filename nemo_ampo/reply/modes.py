"""The four thinking modes in one table.

A mode is a depth of deliberation the policy writes out before it speaks; its sections are the headings a valid reply
of that mode contains, in this order (paper section 3; names and order as in the authors' data).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Mode:
    """One thinking mode.

    Attributes:
        id: 1 (no thinking) .. 4 (full deliberation), the number the policy writes.
        name: the paper's name.
        sections: headings inside the thinking block, in order; empty for mode 1.
    """

    id: int
    name: str
    sections: tuple[str, ...]


MODES: dict[int, Mode] = {
    mode.id: mode
    for mode in (
        Mode(1, "reactive response", ()),
        Mode(2, "intentional analysis", ("Intent", "Style", "Response")),
        Mode(
            3,
            "strategic adaptation",
            ("History", "Goal", "Intent", "Assess", "Strategy", "Style", "Response"),
        ),
        Mode(
            4,
            "prospective simulation",
            (
                "History",
                "Goal",
                "Intent",
                "Assess",
                "Strategy",
                "Deduction",
                "Integration",
                "Style",
                "Response",
            ),
        ),
    )
}

NUM_MODES = len(MODES)
NO_MODE = 0
"""Mode id of a reply that breaks the grammar."""


MAX_BIAS = 100.0
"""Size of a mode bias; far beyond what makes a choice certain, and within what every number format holds."""


def bias_problem(bias: Mapping[int, float]) -> str | None:
    """What is wrong with a mode dial's setting (mode to a number added to its logit), in words; None when nothing is."""
    unknown = [str(mode) for mode in bias if mode not in MODES]
    if unknown:
        return f"there is no mode {', '.join(unknown)}; the modes are 1..{max(MODES)}"
    bounded = all(abs(value) <= MAX_BIAS for value in bias.values())  # false for NaN
    return None if bounded else f"must hold finite numbers from -{MAX_BIAS:g} to {MAX_BIAS:g}"
