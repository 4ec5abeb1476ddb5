r"""The servers behind docs/sotopia-report.png: readable speech and a judge, both by rule.

Start it with ``python tests/support/picture_server.py``, then, with U=http://127.0.0.1:8123/v1::

    python -m recipes.sotopia --config-name api run.dir=runs/ampo-against-partner data.sotopia_dir=DIR \
        episode.pairing=partner policy.base_url=$U policy.model=rule-speaker policy.modes=true \
        partner.base_url=$U partner.model=rule-partner judge.base_url=$U judge.model=rule-judge
"""

from __future__ import annotations

import hashlib
import json
import re

import uvicorn
from fastapi import FastAPI, Request

from nemo_ampo.reply.grammar import render_reply
from nemo_ampo.reply.modes import MODES
from nemo_ampo.sotopia.dimensions import DIMENSIONS

MODELS = ("rule-speaker", "rule-partner", "rule-judge")
PORT = 8123
OPEN_LINE = re.compile(r"Turn (\d+): (.+) said:\Z")

SPEECH = (
    ("Good to see you. Do you have a minute for something that matters to me?", "Hello! I have been hoping we could talk."),
    ("Of course. Tell me first how you see it.", "Sure, what is on your mind?"),
    ("I would like us to find something that works for both of us.", "Honestly, I have thought about it all week."),
    ("I hear you, though I cannot give up everything I came for.", "That is fair, but look at it from my side too."),
    ("What if we each give a little? I could start.", "Suppose we split it; would you be content with that?"),
    (
        "Half of it I can accept. The rest needs a better reason.",
        "You are asking a lot, yet I want us to stay on good terms.",
    ),
    ("Then let me offer you my help in return.", "Let us write down what we agree on so far."),
    ("That changes things. I think we are nearly there.", "Good. I can live with that if you can."),
    ("Agreed, and thank you for being so open.", "Then it is settled. I am glad we talked."),
)
THOUGHTS = {
    "History": "We have both said what we want, and neither has given way yet.",
    "Goal": "I want my share; the other one wants to keep the upper hand.",
    "Intent": "The last words test how far I will go.",
    "Assess": "I am about half way, and the tone is still friendly.",
    "Strategy": "Offer something small first and ask for the main point after it.",
    "Deduction": "If I press, there will be a quarrel; if I offer help, a yes is likely.",
    "Integration": "Offer help, then name the point, then leave room for an answer.",
    "Style": "Warm and plain.",
    "Response": "A short offer with a question at its end.",
}


def draw(text: str, size: int) -> int:
    """A number below ``size`` from the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % size


def speak(prompt: str, thinks: bool) -> str:
    """What a character says; thinkers choose deeper modes in the middle of a dialogue."""
    line = OPEN_LINE.search(prompt)
    assert line is not None, prompt[-200:]
    turn = int(line[1])
    words = SPEECH[min(turn, len(SPEECH) - 1)][draw(f"{thinks} {prompt}", 2)]
    if turn >= 5 + draw(f"{thinks} {prompt.splitlines()[2]} {line[2]}", 9):
        words = "left the conversation"
    if not thinks:
        return f'"{words}"'
    weights = (5, 3, 1, 1) if turn < 2 else (1, 2, 5, 4) if turn < 6 else (3, 3, 3, 1)
    mode = [k for k, weight in zip(MODES, weights, strict=True) for _ in range(weight)][draw(f"mode {prompt}", sum(weights))]
    reply = render_reply(mode, f'"{words}"', {name: THOUGHTS[name] for name in MODES[mode].sections})
    return reply[:-12] if draw(f"break {prompt}", 40) == 0 else reply


def judge(prompt: str) -> str:
    """Scores by rule: the goal comes closer the longer they talk, for the one who speaks last a little more."""
    turns = prompt.count("\nTurn ")
    grades = {}
    for seat, agent in enumerate(("agent1", "agent2")):
        goal = min(9, 5 + turns // 3 + (turns % 2 != seat))
        grades[agent] = {
            name: {
                "reasoning": "Both kept to the matter, and the last turns brought them closer.",
                "score": max(low, min(high, centre + draw(f"{agent} {name} {prompt}", 4) - 2)),
            }
            for (name, (low, high)), centre in zip(DIMENSIONS.items(), (9, 2, 4, 0, 0, 1, goal), strict=True)
        }
    return json.dumps(grades)


app = FastAPI()


@app.get("/v1/models")
async def models() -> dict:
    return {"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]}


@app.post("/v1/chat/completions")
async def complete(request: Request) -> dict:
    body = await request.json()
    messages = body["messages"]
    prompt = messages[-1]["content"]
    text = judge(prompt) if body["model"] == "rule-judge" else speak(prompt, messages[0]["role"] == "system")
    usage = {"prompt_tokens": sum(len(m["content"]) for m in messages) // 4, "completion_tokens": len(text) // 4}
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": usage,
    }


if __name__ == "__main__":
    uvicorn.run(app, port=PORT, log_level="warning")
