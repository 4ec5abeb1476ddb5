"""The judge: right replies get all, others what they deserve, and no text breaks it."""

from __future__ import annotations

import subprocess
import sys
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_ampo.world.pack import judge_request
from nemo_ampo.world.rules import AGAINST, NEAR, OPEN, OWN_ONLY, PARTIAL_SCORE, RIGHT, UNCLEAR, judge_dialogue
from nemo_ampo.world.scenes import HARD, HardFamily, Scene, draw_scene

SELLER = "Agree on the middle price. You paid 3, 2 and 3 and want 2 more."  # limit 10
BUYER = "Agree on the middle price. You have 21 and keep 2, 1 and 2."  # limit 16, middle 13
OFFER = 'Turn 0: Ada said: "I paid 3, 2 and 3 and want 2 more."\n\nTurn 1: Ben said:'
THANK = ("Thank Ben for the cake.", "Hear thanks from Ada for the cake.")


def scenes(count: int) -> list[Scene]:
    rng = Random(6)
    return [draw_scene(rng, heldout=False) for _ in range(count)]


def verdict(scene: Scene, words: str | None) -> tuple[float, float]:
    """Scores of the speaker and of the partner."""
    r = judge_request(scene, words)
    first, second = judge_dialogue(r.dialogue, r.agent1_name, r.agent1_goal, r.agent2_name, r.agent2_goal)
    return (first, second) if scene.seat == "agent1" else (second, first)


def price(words: str) -> tuple[float, float]:
    return judge_dialogue(f'{OFFER} "{words}"', "Ada", SELLER, "Ben", BUYER)


def thanks(words: str) -> tuple[float, float]:
    return judge_dialogue(f'Turn 0: Ada said: "{words}"', "Ada", THANK[0], "Ben", THANK[1])


def test_the_right_words_get_all_in_every_family_and_seat_and_nothing_is_decided_before() -> None:
    seen = set()
    for scene in scenes(1500):
        assert verdict(scene, None) == (OPEN, OPEN)
        assert verdict(scene, scene.right_words) == (RIGHT, RIGHT)
        seen.add((scene.family.name, scene.seat))
    assert len(seen) == 18


def test_every_other_number_gets_at_most_half() -> None:
    for scene in scenes(200):
        if not isinstance(scene.family, HardFamily):
            continue
        right = next(n for n in range(100) if scene.right_words == scene.family.reply.format(n))
        for number in set(range(40)) - {right}:
            assert verdict(scene, scene.family.reply.format(number))[0] <= NEAR


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("Let us agree on 13 coins.", (RIGHT, RIGHT)),
        ("013", (RIGHT, RIGHT)),
        ("14", (NEAR, NEAR)),
        ("10", (OWN_ONLY, OWN_ONLY)),  # within both limits, but 3 from the middle
        ("9", (AGAINST, OWN_ONLY)),
        ("17", (OWN_ONLY, AGAINST)),
        ("Let us talk about the weather.", (OPEN, OPEN)),
        ("12 or 13", (OPEN, UNCLEAR)),
        ("13. Yes, 13.", (RIGHT, RIGHT)),
        ("I have 21 and keep 2, 1 and 2.", (OPEN, OPEN)),
        ("13" + " very" * 40, (OPEN, UNCLEAR)),
        ("9" * 6000, (OPEN, UNCLEAR)),
        ("", (OPEN, OPEN)),
    ],
)
def test_a_price_is_graded(words: str, expected: tuple[float, float]) -> None:
    assert price(words) == expected


def test_only_the_latest_offer_counts() -> None:
    both = f'{OFFER} "13"\n\nTurn 2: Ada said: "No, 20."'
    assert judge_dialogue(both, "Ada", SELLER, "Ben", BUYER) == (OWN_ONLY, AGAINST)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("Thank you Ben for the cake.", RIGHT),
        ("thank you, BEN, for the CAKE!", RIGHT),
        ("Thank you for the cake.", PARTIAL_SCORE),
        ("Thank you Ben.", PARTIAL_SCORE),
        ("Thank you Ben for the song.", UNCLEAR),
        ("Thank you Ben for the cake and the song.", UNCLEAR),
        ("Thank you Ben and Eva for the cake.", UNCLEAR),
        ("Ben, the cake.", OPEN),
    ],
)
def test_an_act_is_graded(words: str, expected: float) -> None:
    assert thanks(words) == (expected, expected)


def test_the_partners_own_words_do_not_count_as_the_act() -> None:
    dialogue = 'Turn 0: Ada said: "Hello Ben."\n\nTurn 1: Ben said: "Thank you Ben for the cake."'
    assert judge_dialogue(dialogue, "Ada", THANK[0], "Ben", THANK[1]) == (OPEN, OPEN)


@pytest.mark.parametrize(
    "goals",
    [("borrow the car", "keep the car"), (SELLER, SELLER), (SELLER, THANK[1]), (THANK[0], THANK[0]), ("", "")],
)
def test_goals_that_are_no_pair_of_the_world_leave_both_where_they_were(goals: tuple[str, str]) -> None:
    assert judge_dialogue(f'{OFFER} "13"', "Ada", goals[0], "Ben", goals[1]) == (OPEN, OPEN)


def test_a_reply_cannot_pose_as_later_turns_to_guess_more_than_once() -> None:
    wrong_last = price('13\nTurn 2: Ada said: "20"\nTurn 3: Ben said: "25')
    assert wrong_last == (OWN_ONLY, AGAINST)


TEXT = st.text(max_size=80) | st.sampled_from([SELLER, BUYER, *THANK, OFFER, "Turn 0: Ada said:", "٣", "1" * 5000])


@given(TEXT, st.sampled_from(["Ada", "", "(", "Ben"]), TEXT, st.sampled_from(["Ben", "", "[a", "Ada"]), TEXT)
def test_any_text_gets_scores_in_range(dialogue: str, name1: str, goal1: str, name2: str, goal2: str) -> None:
    first, second = judge_dialogue(dialogue, name1, goal1, name2, goal2)
    assert 0 <= first <= 10 and 0 <= second <= 10


def test_the_judge_needs_no_torch() -> None:
    code = "import sys, nemo_ampo.world.rules, nemo_ampo.world.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_hard_families_are_read_back() -> None:
    for family in HARD:
        goals = [family.goal_of(0, (9, 1, 2, 3)), family.goal_of(1, (20, 1, 2, 3))]
        right = family.right_answer((9, 1, 2, 3), (20, 1, 2, 3))
        assert judge_dialogue(f'Turn 0: Ada said: "{right}"', "Ada", goals[0], "Ben", goals[1])[0] == RIGHT
