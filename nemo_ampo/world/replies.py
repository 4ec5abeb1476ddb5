"""Gold replies: the right words of a scene, in each of the four modes.

What a deeper mode adds is written out briefly. Modes 3 and 4 hold the arithmetic of a hard scene under ``Assess`` and
``Strategy``; modes 1 and 2 do not. Mode 4 goes on to restate the outcome, so it is longer than mode 3 and knows nothing
more. Every mode speaks the same right words: how often a *model* gets there is for training to show.
"""

from __future__ import annotations

from nemo_ampo.reply.grammar import render_reply
from nemo_ampo.reply.modes import MODES
from nemo_ampo.world.scenes import HardFamily, Numbers, Scene, Side


def gold_reply(scene: Scene, mode: int) -> str:
    """The right reply in the grammar of ``mode``, 1..4."""
    notes = _notes(scene)
    return render_reply(mode, f'"{scene.right_words}"', {name: notes[name] for name in MODES[mode].sections})


def _notes(scene: Scene) -> dict[str, str]:
    """What the scene gives to write under each heading."""
    shared = {
        "History": f"heard {scene.you}" if scene.spoken else "no talk yet",
        "Intent": scene.family.intent,
        "Style": scene.family.style,
        "Response": scene.right_words,
    }
    if not isinstance(scene.family, HardFamily):
        return shared | {
            "Goal": scene.family.intent,
            "Assess": "it is simple",
            "Strategy": "say it",
            "Deduction": f"then {scene.you} is glad",
            "Integration": "we both gain",
        }
    assert scene.mine is not None and scene.theirs is not None, "a hard scene has numbers"
    family, me, you = scene.family, scene.side, 1 - scene.side
    limits = family.sides[me].limit(scene.mine), family.sides[you].limit(scene.theirs)
    right = family.right_answer(*((scene.mine, scene.theirs) if me == 0 else (scene.theirs, scene.mine)))
    return shared | {
        "Goal": family.goal,
        "Assess": f"me {_sum(family.sides[me], scene.mine)} you {_sum(family.sides[you], scene.theirs)}",
        "Strategy": f"{family.rule} of {limits[0]} and {limits[1]} = {right}",
        "Deduction": f"then {scene.you} accepts {right}",
        "Integration": f"we both gain with {right}",
    }


def _sum(side: Side, numbers: Numbers) -> str:
    """The limit one step at a time: ``8 + 1 = 9 + 3 = 12 + 2 = 14``."""
    total, steps = numbers[0], f"{numbers[0]}"
    for number in numbers[1:]:
        total += side.sign * number
        steps += f" {'+' if side.sign > 0 else '-'} {number} = {total}"
    return steps
