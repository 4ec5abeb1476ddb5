"""What an evaluation will do, all of it known before anything is called, and what its numbers are made with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nemo_ampo.dialogue.agents import model_hash, system_text
from nemo_ampo.dialogue.config import AgentConfig
from nemo_ampo.dialogue.episode import EpisodeRules
from nemo_ampo.dialogue.prompts import load_texts
from nemo_ampo.dialogue.records import EpisodeKey
from nemo_ampo.dialogue.scenarios import PackCounts, Scenario, load_scenarios, other_seat, unlike_published
from nemo_ampo.model_folder.policy_files import policy_hash
from nemo_ampo.serve.config import ServeConfig
from nemo_ampo.sotopia.config import ScenarioSet, ScoreJudgeConfig, SotopiaConfig
from nemo_ampo.sotopia.dimensions import load_score_prompt
from nemo_ampo.sotopia.pairings import Subset, chosen, opposite, planned, policy_seats
from nemo_ampo.types import Seat


@dataclass(frozen=True)
class EvaluationPlan:
    """A checked configuration with what follows from it.

    Attributes:
        config: as given.
        scenarios: to be played, by ``env_id``.
        whole: they are the whole subset of the folder.
        counts: how much the folder holds.
        sha256: digests of the folder's files, by name.
        rules: of the dialogues.
        model: hash of the policy.
        agents: the policy, and the agent on the other seat (the policy again in self-play).
    """

    config: SotopiaConfig
    scenarios: Mapping[int, Scenario]
    whole: bool
    counts: PackCounts
    sha256: Mapping[str, str]
    rules: EpisodeRules
    model: str
    agents: tuple[AgentConfig, AgentConfig]

    def episode_keys(self) -> Iterator[EpisodeKey]:
        """Of every episode."""
        run = self.config.run
        return planned(list(self.scenarios.values()), self.config.episode.pairing, run.seeds, self.model)

    @property
    def episodes(self) -> int:
        """Number of :meth:`episode_keys`."""
        return len(self.scenarios) * len(policy_seats(self.config.episode.pairing)) * len(self.config.run.seeds)

    @property
    def unlike_published(self) -> str | None:
        """How the folder differs from the set it is meant to be, one phrase; None when it does not."""
        return unlike_published(self.counts) if self.config.data.set is ScenarioSet.published else None

    @property
    def not_whole(self) -> list[str]:
        """Why even a finished run of this plan is no benchmark result, a phrase each."""
        limited = [] if self.whole else ["a limited run is no benchmark result"]
        return limited if self.unlike_published is None else [*limited, self.unlike_published]

    def speakers(self, seat: Seat) -> dict[Seat, AgentConfig]:
        """Who speaks for which seat when the policy sits on ``seat``."""
        policy, other = self.agents
        return {seat: policy, other_seat(seat): other}


def make_plan(config: SotopiaConfig) -> EvaluationPlan:
    """Read the scenarios and decide what is to be played.

    Raises:
        DataError: the scenario files.
        ConfigError: nothing to play.
    """
    pack = load_scenarios(config.data.sotopia_dir)
    run, episode = config.run, config.episode
    scenarios = chosen(pack, run.subset, run.limit)
    texts = load_texts(*([Path(episode.prompts)] if episode.prompts is not None else []))
    return EvaluationPlan(
        config=config,
        scenarios={scenario.env_id: scenario for scenario in scenarios},
        whole=len(scenarios) == len(chosen(pack, run.subset)),
        counts=pack.counts,
        sha256=pack.sha256,
        rules=EpisodeRules(episode.view.value, texts, episode.leave_rule, episode.max_turns, episode.max_prompt_tokens),
        model=model_hash(config.policy),
        agents=(config.policy, opposite(episode.pairing, config.policy, config.partner) or config.policy),
    )


def protocol(plan: EvaluationPlan, old: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything an episode depends on but its key; the result folder is held to it.

    Args:
        plan: of this run.
        old: the folder's protocol. What was asked for before is still asked for: ``subsets`` (by seed) and ``episodes``
            (their number) only grow, and a folder with fewer scores than that is PARTIAL.
    """
    episode, texts = plan.config.episode, plan.rules.texts
    policy, other = plan.agents
    subsets = {str(seed): plan.config.run.subset.value for seed in plan.config.run.seeds}
    for seed, subset in (old or {}).get("subsets", {}).items():
        subsets[seed] = subset if subset == Subset.all.value else subsets.get(seed, subset)
    sizes = {Subset.all.value: plan.counts.scenarios, Subset.hard.value: plan.counts.hard}
    return {
        "subsets": dict(sorted(subsets.items())),
        "episodes": sum(sizes[s] for s in subsets.values()) * len(policy_seats(episode.pairing)),
        "pairing": episode.pairing.value,
        "view": episode.view.value,
        "leave_rule": episode.leave_rule.value,
        "max_turns": episode.max_turns,
        "max_prompt_tokens": episode.max_prompt_tokens,
        "prompts": _digest("\0".join(getattr(texts, field.name).text for field in fields(texts))),
        "scenarios": dict(plan.sha256),
        "policy": _agent(policy),
        "partner": None if other is policy else _agent(other),
        "serve": _serve(plan.config.serve) if any(agent.checkpoint for agent in plan.agents) else None,
    }


def judge_protocol(judge: ScoreJudgeConfig) -> dict[str, Any]:
    """Everything scores depend on but the episode; all scores of one name are held to it."""
    return {
        "model": judge.model,
        "prompt": _digest(load_score_prompt(judge.prompt).text),
        "temperatures": list(judge.temperatures),
        "max_tokens": judge.max_tokens,
        "seed": judge.seed,
        "extra_body": judge.extra_body,
        "models": judge.models,
        "structured": "off" if judge.structured == "off" else "auto or on",
    }


def scenario_set(plan: EvaluationPlan) -> dict[str, Any]:
    """What the folder of scenarios is meant to be and how much it holds; not part of the protocol, which has its digests."""
    return {"set": plan.config.data.set.value, "counts": asdict(plan.counts)}


def _serve(config: ServeConfig) -> dict[str, Any]:
    """What of serving a checkpoint its replies depend on."""
    return {"engine": config.engine.value, "dtype": config.dtype, "extra_args": list(config.extra_args)}


def _agent(config: AgentConfig) -> dict[str, Any]:
    system = system_text(config)
    return {
        "model": config.model if not config.checkpoint else Path(config.checkpoint).name,
        "hash": model_hash(config),
        "modes": config.modes,
        "system_prompt": None if system is None else _digest(system),
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_tokens": config.max_tokens,
        "mode_bias": {str(mode): bias for mode, bias in (config.mode_bias or {}).items()},
        "extra_body": config.extra_body,
        "models": config.models if config.base_url else [],
        "tokenizer": policy_hash(Path(config.tokenizer)) if config.tokenizer else None,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
