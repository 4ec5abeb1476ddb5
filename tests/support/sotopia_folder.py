"""A small folder of our own in SOTOPIA's format, and the real one where somebody has it."""

import copy
import json
import os
from pathlib import Path

import pytest

from nemo_ampo.dialogue.scenarios import FILES

REAL = "NEMO_AMPO_SOTOPIA_DIR"


def agent(pk, first, last, gender="Woman", **changes):
    return {
        "pk": pk,
        "first_name": first,
        "last_name": last,
        "age": 34,
        "occupation": "Harbour Pilot",
        "gender": gender,
        "gender_pronoun": "She/her",
        "public_info": f"{first} sings in a choir",
        "personality_and_values": f"{first} is patient and stubborn.",
        "secret": f"{first} once sank a boat",
        "mbti": "INFP",
        "moral_values": ["Care/Harm"],
    } | changes


CONTENT = {
    "agents.json": {
        a["pk"]: a
        for a in (
            agent("A1", "Ada", "Quill"),
            agent("A2", "Bo", "Reed", gender="Man", age=51, gender_pronoun="He/him"),
            agent("A3", "Cy", "Stone", gender="Nonbinary", gender_pronoun="They/them"),
        )
    },
    "envs.json": {
        f"E{relationship}": {
            "pk": f"E{relationship}",
            "codename": "quay",
            "source": "ours",
            "scenario": 'Two people wait on a quay. <p viewer="environment">The ferry is cancelled.</p>',
            "agent_goals": [
                "Get a seat\n <extra_info> Extra: you pay $9 <strategy_hint>Hint: smile {x}</strategy_hint></extra_info>",
                "Keep both seats (<clarification_hint>you have two bags</clarification_hint>)",
            ],
            "relationship": relationship,
            "age_constraint": "[(18, 70), (18, 70)]",
            "occupation_constraint": "nan",
            "agent_constraint": None,
        }
        for relationship in range(6)
    },
    "env_agent_combos.json": [
        {
            "pk": f"C{relationship}",
            "env_id": f"E{relationship}",
            "agent_ids": ["A1", "A2" if relationship % 2 else "A3"],
        }
        for relationship in range(6)
    ],
    "sotopia_hard.json": [1, 4],
}


@pytest.fixture
def content():
    """The four files as Python values, free to be spoilt."""
    return copy.deepcopy(CONTENT)


@pytest.fixture
def write_folder(tmp_path):
    def write(content):
        folder = tmp_path / "sotopia"
        folder.mkdir(exist_ok=True)
        for name, value in content.items():
            (folder / name).write_text(json.dumps(value), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def folder(content, write_folder):
    return write_folder(content)


@pytest.fixture(scope="session")
def real_folder():
    """The published files, in the folder the variable names or in shared/sotopia beside the repository."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "sotopia"
    path = Path(os.environ.get(REAL, beside))
    if not all((path / name).is_file() for name in FILES):
        reason = f"no SOTOPIA files in {path}; set {REAL} to their folder"
        print(reason)
        pytest.skip(reason)
    return path
