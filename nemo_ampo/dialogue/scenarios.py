"""SOTOPIA's characters, situations and pairings, read from four JSON files and checked completely.

``agents.json`` holds the characters, ``envs.json`` the situations with one private goal per seat,
``env_agent_combos.json`` who plays which situation, ``sotopia_hard.json`` the indices of the hard pairings. A
:class:`Scenario` is one pairing; its ``env_id`` is its index in ``env_agent_combos.json``, as in the authors'
code and data.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from nemo_ampo.data.rows import Record, as_record, read_json
from nemo_ampo.errors import DataError
from nemo_ampo.types import Seat

AGENTS_FILE = "agents.json"
ENVIRONMENTS_FILE = "envs.json"
COMBOS_FILE = "env_agent_combos.json"
HARD_FILE = "sotopia_hard.json"
FILES = (AGENTS_FILE, ENVIRONMENTS_FILE, COMBOS_FILE, HARD_FILE)

SEATS: tuple[Seat, Seat] = ("agent1", "agent2")

GENDER_WORDS: dict[str, str] = {"Man": "male", "Woman": "female", "Nonbinary": "nonbinary"}

AGENT_FIELDS = (
    *("pk", "first_name", "last_name", "age", "occupation", "gender", "gender_pronoun", "public_info"),
    *("personality_and_values", "secret"),
)
UNUSED_AGENT_TEXTS = ("big_five", "decision_making_style", "mbti", "model_id")
UNUSED_AGENT_LISTS = ("moral_values", "schwartz_personal_values")
ENVIRONMENT_FIELDS = ("pk", "codename", "source", "scenario", "agent_goals", "relationship")
UNUSED_ENVIRONMENT_FIELDS = ("age_constraint", "occupation_constraint", "agent_constraint")

TAG = re.compile(r"<(?P<close>/?)(?P<name>[A-Za-z_]\w*)(?P<attributes>[^<>]*)>")
"""A tag inside a scenario or goal text."""
HINT_TAGS = ("extra_info", "strategy_hint", "clarification_hint")
"""Tags that mark a hint for whoever may read the text; they hide nothing."""
VIEWER = re.compile(r'\s+viewer="(environment|agent_0|agent_1)"')
"""The attribute of a ``<p>`` tag whose content only one reader may see."""


class Relationship(IntEnum):
    """How well the two characters know each other."""

    STRANGER = 0
    KNOW_BY_NAME = 1
    ACQUAINTANCE = 2
    FRIEND = 3
    ROMANTIC = 4
    FAMILY = 5


@dataclass(frozen=True)
class AgentProfile:
    """One character.

    Attributes:
        agent_id: key in ``agents.json``.
        first_name, last_name, age, occupation, gender, pronouns, public_info: what an acquaintance knows.
        personality_and_values: what a friend, lover or relative knows too.
        secret: what nobody else knows.
    """

    agent_id: str
    first_name: str
    last_name: str
    age: int
    occupation: str
    gender: str
    pronouns: str
    public_info: str
    personality_and_values: str
    secret: str

    @property
    def name(self) -> str:
        """Full name, the one in front of the character's utterances."""
        return f"{self.first_name} {self.last_name}"

    @property
    def gender_word(self) -> str:
        """``male``, ``female`` or ``nonbinary``."""
        return GENDER_WORDS[self.gender]


@dataclass(frozen=True)
class Environment:
    """One situation.

    Attributes:
        environment_id: key in ``envs.json``.
        codename: short name of the situation; several situations may share it.
        source: data set the situation was made from.
        scenario: what is going on; may hold viewer tags.
        goals: private goals of agent1 and agent2; may hold hint tags.
        relationship: of the two characters.
    """

    environment_id: str
    codename: str
    source: str
    scenario: str
    goals: tuple[str, str]
    relationship: Relationship


@dataclass(frozen=True)
class Scenario:
    """One situation with the two characters who play it.

    Attributes:
        env_id: index in ``env_agent_combos.json``; what RL rows and episode records call ``env_id``.
        combo_id: key of the pairing.
        environment: the situation.
        agents: who sits in seat agent1 and in seat agent2.
        hard: whether the pairing belongs to SOTOPIA-hard.
    """

    env_id: int
    combo_id: str
    environment: Environment
    agents: tuple[AgentProfile, AgentProfile]
    hard: bool

    def agent(self, seat: Seat) -> AgentProfile:
        """The character in a seat."""
        return self.agents[SEATS.index(seat)]

    def goal(self, seat: Seat) -> str:
        """The private goal of a seat, tags included."""
        return self.environment.goals[SEATS.index(seat)]

    def swapped(self) -> Scenario:
        """The same situation with the seats exchanged, so that the other character opens the dialogue."""
        first, second = self.environment.goals
        goals = (_swap_viewers(second), _swap_viewers(first))
        environment = replace(self.environment, scenario=_swap_viewers(self.environment.scenario), goals=goals)
        return replace(self, environment=environment, agents=(self.agents[1], self.agents[0]))


