import dataclasses
import hashlib
from collections import Counter

import pytest

from nemo_ampo.dialogue.scenarios import (
    FILES,
    OFFICIAL_COUNTS,
    PackCounts,
    Relationship,
    check_official,
    load_scenarios,
)
from nemo_ampo.errors import DataError


def test_a_folder_becomes_scenarios_keyed_by_id(folder):
    pack = load_scenarios(folder)
    assert pack.counts == PackCounts(agents=3, environments=6, scenarios=6, hard=2)
    assert list(pack.scenarios) == list(range(6)) and pack.hard == (1, 4)
    scenario = pack.scenarios[1]
    assert (scenario.env_id, scenario.combo_id, scenario.hard) == (1, "C1", True)
    assert scenario.environment is pack.environments["E1"]
    assert scenario.environment.relationship is Relationship.KNOW_BY_NAME
    assert scenario.agent("agent1") is pack.agents["A1"] and scenario.agent("agent2") is pack.agents["A2"]
    assert scenario.agent("agent2").name == "Bo Reed" and scenario.agent("agent2").gender_word == "male"
    assert scenario.goal("agent2").startswith("Keep both seats")
    assert pack.sha256 == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    with pytest.raises(dataclasses.FrozenInstanceError):
        scenario.hard = False


def test_swapping_exchanges_people_goals_and_viewer_tags(content, write_folder):
    content["envs.json"]["E3"]["scenario"] = 'agent_0 here. <p viewer="agent_0">A note.</p><p viewer="environment">!</p>'
    scenario = load_scenarios(write_folder(content)).scenarios[3]
    swapped = scenario.swapped()
    assert swapped.agents == (scenario.agents[1], scenario.agents[0])
    assert swapped.goal("agent1") == scenario.goal("agent2") and swapped.goal("agent2") == scenario.goal("agent1")
    # the note stays with the same person, who now has the other seat; text outside tags is left alone
    assert swapped.environment.scenario == ('agent_0 here. <p viewer="agent_1">A note.</p><p viewer="environment">!</p>')
    assert swapped.swapped() == scenario


def test_unused_fields_are_optional(content, write_folder):
    for key in ("mbti", "moral_values"):
        del content["agents.json"]["A1"][key]
    for key in ("age_constraint", "occupation_constraint", "agent_constraint"):
        del content["envs.json"]["E0"][key]
    content["sotopia_hard.json"] = []
    assert load_scenarios(write_folder(content)).hard == ()


def at(file, *path):
    """A change to one value: at("agents.json", "A1", "age")(content, 3)."""

    def change(content, value):
        target = content[file]
        for key in path[:-1]:
            target = target[key]
        if value is ...:
            del target[path[-1]]
        else:
            target[path[-1]] = value

    return change


A1 = "agents.json, key 'A1', field"
E2 = "envs.json, key 'E2', field"
C0 = "env_agent_combos.json, index 0, field"


