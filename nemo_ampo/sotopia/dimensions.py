"""The seven dimensions a SOTOPIA evaluator scores each agent on, with their ranges (inclusive)."""

from __future__ import annotations

DIMENSIONS: dict[str, tuple[int, int]] = {
    "believability": (0, 10),
    "relationship": (-5, 5),
    "knowledge": (0, 10),
    "secret": (-10, 0),
    "social_rules": (-10, 0),
    "financial_and_material_benefits": (-5, 5),
    "goal": (0, 10),
}
OVERALL = "overall"
"""Mean of the seven."""