def other_seat(seat: Seat) -> Seat:
    """The partner's seat."""
    return SEATS[1 - SEATS.index(seat)]


def _swap_viewers(text: str) -> str:
    other = {"agent_0": "agent_1", "agent_1": "agent_0"}
    return TAG.sub(lambda tag: re.sub("agent_[01]", lambda m: other[m.group()], tag.group()), text)


@dataclass(frozen=True)
class PackCounts:
    """How much a folder holds."""

    agents: int
    environments: int
    scenarios: int
    hard: int


OFFICIAL_COUNTS = PackCounts(agents=40, environments=90, scenarios=450, hard=70)
"""Sizes of the published SOTOPIA evaluation set, the one benchmark numbers are made with."""


@dataclass(frozen=True)
class ScenarioPack:
    """Everything one folder holds.

    Attributes:
        agents, environments: by key.
        scenarios: by ``env_id``, 0 .. number of pairings - 1, in order.
        sha256: hex digest of each file, by file name.
    """

    agents: Mapping[str, AgentProfile]
    environments: Mapping[str, Environment]
    scenarios: Mapping[int, Scenario]
    sha256: Mapping[str, str]

    @property
    def hard(self) -> tuple[int, ...]:
        """``env_id`` of every hard pairing, ascending."""
        return tuple(env_id for env_id, scenario in self.scenarios.items() if scenario.hard)

    @property
    def counts(self) -> PackCounts:
        """Sizes, to be compared with :data:`OFFICIAL_COUNTS`."""
        return PackCounts(len(self.agents), len(self.environments), len(self.scenarios), len(self.hard))


def unlike_published(counts: PackCounts) -> str | None:
    """How a folder differs in size from the published evaluation set, as one phrase; None when it does not."""
    names = {"scenarios": "pairings", "environments": "scenarios", "agents": "agents", "hard": "hard pairings"}
    sizes = [(what, getattr(counts, key), getattr(OFFICIAL_COUNTS, key)) for key, what in names.items()]
    wrong = [f"{found} of {expected} {what}" for what, found, expected in sizes if found != expected]
    return f"not the published set: {', '.join(wrong)}" if wrong else None


def check_official(pack: ScenarioPack) -> None:
    """Refuse a folder that is not the published evaluation set, by its sizes.

    Raises:
        DataError: naming each size that differs.
    """
    pairs = [(name, getattr(pack.counts, name), value) for name, value in vars(OFFICIAL_COUNTS).items()]
    wrong = [f"{name}: {found} instead of {expected}" for name, found, expected in pairs if found != expected]
    if wrong:
        raise DataError(f"not the published SOTOPIA evaluation set ({'; '.join(wrong)})")


def load_scenarios(folder: str | Path) -> ScenarioPack:
    """Read and check the four files of a folder.

    Args:
        folder: with ``agents.json``, ``envs.json``, ``env_agent_combos.json`` and ``sotopia_hard.json``
            (``[]`` when no pairing is hard).

    Raises:
        DataError: naming file, key and field of the first thing that is missing, misspelt, of a wrong type,
            out of range or refers to something that does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it should hold {', '.join(FILES)}")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: {', '.join(missing)} missing; a SOTOPIA folder holds {', '.join(FILES)}")
    agents = {r.text("pk"): _agent(r) for r in _keyed_records(folder / AGENTS_FILE)}
    environments = {r.text("pk"): _environment(r) for r in _keyed_records(folder / ENVIRONMENTS_FILE)}
    combos = _list(folder / COMBOS_FILE)
    hard = _hard_ids(folder / HARD_FILE, len(combos))
    scenarios: dict[int, Scenario] = {}
    first_place: dict[str, int] = {}
    for env_id, value in enumerate(combos):
        record = as_record(value, f"{folder / COMBOS_FILE}, index {env_id}")
        scenarios[env_id] = _scenario(record, env_id, agents, environments, env_id in hard)
        first = first_place.setdefault(scenarios[env_id].combo_id, env_id)
        if first != env_id:
            raise record.error("pk", f"{scenarios[env_id].combo_id!r} is already used by index {first}")
    sha256 = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    return ScenarioPack(agents, environments, scenarios, sha256)


def _keyed_records(path: Path) -> list[Record]:
    """Records of a file that maps keys to objects which repeat their key as ``pk``."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: expected an object that maps keys to records, with at least one record")
    records = [as_record(value, f"{path}, key '{key}'") for key, value in content.items()]
    for key, record in zip(content, records, strict=True):
        if record.text("pk") != key:
            raise record.error("pk", f"{record.text('pk')!r} differs from the key")
    return records


