"""Configuration of a SOTOPIA evaluation: every key, its default and its unit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from omegaconf import MISSING

from nemo_ampo.chat.config import EndpointConfig, check_endpoint_files
from nemo_ampo.dialogue.config import LeaveRule, PartnerConfig, PolicyConfig, ViewName
from nemo_ampo.dialogue.prompts import load_texts
from nemo_ampo.errors import ConfigError
from nemo_ampo.files import check_folder, is_folder, look_alike
from nemo_ampo.ranges import LARGEST_SEED, number
from nemo_ampo.serve.config import ServeConfig, check_serve, choose_engine
from nemo_ampo.sotopia.dimensions import PROMPT, TEMPERATURES, load_score_prompt
from nemo_ampo.sotopia.pairings import Pairing, Subset, check_pairing

_JUDGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


@dataclass
class SotopiaRunConfig:
    """Where an evaluation lives and how much of it is run.

    Attributes:
        dir: result folder; the same command continues what it holds.
        seeds: each gives all episodes once more.
        subset: ``all`` pairings of the folder or the ``hard`` ones. A folder with the hard ones may be completed later.
        limit: the first so many pairings of the subset, for a trial; -1 takes all. A limited run is marked PARTIAL.
        judge_only: play nothing; score the saved episodes that ``judge.name`` has not scored yet.
        estimate_only: say what the run will call and cost, and stop.
        episodes_in_flight: episodes played at a time. About twice the endpoints' ``max_concurrency``: with fewer they idle
            while dialogues are begun and scored, with many more a whole crowd of dialogues ends at once.
    """

    dir: str = MISSING
    seeds: list[int] = number([1], least=0, most=LARGEST_SEED, whole=True)
    subset: Subset = Subset.all
    limit: int = number(-1, least=1, or_else=(-1,))
    judge_only: bool = False
    estimate_only: bool = False
    episodes_in_flight: int = number(128, least=1, most=65536)


class ScenarioSet(StrEnum):
    """What a folder of scenarios is meant to be."""

    published = "published"
    """The evaluation set that benchmark numbers are made with; a folder of other sizes makes the run PARTIAL."""
    own = "own"
    """Somebody's own scenarios, as many as there are."""


@dataclass
class SotopiaDataConfig:
    """The scenarios.

    Attributes:
        sotopia_dir: folder with agents.json, envs.json, env_agent_combos.json and sotopia_hard.json.
        set: ``published`` expects the 450 published pairings, 70 of them hard, and calls any other folder PARTIAL; ``own``
            takes the folder as it is, and the report says so.
    """

    sotopia_dir: str = MISSING
    set: ScenarioSet = ScenarioSet.published


@dataclass
class EpisodeConfig:
    """The protocol of the dialogues.

    Attributes:
        pairing: ``self_play``, ``partner``, ``vs_base`` or ``api``.
        view: ``sotopia`` keeps private what the relationship keeps private; ``reference`` shows everybody everything but
            the partner's goal, as the authors' code does. Scores of the two cannot be compared.
        leave_rule: ``strict``: an utterance ends the dialogue when it is the leaving words and nothing else;
            ``reference``: when it contains them.
        max_turns: utterances of both speakers together.
        max_prompt_tokens: a longer chat-templated prompt ends the dialogue unspoken, tokens.
        prompts: folder with another wording, one file for each of nemo_ampo/prompts/sotopia; null takes those.
    """

    pairing: Pairing = Pairing.self_play
    view: ViewName = ViewName.sotopia
    leave_rule: LeaveRule = LeaveRule.strict
    max_turns: int = number(20, least=1, most=1000)
    max_prompt_tokens: int = number(6144, least=1)
    prompts: str | None = None


@dataclass(frozen=True)
class ScoreJudgeConfig(EndpointConfig):
    """The evaluator's endpoint, and how it is asked for the seven dimensions.

    Attributes:
        max_tokens: longest reply asked for; fourteen reasoned scores.
        name: of this scoring. Another name scores the same episodes afresh, with another judge or once more with this one.
        prompt: shipped prompt name or the path of a file with the same placeholders.
        temperatures: sampling temperature of each try for readable scores; its length is the number of tries.
        seed: sent with the first try, one more with each further one; null sends none.
    """

    section: ClassVar[str] = "judge"

    max_tokens: int = number(4096, least=1)
    name: str = "default"
    prompt: str = PROMPT
    temperatures: list[float] = number(list(TEMPERATURES), least=0, most=2, whole=False)
    seed: int | None = number(None, least=0, most=LARGEST_SEED, whole=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = "letters, digits, dot, dash and underscore only, at most 120"
        self._check("name", bool(_JUDGE_NAME.fullmatch(self.name)), rule)
        self._check("temperatures", len(self.temperatures) > 0, "must name at least one try")


@dataclass
class SotopiaConfig:
    """SOTOPIA evaluation."""

    run: SotopiaRunConfig
    data: SotopiaDataConfig
    episode: EpisodeConfig
    policy: PolicyConfig
    partner: PartnerConfig
    serve: ServeConfig
    judge: ScoreJudgeConfig


def check_sotopia(config: SotopiaConfig) -> None:
    """Rules between keys, and the files they name.

    Raises:
        ConfigError: naming the key.
    """
    run, episode = config.run, config.episode
    if not run.seeds or len(set(run.seeds)) != len(run.seeds):
        raise ConfigError(f"run.seeds: different numbers from 0 up, at least one, got {run.seeds}")
    check_folder("run.dir", run.dir)
    for key, folder in (("data.sotopia_dir", config.data.sotopia_dir), ("episode.prompts", episode.prompts)):
        if folder is not None and not (folder and is_folder(folder)):
            raise ConfigError(f"{key}: no such folder: {folder}{look_alike(folder)}")
    check_pairing(episode.pairing, config.policy, config.partner)
    for endpoint in (config.policy, config.partner, config.judge):
        check_endpoint_files(endpoint)
    check_serve(config.serve)
    local = [agent.checkpoint for agent in (config.policy, config.partner) if agent.checkpoint]
    if local:
        choose_engine(config.serve, bool(config.policy.mode_bias and config.policy.checkpoint), local)
    elif config.serve != ServeConfig():
        raise ConfigError(
            "serve: nothing is served here without policy.checkpoint or partner.checkpoint; leave its keys out"
        )
    load_texts(*([Path(episode.prompts)] if episode.prompts is not None else []))
    load_score_prompt(config.judge.prompt)
