from __future__ import annotations

import math

import pytest

from nemo_ampo.algo.mode_choice import choice_metrics, entropy, mode_distribution

LOG2, LOG4 = math.log(2), math.log(4)


def test_drawn_modes_have_their_probability_and_the_others_share_the_rest() -> None:
    found = mode_distribution([1, 1, 3], [math.log(0.5), math.log(0.5), math.log(0.3)])
    assert found == pytest.approx({1: 0.5, 3: 0.3, 2: 0.1, 4: 0.1})


def test_all_modes_drawn_are_scaled_to_one() -> None:
    found = mode_distribution([1, 2, 3, 4], [math.log(p) for p in (0.4, 0.2, 0.1, 0.1)])
    assert found == pytest.approx({1: 0.5, 2: 0.25, 3: 0.125, 4: 0.125})


def test_entropy_by_hand() -> None:
    assert entropy({1: 1.0, 2: 0.0}) == 0
    assert entropy(dict.fromkeys(range(1, 5), 0.25)) == pytest.approx(LOG4)


def test_a_prompt_that_decides_the_mode_and_one_that_does_not() -> None:
    """Each prompt has one mode of its own: no entropy within, log 2 overall."""
    decided = choice_metrics([0, 0, 1, 1], [1, 1, 4, 4], [0.0, 0.0, 0.0, 0.0])
    assert decided == pytest.approx({"mode/entropy": 0, "mode/entropy_overall": LOG2, "mode/adaptivity": LOG2})
    same = choice_metrics([0, 0, 1, 1], [1, 2, 1, 2], [math.log(0.5)] * 4)
    assert same == pytest.approx({"mode/entropy": LOG2, "mode/entropy_overall": LOG2, "mode/adaptivity": 0}, abs=1e-12)


def test_broken_replies_are_left_out() -> None:
    assert choice_metrics([0, 0], [0, 0], [None, -1.0]) == {}
    assert choice_metrics([0, 0, 0], [1, 0, 1], [0.0, -3.0, 0.0])["mode/entropy"] == 0