def _list(path: Path) -> list[Any]:
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list")
    return content


def _agent(record: Record) -> AgentProfile:
    record.only((*AGENT_FIELDS, *UNUSED_AGENT_TEXTS, *UNUSED_AGENT_LISTS))
    for key in UNUSED_AGENT_TEXTS:
        record.optional_text(key)
    for key in UNUSED_AGENT_LISTS:
        if record.has(key):
            record.texts(key)
    if record.text("gender") not in GENDER_WORDS:
        raise record.error("gender", f"expected one of {', '.join(GENDER_WORDS)}, got {record.text('gender')!r}")
    return AgentProfile(
        agent_id=record.text("pk"),
        first_name=record.name("first_name"),
        last_name=record.name("last_name"),
        age=record.integer("age", low=1),
        occupation=record.text("occupation"),
        gender=record.text("gender"),
        pronouns=record.text("gender_pronoun"),
        public_info=record.text("public_info"),
        personality_and_values=record.text("personality_and_values"),
        secret=record.text("secret"),
    )


def _environment(record: Record) -> Environment:
    record.only((*ENVIRONMENT_FIELDS, *UNUSED_ENVIRONMENT_FIELDS))
    for key in UNUSED_ENVIRONMENT_FIELDS:
        record.optional_text(key)
    _check_tags(record, "scenario", record.text("scenario"))
    goals = record.texts("agent_goals", count=2)
    for i, goal in enumerate(goals):
        _check_tags(record, f"agent_goals[{i}]", goal)
    return Environment(
        environment_id=record.text("pk"),
        codename=record.text("codename"),
        source=record.text("source"),
        scenario=record.text("scenario"),
        goals=(goals[0], goals[1]),
        relationship=Relationship(record.integer("relationship", min(Relationship), max(Relationship))),
    )


def _check_tags(record: Record, key: str, text: str) -> None:
    """Refuse tags that are unknown or not nested: one that is not understood would leak what it hides."""
    open_tags: list[str] = []
    for tag in TAG.finditer(text):
        name, attributes = tag["name"], tag["attributes"]
        if name not in (*HINT_TAGS, "p"):
            raise record.error(key, f"unknown tag {tag.group()!r}; expected p, {', '.join(HINT_TAGS)}")
        if tag["close"]:
            if not open_tags or open_tags.pop() != name or attributes:
                raise record.error(key, f"tag {tag.group()!r} closes nothing")
            continue
        if not (VIEWER.fullmatch(attributes) if name == "p" else not attributes):
            raise record.error(
                key,
                f'tag {tag.group()!r}: expected <p viewer="environment|agent_0|agent_1">, and no attributes in other tags',
            )
        open_tags.append(name)
    if open_tags:
        raise record.error(key, f"tag <{open_tags[-1]}> is not closed")
    if re.search(r"viewer\s*=", TAG.sub("", text)):
        raise record.error(key, "a viewer mark outside a well-formed tag; what it should hide would be shown")


def _scenario(
    record: Record,
    env_id: int,
    agents: Mapping[str, AgentProfile],
    environments: Mapping[str, Environment],
    hard: bool,
) -> Scenario:
    record.only(("pk", "env_id", "agent_ids"))
    environment = environments.get(record.text("env_id"))
    if environment is None:
        raise record.error("env_id", f"{record.text('env_id')!r} is not in {ENVIRONMENTS_FILE}")
    agent_ids = record.texts("agent_ids", count=2)
    for i, agent_id in enumerate(agent_ids):
        if agent_id not in agents:
            raise record.error(f"agent_ids[{i}]", f"{agent_id!r} is not in {AGENTS_FILE}")
    first, second = (agents[agent_id] for agent_id in agent_ids)
    if first.name == second.name:
        raise record.error("agent_ids", f"both characters are called {first.name!r}; lines could not be told apart")
    return Scenario(env_id, record.text("pk"), environment, (first, second), hard)


def _hard_ids(path: Path, num_combos: int) -> frozenset[int]:
    ids = _list(path)
    for i, env_id in enumerate(ids):
        if isinstance(env_id, bool) or not isinstance(env_id, int) or not 0 <= env_id < num_combos:
            raise DataError(f"{path}, index {i}: expected an index of {COMBOS_FILE} (0 to {num_combos - 1}), got {env_id!r}")
    if len(set(ids)) != len(ids):
        raise DataError(f"{path}: an index occurs twice")
    return frozenset(ids)
