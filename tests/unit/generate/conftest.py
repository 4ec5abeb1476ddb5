"""A teacher on a real port, and a SOTOPIA folder of situations nobody evaluates on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rule_teacher import RuleTeacher, serving


@pytest.fixture
def teacher():
    with serving(RuleTeacher()) as running:
        yield running


def agent(pk: str, first: str, last: str) -> dict[str, object]:
    return {
        "pk": pk,
        "first_name": first,
        "last_name": last,
        "age": 30,
        "occupation": "Baker",
        "gender": "Woman",
        "gender_pronoun": "She/her",
        "public_info": f"{first} bakes",
        "personality_and_values": "Patient.",
        "secret": f"{first} burnt a cake",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three situations, five pairings."""
    files = {
        "agents.json": {a["pk"]: a for a in (agent("A1", "Ada", "Quill"), agent("A2", "Bo", "Reed"))},
        "envs.json": {
            f"E{i}": {
                "pk": f"E{i}",
                "codename": "market",
                "source": "ours",
                "scenario": f"Two bakers share stall number {i} on a market.",
                "agent_goals": [f"Get the left half of stall {i}", f"Keep all of stall {i}"],
                "relationship": i,
            }
            for i in range(3)
        },
        "env_agent_combos.json": [
            {"pk": f"C{i}", "env_id": f"E{i % 3}", "agent_ids": ["A1", "A2"] if i < 3 else ["A2", "A1"]} for i in range(5)
        ],
        "sotopia_hard.json": [2],
    }
    path = tmp_path / "scenes"
    path.mkdir()
    for name, value in files.items():
        (path / name).write_text(json.dumps(value))
    return path
