"""The first turn of a made-up sale, as a step's tests use it."""

from __future__ import annotations

from nemo_ampo.types import DialogueTurn


def turn(name: str) -> DialogueTurn:
    return DialogueTurn(
        row_id=name,
        dialog=(f"Turn 0: {name} said:",),
        turn=0,
        instruction="Sell.",
        agent1_name=name,
        agent2_name="Bo",
        agent1_goal="sell",
        agent2_goal="buy",
        agent1_state=4.0,
        agent2_state=3.0,
        tag="hard",
    )
