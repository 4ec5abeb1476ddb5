"""What a run will ask of its judge, before it starts: calls, tokens, dollars.

Prompt tokens are measured on the run's own data; the judge's replies are assumed, with ``max_tokens`` as the upper end.
Calls are those of a run whose replies all obey the grammar (others are not judged) and whose verdicts can all be read at
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from nemo_ampo.chat.question import CHARS_PER_TOKEN
from nemo_ampo.errors import DataError
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.prompts import load_prompt, render_judge_prompt
from nemo_ampo.types import DialogueTurn, JudgeRequest

if TYPE_CHECKING:
    from rich.table import Table

REPLY_TOKENS = 350
"""Two paragraphs of reasoning, their scores and the JSON around them."""

ANSWER = '"' + "word " * 40 + '"'
"""As long as an answer that the length reward likes."""


@dataclass(frozen=True)
class JudgeEstimate:
    """One judge's part of a run.

    Attributes:
        judge: ``judge`` or ``judge.second``.
        model: as the endpoint knows it.
        calls: verdicts to be asked for.
        prompt_tokens: mean of one call.
        reply_tokens, most_reply_tokens: of one call, assumed and at most.
        usd, most_usd: of all calls; None without a price.
    """

    judge: str
    model: str
    calls: int
    prompt_tokens: float
    reply_tokens: int
    most_reply_tokens: int
    usd: float | None
    most_usd: float | None


def estimate_training(
    config: JudgeConfig,
    turns: Sequence[DialogueTurn],
    steps: int,
    samples_per_step: int,
    count: Callable[[str], int] | None = None,
    reply_tokens: int = REPLY_TOKENS,
) -> list[JudgeEstimate]:
    """The judges of an AMPO run.

    Args:
        config: of the judge; its second judge, if any, follows in the list.
        turns: the data.
        steps, samples_per_step: of the run.
        count: tokens of a text; 4 characters each if None.
        reply_tokens: assumed length of a reply.

    Raises:
        DataError: no turns.
    """
    estimates = [estimate_calls(config, turns, steps * samples_per_step, count, reply_tokens)]
    if config.second is not None:
        compared = math.ceil(steps / config.second.every) * min(config.second.samples, samples_per_step)
        estimates.append(estimate_calls(config.second_judge(), turns, compared, count, reply_tokens))
    return estimates


def estimate_calls(
    config: JudgeConfig,
    turns: Sequence[DialogueTurn],
    calls: int,
    count: Callable[[str], int] | None = None,
    reply_tokens: int = REPLY_TOKENS,
) -> JudgeEstimate:
    """One judge that is asked ``calls`` times about replies to ``turns``; see :func:`estimate_training`."""
    if not turns:
        raise DataError("the data has no rows to estimate from")
    template, tokens_of = load_prompt(config.prompt), count or _by_characters
    prompts = [render_judge_prompt(template, JudgeRequest.about(turn, ANSWER)) for turn in turns]
    prompt_tokens = fmean(tokens_of(prompt) for prompt in prompts)
    price, likely = config.price.get(config.model), min(reply_tokens, config.max_tokens)
    usd = [
        price.usd(round(calls * prompt_tokens), calls * reply) if price else None for reply in (likely, config.max_tokens)
    ]
    return JudgeEstimate(config.section, config.model, calls, prompt_tokens, likely, config.max_tokens, usd[0], usd[1])


def notes_on(config: JudgeConfig, estimates: Sequence[JudgeEstimate], steps: int) -> list[str]:
    """What the limits make of it, one line each."""
    calls = sum(estimate.calls for estimate in estimates)
    tokens = sum(estimate.calls * (estimate.prompt_tokens + estimate.reply_tokens) for estimate in estimates)
    usd = sum(estimate.usd or 0.0 for estimate in estimates)
    notes = []
    if config.requests_per_minute:
        hours = calls / config.requests_per_minute / 60
        notes.append(f"judge.requests_per_minute={config.requests_per_minute}: at least {hours:.1f} h")
    if config.tokens_per_minute:
        hours = tokens / config.tokens_per_minute / 60
        notes.append(f"judge.tokens_per_minute={config.tokens_per_minute}: at least {hours:.1f} h")
    if config.max_calls is not None and config.max_calls < calls:
        notes.append(f"judge.max_calls={config.max_calls} ends the run after about step {steps * config.max_calls // calls}")
    if config.max_usd is not None and config.max_usd < usd:
        notes.append(f"judge.max_usd={config.max_usd:g} ends the run after about step {int(steps * config.max_usd / usd)}")
    return notes


def estimate_table(estimates: Sequence[JudgeEstimate], counted_by: str) -> Table:
    """For the terminal."""
    from rich.table import Table

    table = Table(title=f"judge calls of this run; prompt tokens counted by {counted_by}", title_justify="left")
    for name in ("judge", "model", "calls", "prompt tokens", "reply tokens", "dollars", "dollars at most"):
        table.add_column(name, justify="left" if name in ("judge", "model") else "right")
    for row in estimates:
        prompts, replies = (row.calls * tokens / 1e6 for tokens in (row.prompt_tokens, row.reply_tokens))
        usd = [f"{value:,.2f}" if value is not None else "no price given" for value in (row.usd, row.most_usd)]
        sizes = (f"{prompts:,.2f} M ({row.prompt_tokens:,.0f} each)", f"{replies:,.2f} M ({row.reply_tokens:,} each)")
        table.add_row(row.judge, row.model, f"{row.calls:,}", *sizes, *usd)
    return table


def _by_characters(text: str) -> int:
    return math.ceil(len(text) / CHARS_PER_TOKEN)
