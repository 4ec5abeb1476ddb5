import re
from dataclasses import replace

import pytest

from nemo_ampo.data.episodes import read_turns
from nemo_ampo.data.rows import write_rows
from nemo_ampo.dialogue.prompts import (
    OWN_TEXTS,
    agent_instruction,
    context_block,
    load_texts,
    quoted,
    turn_line,
    visible_text,
)
from nemo_ampo.dialogue.scenarios import SEATS, Relationship, load_scenarios, other_seat
from nemo_ampo.errors import ConfigError


def block(scenario, viewer, view="sotopia"):
    """The context block as {label: text}; goals may run over several lines."""
    lines = re.split(
        r"\n(?=Scenario: |Participants: |\w+ \w+'s (?:background|goal): )",
        context_block(scenario, viewer, view),
    )
    return dict(line.split(": ", 1) for line in lines[1:])


def test_the_context_block_in_full(folder):
    friends = load_scenarios(folder).scenarios[3]
    assert context_block(friends, "agent1") == (
        "This is what you know about the conversation.\n"
        "Scenario: Two people wait on a quay.\n"
        "Participants: Ada Quill and Bo Reed\n"
        "Ada Quill's background: Ada Quill, 34 years old, female, works as harbour pilot. Pronouns: She/her. "
        "Ada sings in a choir. Personality and values: Ada is patient and stubborn. "
        "Secret: Ada once sank a boat.\n"
        "Bo Reed's background: Bo Reed, 51 years old, male, works as harbour pilot. Pronouns: He/him. "
        "Bo sings in a choir. Personality and values: Bo is patient and stubborn.\n"
        "Ada Quill's goal: Get a seat\nExtra: you pay $9 Hint: smile {x}\n"
        "Bo Reed's goal: Unknown"
    )


PUBLIC = "{} years old, {}, works as harbour pilot. Pronouns: {}. {} sings in a choir."


@pytest.mark.parametrize(
    ("relationship", "expected"),
    [
        (0, "Unknown"),
        (1, "Bo Reed"),
        (2, "Cy Stone, " + PUBLIC.format(34, "nonbinary", "They/them", "Cy")),
        (
            3,
            "Bo Reed, " + PUBLIC.format(51, "male", "He/him", "Bo") + " Personality and values: Bo is patient and stubborn.",
        ),
        (
            4,
            "Cy Stone, "
            + PUBLIC.format(34, "nonbinary", "They/them", "Cy")
            + " Personality and values: Cy is patient and stubborn.",
        ),
        (
            5,
            "Bo Reed, " + PUBLIC.format(51, "male", "He/him", "Bo") + " Personality and values: Bo is patient and stubborn.",
        ),
    ],
)
def test_the_partner_is_known_as_well_as_the_relationship_says(folder, relationship, expected):
    scenario = load_scenarios(folder).scenarios[relationship]
    seen = block(scenario, "agent1")
    assert seen[f"{scenario.agents[1].name}'s background"] == expected
    assert seen[f"{scenario.agents[1].name}'s goal"] == "Unknown"
    # and the same the other way round
    hidden = block(scenario, "agent2")
    assert ("sank a boat" in hidden["Ada Quill's background"], hidden["Ada Quill's goal"]) == (
        False,
        "Unknown",
    )
    assert hidden[f"{scenario.agents[1].name}'s background"].endswith("once sank a boat.")


def test_the_judge_sees_everything_in_either_view(folder):
    for scenario in load_scenarios(folder).scenarios.values():
        seen = block(scenario, "environment")
        assert seen["Scenario"] == "Two people wait on a quay. The ferry is cancelled."
        for agent in scenario.agents:
            assert f"{agent.first_name} once sank a boat." in seen[f"{agent.name}'s background"]
        assert "Unknown" not in seen.values()
        assert seen == block(scenario, "environment", "reference")


def test_the_reference_view_hides_the_other_goal_only(folder):
    stranger = load_scenarios(folder).scenarios[0]
    seen = block(stranger, "agent1", "reference")
    assert seen["Scenario"] == "Two people wait on a quay. The ferry is cancelled."
    assert seen["Cy Stone's background"].endswith("Secret: Cy once sank a boat.")
    assert seen["Cy Stone's goal"] == "Unknown"


