"""What an evaluation will call and cost, before it starts: an upper estimate from the scenarios' own texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_ampo.dialogue.agents import CHARACTERS_PER_TOKEN, system_text
from nemo_ampo.dialogue.config import AgentConfig
from nemo_ampo.dialogue.episode import EpisodeRules
from nemo_ampo.dialogue.prompts import instruction_after, instruction_head
from nemo_ampo.dialogue.scenarios import SEATS, Scenario
from nemo_ampo.sotopia.config import ScoreJudgeConfig
from nemo_ampo.sotopia.dimensions import load_score_prompt, score_messages
from nemo_ampo.types import Seat

if TYPE_CHECKING:
    from rich.table import Table

UTTERANCE_TOKENS = 45
"""Spoken words of one turn with the line's head, as they come back in every later prompt."""
MODES_REPLY_TOKENS = 600
"""A reply with its thinking; trained policies stay below on average."""
PLAIN_REPLY_TOKENS = 60
JUDGE_REPLY_TOKENS = 1200


@dataclass(frozen=True)
class EndpointEstimate:
    """Calls and tokens of one endpoint.

    Attributes:
        role: ``policy``, ``partner`` or ``judge``.
        model: as the endpoint knows it, or the checkpoint.
        calls: without repetitions.
        prompt_tokens, completion_tokens: over all calls.
        usd: None without a price for the model.
    """

    role: str
    model: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None


def estimate_agents(
    episodes: Iterable[tuple[Scenario, Mapping[Seat, AgentConfig], int]], rules: EpisodeRules
) -> list[EndpointEstimate]:
    """Calls of the speakers, if nobody leaves early.

    Args:
        episodes: scenario, who speaks on which seat, and the turns already played.
        rules: of the dialogues.
    """
    totals: dict[str, list[int]] = {}
    configs: dict[str, AgentConfig] = {}
    notice = _tokens(instruction_after("", 0, [], rules.texts))
    system: dict[str, int] = {}
    heads: dict[tuple[int, Seat], int] = {}
    for scenario, agents, done in episodes:
        for turn in range(done, rules.max_turns):
            seat = SEATS[turn % 2]
            config = agents[seat]
            role = config.section
            configs[role] = config
            if role not in system:
                system[role] = _tokens(system_text(config) or "")
            if (scenario.env_id, seat) not in heads:
                heads[scenario.env_id, seat] = _tokens(instruction_head(scenario, seat, rules.view, rules.texts))
            total = totals.setdefault(role, [0, 0, 0])
            total[0] += 1
            total[1] += system[role] + heads[scenario.env_id, seat] + notice + turn * UTTERANCE_TOKENS
            total[2] += min(config.max_tokens, MODES_REPLY_TOKENS if config.modes else PLAIN_REPLY_TOKENS)
    return [_estimate(role, configs[role], *total) for role, total in totals.items()]


def estimate_judge(scenarios: Iterable[Scenario], judge: ScoreJudgeConfig, rules: EpisodeRules) -> EndpointEstimate:
    """Calls of the judge, if its first reply can be read."""
    template = load_score_prompt(judge.prompt)
    prompts = [_tokens(score_messages(scenario, "", template)[0]["content"]) for scenario in scenarios]
    prompt_tokens = sum(prompts) + len(prompts) * rules.max_turns * UTTERANCE_TOKENS
    return _estimate("judge", judge, len(prompts), prompt_tokens, len(prompts) * min(judge.max_tokens, JUDGE_REPLY_TOKENS))


def estimate_table(estimates: Iterable[EndpointEstimate]) -> Table:
    """For the terminal."""
    from rich.table import Table

    table = Table(title="what is left to be called, at most", title_justify="left")
    table.add_column("role", no_wrap=True)
    table.add_column("model", overflow="fold")
    for name in ("calls", "prompt tokens", "reply tokens", "US dollars"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in estimates:
        usd = "no price given" if row.usd is None else f"{row.usd:,.2f}"
        tokens = (f"{row.prompt_tokens / 1e6:,.2f} M", f"{row.completion_tokens / 1e6:,.2f} M")
        table.add_row(row.role, row.model, f"{row.calls:,}", *tokens, usd)
    return table


def _estimate(
    role: str, config: AgentConfig | ScoreJudgeConfig, calls: int, prompt_tokens: int, completion_tokens: int
) -> EndpointEstimate:
    price = config.price.get(config.model)
    model = config.model or getattr(config, "checkpoint", "")
    usd = price.usd(prompt_tokens, completion_tokens) if price else None
    return EndpointEstimate(role, model, calls, prompt_tokens, completion_tokens, usd)


def _tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)
