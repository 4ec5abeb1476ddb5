"""Scenes are drawn the same way every time, and their gold replies obey the grammar and say what the numbers demand."""

from __future__ import annotations

import re
from random import Random

import pytest

from nemo_ampo.reply.grammar import parse_reply
from nemo_ampo.reply.modes import MODES
from nemo_ampo.world.replies import gold_reply
from nemo_ampo.world.scenes import EASY, HARD, HardFamily, Scene, draw_scene


def scenes(count: int, heldout: bool = False) -> list[Scene]:
    rng = Random(5)
    return [draw_scene(rng, heldout) for _ in range(count)]


def test_equal_seeds_draw_equal_scenes() -> None:
    assert scenes(50) == scenes(50)


def test_every_family_comes_in_both_seats_and_both_kinds_are_as_frequent() -> None:
    drawn = scenes(2000)
    assert {(s.family.name, s.seat) for s in drawn} == {
        (family.name, seat) for family in (*EASY, *HARD) for seat in ("agent1", "agent2")
    }
    assert 900 < sum(s.tag == "hard" for s in drawn) < 1100


def test_hard_scenes_are_acted_from_both_sides() -> None:
    drawn = [s for s in scenes(2000) if s.tag == "hard"]
    assert {(s.family.name, s.side) for s in drawn} == {(family.name, side) for family in HARD for side in (0, 1)}


def test_the_open_line_has_the_parity_of_the_seat() -> None:
    for scene in scenes(300):
        turn = len(scene.spoken)
        assert (turn % 2 == 0) == (scene.seat == "agent1")
        assert scene.dialog[-1] == f"Turn {turn}: {scene.me} said:"
        assert scene.instruction.endswith(scene.dialog[-1])


def test_the_partners_goal_is_hidden_from_the_speaker() -> None:
    for scene in scenes(300):
        assert f"Goal of {scene.you}: Unknown" in scene.instruction
        assert scene.partner_goal not in scene.instruction


@pytest.mark.parametrize(
    ("name", "first", "second", "right"),
    [
        ("price", (3, 2, 3, 2), (21, 2, 1, 2), 13),  # 10 and 16
        ("meet", (2, 1, 1, 2), (8, 3, 3, 3), 17),  # 6 and 17
        ("share", (6, 1, 1, 2), (4, 3, 2, 3), 11),  # 10 and 12
        ("gift", (22, 3, 1, 2), (20, 3, 2, 3), 12),  # 16 and 12
    ],
)
def test_right_answers_worked_by_hand(
    name: str, first: tuple[int, int, int, int], second: tuple[int, int, int, int], right: int
) -> None:
    (family,) = (f for f in HARD if f.name == name)
    assert family.right_answer(first, second) == right


def test_the_answer_of_a_hard_scene_stands_nowhere_in_the_prompt() -> None:
    for scene in scenes(1000):
        if scene.tag == "hard":
            (answer,) = re.findall("[0-9]+", scene.right_words)
            assert answer not in re.findall("[0-9]+", scene.instruction)


@pytest.mark.parametrize("mode", MODES)
def test_gold_replies_obey_the_strict_grammar_and_speak_the_right_words(mode: int) -> None:
    for scene in scenes(200):
        reply = parse_reply(gold_reply(scene, mode), strict=True)
        assert (reply.mode, reply.answer) == (mode, f'"{scene.right_words}"')


def test_only_the_deeper_modes_write_the_arithmetic() -> None:
    for scene in scenes(200):
        shows_sums = [" = " in gold_reply(scene, mode) for mode in MODES]
        assert shows_sums == [False, False, scene.tag == "hard", scene.tag == "hard"]


def test_every_written_step_of_a_sum_is_true() -> None:
    for scene in scenes(300):
        if not isinstance(scene.family, HardFamily):
            continue
        notes = parse_reply(gold_reply(scene, 3)).thinking
        chains = re.findall(r"[0-9]+(?: [+-] [0-9]+ = [0-9]+)+", notes["Assess"])
        assert len(chains) == 2
        limits = []
        for chain in chains:
            start, *steps = re.split(r" (?=[+-])", chain)
            total = int(start)
            for step in steps:
                sign, number, _, result = step.split()
                total += int(number) if sign == "+" else -int(number)
                assert total == int(result)
            limits.append(total)
        x, y, right = (int(n) for n in re.findall("[0-9]+", notes["Strategy"]))
        assert [x, y] == limits
        assert right == {"middle": (x + y) / 2, "later": max(x, y), "less": min(x, y)}[scene.family.rule]
