"""Run folders made by the code that writes real ones: samples, rewards, advantages, metrics, run log."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch

from nemo_ampo.algo.advantage import ampo_with_report
from nemo_ampo.algo.algorithm import JudgeFailure
from nemo_ampo.algo.guard import GuardConfig, Streaks
from nemo_ampo.algo.mode_choice import choice_metrics
from nemo_ampo.algo.rewards import RewardConfig, score_reply
from nemo_ampo.chat.stats import StatsRecorder
from nemo_ampo.errors import FormatError
from nemo_ampo.judge.stats import JudgeStats
from nemo_ampo.reply.grammar import parse_reply, render_reply
from nemo_ampo.reply.modes import MODES
from nemo_ampo.run.metrics import guard_metrics, step_metrics
from nemo_ampo.run.runlog import RunLog
from nemo_ampo.types import DialogueTurn, Sample, Verdict

GROUP = 16


def turn(row_id: str, tag: str, index: int = 1) -> DialogueTurn:
    return DialogueTurn(
        row_id=row_id,
        dialog=('Turn 0: Ada said: "Shall we share the cake?"\n', f"Turn {index}: Ben said:"),
        turn=index,
        instruction="...",
        agent1_name="Ada",
        agent2_name="Ben",
        agent1_goal="get cake",
        agent2_goal="be kind",
        agent1_state=4.0,
        agent2_state=5.0,
        tag=tag,
    )


def draw_sample(rng: random.Random, group: int, tag: str, late: float) -> Sample:
    """A sample whose mode follows its tag the more, the later in the run it is drawn."""
    wanted = 1 if tag == "easy" else 4
    mode = wanted if rng.random() < late * 0.5 else rng.randint(1, 4)
    sections = {name: f"{name} of the speaker" for name in MODES[mode].sections}
    text = render_reply(mode, '"Thank you for the cake."', sections)
    if rng.random() < 0.02:
        text = text.replace("<|end_of_answer|>", "")
    row = turn(f"{tag}-{group}", tag, 1 + 2 * (group % 3))
    verdict = None if rng.random() < 0.01 else Verdict(5.0, 5.0 + 4 * rng.random())
    answer_tokens = 8
    valid_format = _obeys(text)
    return Sample(
        group=group,
        row_id=row.row_id,
        tag=tag,
        turn=row.turn,
        dialogue="\n".join(row.dialog),
        text=text,
        num_tokens=20 + 30 * mode + rng.randint(0, 9),
        answer_tokens=answer_tokens if valid_format else 0,
        finish="eos",
        parts=score_reply(row, text, verdict, answer_tokens, RewardConfig()),
        verdict=verdict if valid_format else None,
        judge_error="timeout" if verdict is None and valid_format else None,
        judge_latency_s=None if verdict is None else 0.1 + rng.random(),
    )


def _obeys(text: str) -> bool:
    try:
        parse_reply(text)
    except FormatError:
        return False
    return True


def ask(judge: StatsRecorder, sample: Sample, rng: random.Random) -> None:
    """What the client counts for one sample."""
    if sample.verdict is None and sample.judge_error is None:
        return
    judge.asked()
    for cause in ("rate_limit", "timeout", "parse"):
        if rng.random() < 0.02:
            judge.called()
            judge.repeated(cause)
            if cause == "parse":
                judge.unreadable()
    if sample.verdict is None:
        judge.called()
        judge.failed("timeout")
    elif rng.random() < 0.1:
        judge.hit()
        judge.solved()
    else:
        judge.called()
        judge.answered(0.1 + rng.random(), 900, 120, 0.0004)
        judge.solved()


def write_ampo(folder: Path, steps: int, extra_rows: tuple[dict[str, Any], ...] = ()) -> None:
    rng = random.Random(0)
    log = RunLog(folder)
    judge, streaks, guard = StatsRecorder(), Streaks(), GuardConfig(min_mode_share=0.12, collapse_steps=5)
    for step in range(steps):
        samples = [
            draw_sample(rng, group, tag, step / steps)
            for group, tag in enumerate(("easy", "hard", "easy", "hard"))
            for _ in range(GROUP)
        ]
        advantages_B, report = ampo_with_report(
            torch.tensor([s.parts.reward or 0.0 for s in samples]),
            torch.tensor([s.parts.mode for s in samples]),
            torch.tensor([float(s.num_tokens) for s in samples]),
            torch.tensor([s.group for s in samples]),
            torch.tensor([s.parts.valid for s in samples]),
        )
        for sample in samples:
            ask(judge, sample, rng)
        logprobs = [math.log(0.25 + 0.5 * step / steps) if s.parts.mode else None for s in samples]
        policy = {"kl": 0.001 * step, "entropy": 1.0 - 0.005 * step, "grad_norm": 1.5, "lr": 1e-6, "loss": 0.1}
        times = {"rollout": 3.0, "judge_wait": 0.5, "logprobs": 1.0, "reference": 0.9, "update": 2.5, "step": 8.0}
        metrics = (
            step_metrics(samples, advantages_B, report)
            | guard_metrics(samples, 0, JudgeFailure.mask)
            | choice_metrics([s.group for s in samples], [s.parts.mode for s in samples], logprobs)
            | JudgeStats.of([judge.snapshot()]).metrics()
            | {f"policy/{name}": value for name, value in policy.items()}
            | {f"time/{name}_s": value for name, value in times.items()}
            | {"engine/logprob_gap": 1e-6, "mismatch/kl": 1e-7, "throughput/rollout_tokens_per_s": 400.0}
        )
        streaks = streaks.after(metrics, guard)
        log.metrics(step, metrics | streaks.metrics(guard))
        rows = [s.row() | {"advantage": a} for s, a in zip(samples, advantages_B.tolist(), strict=True)]
        log.rollouts(step, [*extra_rows, *rows] if step == 0 else rows)


def write_bc(folder: Path, steps: int) -> None:
    log = RunLog(folder)
    for step in range(steps):
        log.metrics(step, {"bc/loss": 2.0 / (step + 1), "bc/lr": 1e-3, "bc/grad_norm": 1.0})
        if step % 10 == 9:
            values = {"bc/val_loss": 2.0 / (step + 1), "bc/valid_replies": step / steps}
            values |= {f"bc/val_loss_mode_{k}": k / (step + 1) for k in MODES}
            values |= {f"bc/mode_{k}_share": 0.25 * step / steps for k in MODES}
            log.metrics(step, values, kind="val")


def evaluation(name: str, goal: float | None) -> dict[str, Any]:
    text = render_reply(1, '"Thank you."')
    sample = {
        "row_id": "e-1",
        "tag": "easy",
        "dialogue": "Turn 0: Ada said:",
        "text": text if goal is not None else "nonsense",
        "answer": '"Thank you."' if goal is not None else None,
        "mode": 1 if goal is not None else 0,
        "reward": goal,
        "goal": goal,
        "format_rule": None if goal is not None else "level",
        "valid": True,
        "num_tokens": 12,
        "agent1_score": None,
        "agent2_score": None,
    }
    summary = {
        "samples": 64,
        "reward": goal if goal is not None else -2.0,
        "goal": goal,
        "valid_format": 0.0 if goal is None else 0.96,
        "tokens": 101.25,
        "judge_failed": 3,
        "mode_share": {"1": 0.25, "2": 0.25, "3": 0.25, "4": 0.2} if goal is not None else {},
    }
    return {
        "name": name,
        "checkpoint": f"runs/{name}/hf",
        "seed": 1,
        "summary": {"all": summary, "easy": summary | {"samples": 32}},
        "samples": [sample],
    }


def write_evaluations(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, goal in (("ampo", 0.71), ("base", None), ("bc", 0.55)):
        (folder / f"{name}.json").write_text(json.dumps(evaluation(name, goal)))