@pytest.mark.parametrize(
    ("viewer", "view", "expected"),
    [
        ("agent1", "sotopia", "a one b open d"),
        ("agent2", "sotopia", "a  two b open d"),
        ("environment", "sotopia", "a one two b open c both d"),
        ("agent1", "reference", "a one two b open c both d"),
    ],
)
def test_viewer_tags(viewer, view, expected):
    text = (
        'a <p viewer="agent_0">one </p><p viewer="agent_1">two </p>b <extra_info>open</extra_info>'
        '<p viewer="environment"> c <strategy_hint>both</strategy_hint></p> d'
    )
    assert visible_text(text, viewer, view) == re.sub(" +", " ", expected)


def test_nested_marks_show_only_what_every_one_of_them_allows():
    text = 'x <p viewer="agent_0">A<p viewer="agent_1">B</p>C</p> y'
    assert visible_text(text, "agent1") == "x AC y"
    assert visible_text(text, "agent2") == "x  y"


def test_the_instruction_in_its_order(folder):
    scenario = load_scenarios(folder).scenarios[3]
    dialog = [turn_line(0, "Ada Quill", "Is this seat free?"), turn_line(1, "Bo Reed")]
    text = agent_instruction(scenario, "agent2", 1, dialog)
    context = context_block(scenario, "agent2")
    role, rest = text.split("\n\n" + context + "\n")
    assert role.startswith("You are Bo Reed.")
    notice, dialogue = rest.split('\nTurn 0: Ada Quill said: "Is this seat free?"\n')
    assert notice.startswith("It is now turn 1,") and '"left the conversation"' in notice and "quotation marks" in notice
    assert dialogue == "\nTurn 1: Bo Reed said:"


def test_the_instruction_makes_a_valid_row(folder, tmp_path):
    scenario = load_scenarios(folder).scenarios[3]
    dialog = [turn_line(0, "Ada Quill", "Is this seat free?"), turn_line(1, "Bo Reed")]
    row = {
        "dialog": dialog,
        "env_id": 3,
        "turn": 1,
        "instruction": agent_instruction(scenario, "agent2", 1, dialog),
        **{"agent1_name": "Ada Quill", "agent2_name": "Bo Reed", "agent1_goal": "g", "agent2_goal": "h"},
        "rollout": 0,
        "state": {"agent1": {"score": 5}, "agent2": {"score": 5}, "step": 1},
    }
    write_rows([row], tmp_path / "rows.json")
    (turn,) = read_turns(tmp_path / "rows.json")
    assert turn.instruction.endswith("\n".join(dialog))


@pytest.mark.parametrize(
    ("said", "expected"),
    [("Hi", '"Hi"'), ('"Hi"', '"Hi"'), ('""Hi', '"Hi"'), ('say "x" now', '"say "x" now"')],
)
def test_spoken_words_stand_between_one_pair_of_quotes(said, expected):
    assert quoted(said) == expected
    assert turn_line(4, "Bo Reed", said) == f"Turn 4: Bo Reed said: {expected}\n"


def test_a_misspelt_view_is_refused(folder):
    with pytest.raises(ConfigError, match="view: expected one of sotopia, reference, got 'referense'"):
        context_block(load_scenarios(folder).scenarios[0], "agent1", "referense")


def test_the_wording_can_be_replaced_and_is_checked(folder, tmp_path):
    mine = tmp_path / "prompts"
    mine.mkdir()
    for path in OWN_TEXTS.glob("*.txt"):
        (mine / path.name).write_text(path.read_text())
    (mine / "role.txt").write_text("Be {{name}}.")
    scenario = load_scenarios(folder).scenarios[3]
    text = agent_instruction(scenario, "agent1", 0, [turn_line(0, "Ada Quill")], texts=load_texts(mine))
    assert text.startswith("Be Ada Quill.\n\nThis is what you know")

    (tmp_path / "worse").mkdir()
    with pytest.raises(ConfigError, match=r"role\.txt"):
        load_texts(tmp_path / "worse")
    for path in mine.glob("*.txt"):
        (tmp_path / "worse" / path.name).write_text(path.read_text())
    (tmp_path / "worse" / "bio_public.txt").write_text("{{name}} {{secret}}")
    with pytest.raises(ConfigError, match=r"bio_public\.txt"):
        load_texts(tmp_path / "worse")


# What the other agent must not learn, on all real scenarios -------------------------------------------------