@pytest.mark.parametrize(
    ("change", "value", "message"),
    [
        *(
            (at("agents.json", "A1", key), ..., f"{A1} '{key}': is missing")
            for key in (
                "pk",
                "first_name",
                "last_name",
                "age",
                "occupation",
                "gender",
                "gender_pronoun",
                "public_info",
            )
        ),
        (at("agents.json", "A1", "secret"), "", f"{A1} 'secret': is blank"),
        (
            at("agents.json", "A1", "personality_and_values"),
            3,
            f"{A1} 'personality_and_values': expected a string",
        ),
        (at("agents.json", "A1", "pk"), "A9", f"{A1} 'pk': 'A9' differs from the key"),
        (at("agents.json", "A1", "age"), "34", f"{A1} 'age': expected a whole number, got '34'"),
        (at("agents.json", "A1", "age"), 0, f"{A1} 'age': expected at least 1"),
        (at("agents.json", "A1", "gender"), "woman", f"{A1} 'gender': expected one of Man, Woman, Nonbinary"),
        (at("agents.json", "A1", "secrets"), "x", f"{A1} 'secrets': unknown field"),
        (at("agents.json", "A1", "moral_values"), "Care", f"{A1} 'moral_values': expected a list"),
        (at("agents.json", "A1", "mbti"), 4, f"{A1} 'mbti': expected a string"),
        (at("agents.json", "A1"), [], "agents.json, key 'A1': expected an object"),
        *(
            (at("envs.json", "E2", key), ..., f"{E2} '{key}': is missing")
            for key in ("pk", "codename", "source", "scenario", "agent_goals", "relationship")
        ),
        (
            at("envs.json", "E2", "relationship"),
            6,
            f"{E2} 'relationship': expected a value from 0 to 5, got 6",
        ),
        (at("envs.json", "E2", "relationship"), True, f"{E2} 'relationship': expected a whole number"),
        (at("envs.json", "E2", "agent_goals"), ["one"], f"{E2} 'agent_goals': expected 2 strings, got 1"),
        (
            at("envs.json", "E2", "agent_goals", 1),
            " ",
            f"{E2} 'agent_goals[1]': expected a string that is not blank",
        ),
        (
            at("envs.json", "E2", "agent_goals", 0),
            "a <hint>b</hint>",
            f"{E2} 'agent_goals[0]': unknown tag '<hint>'",
        ),
        (
            at("envs.json", "E2", "agent_goals", 0),
            "a</extra_info>",
            f"{E2} 'agent_goals[0]': tag '</extra_info>' closes",
        ),
        (
            at("envs.json", "E2", "scenario"),
            "a <p viewer='x'>b</p>",
            f"{E2} 'scenario': tag \"<p viewer='x'>\": expected",
        ),
        (
            at("envs.json", "E2", "scenario"),
            'a <p viewer="all">b</p>',
            f"{E2} 'scenario': tag '<p viewer=\"all\">'",
        ),
        (
            at("envs.json", "E2", "scenario"),
            'a <p viewer="environment">b',
            f"{E2} 'scenario': tag <p> is not closed",
        ),
        (
            at("envs.json", "E2", "scenario"),
            '< p viewer="environment">b',
            f"{E2} 'scenario': a viewer mark outside",
        ),
        (
            at("envs.json", "E2", "scenario"),
            '<p viewer="agent_0"><extra_info>b</p></extra_info>',
            f"{E2} 'scenario': tag '</p>' closes nothing",
        ),
        (at("env_agent_combos.json", 0, "env_id"), "E9", f"{C0} 'env_id': 'E9' is not in envs.json"),
        (
            at("env_agent_combos.json", 0, "agent_ids", 1),
            "A9",
            f"{C0} 'agent_ids[1]': 'A9' is not in agents.json",
        ),
        (at("env_agent_combos.json", 0, "agent_ids"), ["A1"], f"{C0} 'agent_ids': expected 2 strings"),
        (
            at("env_agent_combos.json", 0, "agent_ids"),
            ["A1", "A1"],
            f"{C0} 'agent_ids': both characters are called",
        ),
        (at("env_agent_combos.json", 0, "seed"), 1, f"{C0} 'seed': unknown field"),
        (at("env_agent_combos.json", 0), "C0", "env_agent_combos.json, index 0: expected an object"),
        (
            at("env_agent_combos.json", 3, "pk"),
            "C1",
            "env_agent_combos.json, index 3, field 'pk': 'C1' is already used by index 1",
        ),
        (
            at("sotopia_hard.json", 1),
            6,
            "sotopia_hard.json, index 1: expected an index of env_agent_combos.json (0 to 5)",
        ),
        (at("sotopia_hard.json", 1), True, "sotopia_hard.json, index 1: expected an index"),
        (at("sotopia_hard.json", 1), "C1", "sotopia_hard.json, index 1: expected an index"),
        (at("sotopia_hard.json", 1), 1, "sotopia_hard.json: an index occurs twice"),
    ],
)
def test_a_bad_value_is_named_with_file_key_and_field(content, write_folder, change, value, message):
    change(content, value)
    folder = write_folder(content)
    with pytest.raises(DataError) as error:
        load_scenarios(folder)
    assert str(error.value).startswith(f"{folder}/{message}")


@pytest.mark.parametrize("name", ["Mia\nTurn 3: Bob said", "Mia\u2028", "M\x1b[2J", "a\tb"])
def test_a_name_of_several_lines_is_refused(content, write_folder, name):
    next(iter(content["agents.json"].values()))["first_name"] = name
    with pytest.raises(DataError, match=r"agents\.json.*first_name': .* one line") as error:
        load_scenarios(write_folder(content))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("agents.json", [], "maps keys to records"),
        ("envs.json", {}, "at least one record"),
        ("env_agent_combos.json", {}, "expected a list"),
        ("sotopia_hard.json", {"hard": []}, "expected a list"),
    ],
)
def test_a_file_of_the_wrong_shape_is_named(content, write_folder, file, value, message):
    content[file] = value
    with pytest.raises(DataError, match=f"{file}: .*{message}"):
        load_scenarios(write_folder(content))


def test_missing_files_and_repeated_keys_are_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder; it should hold agents\.json, envs\.json"):
        load_scenarios(tmp_path / "nowhere")
    text = (folder / "agents.json").read_text()
    (folder / "agents.json").write_text(text.replace('"A3": {', '"A1": {', 1))
    with pytest.raises(DataError, match=r"agents\.json: key 'A1' occurs twice"):
        load_scenarios(folder)
    (folder / "envs.json").unlink()
    (folder / "sotopia_hard.json").unlink()
    with pytest.raises(DataError, match=r"envs\.json, sotopia_hard\.json missing"):
        load_scenarios(folder)


def test_other_sizes_than_the_published_ones_are_listed(folder):
    with pytest.raises(DataError) as error:
        check_official(load_scenarios(folder))
    assert "agents: 3 instead of 40; environments: 6 instead of 90; scenarios: 6 instead of 450; hard: 2" in str(error.value)


def test_the_published_files_pass_every_check(real_folder):
    pack = load_scenarios(real_folder)
    check_official(pack)
    assert pack.counts == OFFICIAL_COUNTS
    relationships = Counter(int(e.relationship) for e in pack.environments.values())
    assert relationships == {0: 25, 1: 4, 2: 10, 3: 46, 4: 5}
    of_hard = Counter(int(pack.scenarios[i].environment.relationship) for i in pack.hard)
    assert of_hard == {3: 30, 0: 25, 2: 10, 4: 5}
    assert set(Counter(s.environment.environment_id for s in pack.scenarios.values()).values()) == {5}
