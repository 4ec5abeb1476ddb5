"""Where a reply chooses its mode, and what a bias may be."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nemo_ampo.reply.modes import bias_problem
from nemo_ampo.serve.dial import ModeDial


def test_only_what_has_just_opened_chooses_and_only_the_given_modes_are_biased(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    dial = ModeDial(tokenizer)
    opening = tokenizer.encode("Thinking Level:", add_special_tokens=False)
    assert dial.chooses_next(opening)
    for other in ([], [9] * len(opening), opening[:-1], [*opening[:-1], 9], [*opening, dial.choices[1]], opening * 20):
        assert not dial.chooses_next(other)
    assert dial.biases({1: 1.5, 4: -2.0}) == {dial.choices[1]: 1.5, dial.choices[4]: -2.0}


@pytest.mark.parametrize(
    ("bias", "problem"),
    [
        ({}, None),
        ({1: 2.0, 4: -0.5}, None),
        ({5: 1.0}, "there is no mode 5; the modes are 1..4"),
        ({1: 100.0, 2: -100.0}, None),
        ({1: float("nan")}, "must hold finite numbers from -100 to 100"),
        ({1: 1e308}, "must hold finite numbers from -100 to 100"),
    ],
)
def test_what_a_setting_may_be(bias: dict[int, float], problem: str | None) -> None:
    assert bias_problem(bias) == problem