def leaks(scenario, viewer, view):
    """Which hidden things of the partner or the situation the viewer's prompt holds, by plain search."""
    seat = other_seat(viewer)
    other, name = scenario.agent(seat), scenario.agent(viewer).name
    text = agent_instruction(scenario, viewer, 0, [turn_line(0, name)], view)
    relationship = scenario.environment.relationship
    hidden = {"secret": other.secret}
    if relationship < Relationship.FRIEND:
        hidden["personality"] = other.personality_and_values.strip()
    if relationship < Relationship.ACQUAINTANCE:
        hidden["public"] = other.public_info.strip()
        hidden["occupation"] = f"works as {other.occupation.lower()}. Pronouns: {other.pronouns}. {other.public_info[:20]}"
    for marked in re.findall(r'<p viewer="environment">(.*?)</p>', scenario.environment.scenario):
        hidden["environment"] = marked
    if scenario.goal(seat) != scenario.goal(viewer):
        hidden["goal"] = visible_text(scenario.goal(seat), seat)
    return {what for what, secret in hidden.items() if secret in text}


def test_no_scenario_shows_what_the_relationship_hides(real_folder):
    scenarios = load_scenarios(real_folder).scenarios.values()
    found = {(s.env_id, viewer): leaks(s, viewer, "sotopia") for s in scenarios for viewer in SEATS}
    assert len(found) == 900
    assert {key: what for key, what in found.items() if what} == {}


def test_the_same_search_finds_every_leak_of_the_reference_view(real_folder):
    scenarios = load_scenarios(real_folder).scenarios.values()
    found = {(s.env_id, viewer): leaks(s, viewer, "reference") for s in scenarios for viewer in SEATS}
    assert all("secret" in what for what in found.values())
    assert sum("environment" in what for what in found.values()) == 2 * 50
    assert not any("goal" in what for what in found.values())
    strangers = [s for s in scenarios if s.environment.relationship < Relationship.FRIEND]
    assert all("personality" in found[s.env_id, viewer] for s in strangers for viewer in SEATS)


def changed(scenario, seat):
    """The scenario with everything about ``seat`` replaced that the partner must not see."""
    relationship, i = scenario.environment.relationship, SEATS.index(seat)
    secret = {"secret": "SECRET"}
    private = {"personality_and_values": "PRIVATE"} if relationship < Relationship.FRIEND else {}
    public = (
        {
            "age": 199,
            "occupation": "JOB",
            "gender": "Nonbinary",
            "pronouns": "PRONOUN",
            "public_info": "PUBLIC",
        }
        if relationship < Relationship.ACQUAINTANCE
        else {}
    )
    agents, goals = list(scenario.agents), list(scenario.environment.goals)
    agents[i] = replace(agents[i], **secret, **private, **public)
    goals[i] = "GOAL"
    scene = re.sub(r'(<p viewer="environment">).*?(</p>)', r"\1MARKED\2", scenario.environment.scenario)
    environment = replace(scenario.environment, goals=tuple(goals), scenario=scene)
    return replace(scenario, agents=tuple(agents), environment=environment)


def test_hidden_things_do_not_influence_a_prompt_in_any_way(real_folder):
    for scenario in load_scenarios(real_folder).scenarios.values():
        for viewer in SEATS:
            other = changed(scenario, other_seat(viewer))
            assert context_block(scenario, viewer) == context_block(other, viewer), (scenario.env_id, viewer)
            assert context_block(scenario, viewer, "reference") != context_block(other, viewer, "reference")


def test_everybody_still_sees_what_is_their_own(real_folder):
    for scenario in load_scenarios(real_folder).scenarios.values():
        for viewer in SEATS:
            text, me = context_block(scenario, viewer), scenario.agent(viewer)
            assert me.secret in text and me.personality_and_values.strip() in text and me.public_info.strip() in text
            assert visible_text(scenario.goal(viewer), viewer) in text
            assert not re.search(r"</?(?:p|extra_info|strategy_hint|clarification_hint)\b", text)


def test_the_reference_view_deletes_tags_and_keeps_their_contents_on_every_real_text(real_folder):
    for scenario in load_scenarios(real_folder).scenarios.values():
        for text in (scenario.environment.scenario, *scenario.environment.goals):
            theirs = re.sub(r"\n[ \t]+", "\n", re.sub("<.*?>", "", text, flags=re.DOTALL)).strip()
            for viewer in (*SEATS, "environment"):
                assert visible_text(text, viewer, "reference") == theirs
