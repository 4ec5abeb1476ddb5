"""The mode dial as a logits processor of ``generate``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from nemo_ampo.reply.modes import bias_problem
from nemo_ampo.serve.dial import DialProcessor, ModeDial


def test_only_rows_that_choose_now_are_biased_and_only_at_their_modes(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    dial = ModeDial(tokenizer)
    opening = tokenizer.encode("Thinking Level:", add_special_tokens=False)
    prompt, other = [7] * 3, [9] * len(opening)
    assert dial.chooses_next(opening)
    # The prompt itself may hold the opening; only what was generated counts.
    ids_BT = torch.tensor([prompt + opening, prompt + other, opening[:1] * 3 + opening[:-1] + [9]])
    logits_BV = torch.randn(3, len(tokenizer), generator=torch.Generator().manual_seed(0))
    biased_BV = DialProcessor(dial, {1: 1.5, 4: -2.0}, len(prompt))(ids_BT, logits_BV)
    moved = {(row, int(token)): round(float(by), 4) for row, token in (biased_BV != logits_BV).nonzero().tolist()
             for by in [biased_BV[row, token] - logits_BV[row, token]]}  # fmt: skip
    assert moved == {(0, dial.choices[1]): 1.5, (0, dial.choices[4]): -2.0}


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
