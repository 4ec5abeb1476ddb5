"""Who meets whom in an evaluation, as one typed choice, and the episodes that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from enum import StrEnum

from nemo_ampo.dialogue.config import PartnerConfig, PolicyConfig, check_agent
from nemo_ampo.dialogue.records import EpisodeKey
from nemo_ampo.dialogue.scenarios import SEATS, Scenario, ScenarioPack
from nemo_ampo.errors import ConfigError
from nemo_ampo.types import Seat


class Pairing(StrEnum):
    """Who sits on the two seats."""

    self_play = "self_play"
    """The policy on both, 450 episodes."""
    partner = "partner"
    """The policy against another agent, on either seat: 900 episodes."""
    vs_base = "vs_base"
    """The policy against its own base, on either seat: the same weights without the thinking modes, or the checkpoint
    it was trained from if ``partner`` names one."""
    api = "api"
    """Two remote endpoints, on either seat: the first one is evaluated."""


class Subset(StrEnum):
    """Which pairings of the folder."""

    all = "all"
    hard = "hard"


def check_pairing(pairing: Pairing, policy: PolicyConfig, partner: PartnerConfig) -> None:
    """The agents a pairing needs, and no others.

    Raises:
        ConfigError: naming the key.
    """
    check_agent(policy)
    if pairing is Pairing.self_play:
        if partner.given:
            raise ConfigError("partner: self-play has none; clear it, or take episode.pairing=partner")
        return
    if pairing is Pairing.vs_base and not partner.given:
        if not policy.modes:
            raise ConfigError(
                "policy.modes: without the modes the policy is its own base; set it, or name partner.checkpoint"
            )
        return
    if pairing is Pairing.api and policy.checkpoint:
        raise ConfigError("policy.checkpoint: episode.pairing=api is for endpoints; a checkpoint takes pairing=partner")
    if pairing is Pairing.api and partner.checkpoint:
        raise ConfigError("partner.checkpoint: episode.pairing=api is for endpoints; give partner.base_url")
    if not partner.given:
        raise ConfigError(f"partner: episode.pairing={pairing.value} needs partner.base_url or partner.checkpoint")
    check_agent(partner)


def opposite(pairing: Pairing, policy: PolicyConfig, partner: PartnerConfig) -> PartnerConfig | None:
    """The agent on the other seat; None where it is the policy itself."""
    if pairing is Pairing.self_play:
        return None
    if pairing is Pairing.vs_base and not partner.given:
        same = {f.name: getattr(policy, f.name) for f in fields(PartnerConfig)}
        return PartnerConfig(**(same | {"modes": False, "system_prompt": None, "mode_bias": None}))
    return partner


def policy_seats(pairing: Pairing) -> tuple[Seat, ...]:
    """Where the policy sits in turn."""
    return ("agent1",) if pairing is Pairing.self_play else SEATS


def chosen(pack: ScenarioPack, subset: Subset, limit: int = -1) -> list[Scenario]:
    """Pairings to be played, by ascending ``env_id``; the first ``limit`` ones unless that is -1.

    Raises:
        ConfigError: none.
    """
    scenarios = [s for s in pack.scenarios.values() if subset is Subset.all or s.hard]
    scenarios = scenarios if limit < 0 else scenarios[:limit]
    if not scenarios:
        raise ConfigError(f"run.subset={subset.value}, run.limit={limit}: the folder has no such pairing")
    return scenarios


def planned(scenarios: Sequence[Scenario], pairing: Pairing, seeds: Sequence[int], model: str) -> Iterator[EpisodeKey]:
    """The key of every episode, seed by seed and seat by seat."""
    return (
        EpisodeKey(scenario.env_id, scenario.combo_id, seat, seed, model)
        for seed in seeds
        for seat in policy_seats(pairing)
        for scenario in scenarios
    )
