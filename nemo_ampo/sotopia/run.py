"""A whole evaluation: play every planned episode, have each one scored, lose nothing.

What is done is read from the result folder, so a run that was stopped at any point, by whatever, goes on where it was:
no call whose answer was recorded is made again. Episodes are independent of each other; a few hundred are in memory at
a time, however many there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from nemo_ampo.chat.cache import ReplyFile
from nemo_ampo.chat.client import ChatClient
from nemo_ampo.chat.limiter import LocalLimiter, SpentFile
from nemo_ampo.chat.limits import Limits
from nemo_ampo.dialogue.agents import Agent, token_counter
from nemo_ampo.dialogue.config import AgentConfig
from nemo_ampo.dialogue.episode import new_episode, play
from nemo_ampo.dialogue.records import Episode, EpisodeKey, Termination, Turn
from nemo_ampo.dialogue.scenarios import Scenario
from nemo_ampo.errors import ChatError, ConfigError, UserError
from nemo_ampo.files import write_once
from nemo_ampo.output.outcome import Outcome
from nemo_ampo.run.interrupt import stop_after_calls
from nemo_ampo.run.runlog import write_provenance
from nemo_ampo.serve.capabilities import announces_mode_bias
from nemo_ampo.serve.launch import served
from nemo_ampo.sotopia.config import ScoreJudgeConfig
from nemo_ampo.sotopia.dimensions import SCORES_SCHEMA, ScoreError, Scores, load_score_prompt, parse_scores, score_messages
from nemo_ampo.sotopia.estimate import EndpointEstimate, estimate_agents, estimate_judge
from nemo_ampo.sotopia.plan import EvaluationPlan, judge_protocol, protocol, scenario_set
from nemo_ampo.sotopia.records import EpisodeStore
from nemo_ampo.sotopia.replies import RepliesUnderWay
from nemo_ampo.sotopia.summary import SCENARIOS_FILE
from nemo_ampo.types import Seat

SPENT_FOLDER, REPLIES_FOLDER = "spent", "replies"
_PROGRESS_S = 20.0

Team = Mapping[Seat, Agent]
"""Who speaks for each seat."""


def estimate(plan: EvaluationPlan) -> list[EndpointEstimate]:
    """What is left to be called, and what it costs. Writes nothing.

    Raises:
        ConfigError: the result folder was made with another protocol.
    """
    store, config = EpisodeStore(plan.config.run.dir), plan.config
    _hold_to_protocol(plan, store, write=False)
    to_score: list[Scenario] = []

    def to_play() -> Iterator[tuple[Scenario, Mapping[Seat, AgentConfig], int]]:
        for key in plan.episode_keys():
            result = store.read(key, config.judge.name)
            if result is not None and result.scores is not None:
                continue
            played = result is not None and result.episode.played
            if played or not config.run.judge_only:
                to_score.append(plan.scenarios[key.env_id])
            if not played and not config.run.judge_only:
                done = len(result.episode.turns) if result is not None else 0
                yield plan.scenarios[key.env_id], plan.speakers(key.seat), done

    agents = estimate_agents(to_play(), plan.rules)
    return [*agents, estimate_judge(to_score, config.judge, plan.rules)]


def evaluate(plan: EvaluationPlan) -> Outcome:
    """Play and score what is planned and not done yet.

    Args:
        plan: from :func:`nemo_ampo.sotopia.plan.make_plan`.

    Returns:
        How far it got; failures of single episodes are in the records and counted here.

    Raises:
        ConfigError: an endpoint is not there, or the result folder was made with another protocol.
        UserError: a local server does not come up, a budget is spent, another process writes to the folder.
    """
    import uvloop

    config = plan.config
    store = EpisodeStore(config.run.dir)
    with store.locked(), contextlib.ExitStack() as servers:
        _hold_to_protocol(plan, store, write=False)
        agents = None if config.run.judge_only else tuple(_reachable(plan, servers))
        return uvloop.run(_evaluate(plan, store, agents))


def _hold_to_protocol(plan: EvaluationPlan, store: EpisodeStore, *, write: bool) -> None:
    judge = plan.config.judge
    store.keep_protocol(protocol(plan, store.protocol()), write=write)
    store.keep_protocol(judge_protocol(judge), f"judge-{judge.name}.json", write=write)


def _begin_folder(plan: EvaluationPlan, store: EpisodeStore) -> None:
    """Write down what the run is made with. Comes after every check: a start that failed binds the folder to nothing."""
    _hold_to_protocol(plan, store, write=True)
    write_once(store.folder / SCENARIOS_FILE, json.dumps(scenario_set(plan), indent=1) + "\n")
    write_provenance(store.folder, asdict(plan.config, dict_factory=_plain), plan.sha256)


def _reachable(plan: EvaluationPlan, servers: contextlib.ExitStack) -> Iterator[AgentConfig]:
    """Both agents as endpoints; a checkpoint is served until ``servers`` is closed, one server for each."""
    running: dict[str, AgentConfig] = {}
    for config in plan.agents:
        if not config.checkpoint:
            yield config
            continue
        folder = str(Path(config.checkpoint).resolve())
        if folder not in running:
            dial = any(a.mode_bias for a in plan.agents if a.checkpoint == config.checkpoint)
            server = servers.enter_context(served(folder, plan.config.serve, mode_dial=dial))
            running[folder] = replace(config, base_url=server.base_url, model=server.model)
        yield replace(config, base_url=running[folder].base_url, model=running[folder].model)


async def _evaluate(plan: EvaluationPlan, store: EpisodeStore, agents: tuple[AgentConfig, ...] | None) -> Outcome:
    config, folder = plan.config.judge, store.folder
    replies = _replies(config, folder)
    limiter = LocalLimiter(Limits.of(config), _spent(folder, f"judge-{config.name}"))
    async with contextlib.AsyncExitStack() as clients:
        judge = await clients.enter_async_context(ChatClient(config, limiter=limiter, cache=replies))
        await judge.check()
        teams = await clients.enter_async_context(_teams(plan, folder, agents)) if agents is not None else None
        _begin_folder(plan, store)
        work = _Work(plan, store, judge, replies, teams)
        ticker = asyncio.create_task(work.tell())
        try:
            with stop_after_calls(work.stop), _collector_off_libraries():
                await work.run()
        finally:
            ticker.cancel()
    return work.outcome


@contextlib.contextmanager
def _collector_off_libraries() -> Iterator[None]:
    """Keep what exists by now, mostly imported libraries, out of the garbage collector's rounds.

    It would walk them again and again while episodes are played; 450 of them take about 15 % less processor time so
    (bench/episodes.py).
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _StoppedError(Exception):
    """The run was asked to stop; what was answered is recorded."""


@contextlib.asynccontextmanager
async def _teams(plan: EvaluationPlan, folder: Path, agents: tuple[AgentConfig, ...]) -> AsyncIterator[dict[Seat, Team]]:
    """Who speaks, by the policy's seat. Agents of one model at one address share its limits."""
    async with contextlib.AsyncExitStack() as stack:
        limiters: dict[tuple[str, str], LocalLimiter] = {}
        clients: list[ChatClient] = []
        speakers: list[Agent] = []
        for given, config in zip(plan.agents, agents, strict=True):
            place = (config.base_url, config.model)
            if place not in limiters:
                there = [other for other in agents if (other.base_url, other.model) == place]
                limiters[place] = LocalLimiter(shared_limits(there), _spent(folder, config.section))
            client = next((known for known in clients if known.config == config), None)
            if client is None:
                client = await stack.enter_async_context(ChatClient(config, limiter=limiters[place]))
                await client.check()
                clients.append(client)
            if config.mode_bias and not await announces_mode_bias(config.base_url):
                raise ConfigError(
                    f"{config.section}.mode_bias: the endpoint {config.base_url} cannot bias the mode; "
                    "only nemo-ampo's embedded server can (serve.engine=embedded)"
                )
            speakers.append(Agent(config, client, token_counter(given)))
        policy, other = speakers
        yield {"agent1": {"agent1": policy, "agent2": other}, "agent2": {"agent1": other, "agent2": policy}}


def shared_limits(agents: Sequence[AgentConfig]) -> Limits:
    """What the agents of one model at one address may call together: the smaller number wherever theirs differ.

    Zero calls or tokens a minute, and no budget, mean no limit.
    """
    first, *others = [Limits.of(agent) for agent in agents]
    for other in others:
        values = {
            key: min((v for v in (value, getattr(other, key)) if v), default=value)
            for key, value in asdict(first).items()
            if key != "section"
        }
        section = first.section if other.section == first.section else f"{first.section} and {other.section}"
        first = Limits(**values, section=section)
    return first


def _replies(judge: ScoreJudgeConfig, folder: Path) -> RepliesUnderWay | None:
    """What keeps a judge's answers; None where its configuration names a cache or a replay, which keeps all of them."""
    if judge.cache is not None or judge.replay is not None:
        return None
    return RepliesUnderWay(ReplyFile(folder / REPLIES_FOLDER / f"judge-{judge.name}.sqlite", "run.dir"))


def _spent(folder: Path, role: str) -> SpentFile:
    """What a role's calls have cost since the folder was begun."""
    return SpentFile(folder / SPENT_FOLDER / f"{role}.json")


class _Work:
    """The episodes of one run, a few hundred at a time."""

    def __init__(
        self,
        plan: EvaluationPlan,
        store: EpisodeStore,
        judge: ChatClient,
        replies: RepliesUnderWay | None,
        teams: Mapping[Seat, Team] | None,
    ) -> None:
        self._plan = plan
        self._store = store
        self._judge = judge
        self._replies = replies
        self._teams = teams
        self._prompt = load_score_prompt(plan.config.judge.prompt)
        self._stopping = False
        self.outcome = Outcome(plan.episodes, words=("episodes played", "scored"), reasons=plan.not_whole)

    def stop(self) -> None:
        """Record the answers under way and ask for no more."""
        self._stopping = True

    def add_turn(self, key: EpisodeKey, turn: Turn) -> None:
        """Record an utterance; the place where a run that is to stop leaves a dialogue."""
        self._store.add_turn(key, turn)
        if self._stopping:
            raise _StoppedError

    def end(self, key: EpisodeKey, terminated_by: Termination, error: str | None = None) -> None:
        """Record the end of a dialogue."""
        self._store.end(key, terminated_by, error)

    async def run(self) -> None:
        """Everything; failures of single episodes do not end it.

        Nobody is cancelled when a budget is spent: the calls under way are paid for and their answers are recorded.

        Raises:
            UserError: a budget is spent, the disk is full.
        """
        keys = self._plan.episode_keys()

        async def worker() -> None:
            for key in keys:
                if self._stopping:
                    return
                try:
                    await self._episode(key)
                except UserError:
                    self._stopping = True  # What stopped this episode stops the others: a budget, a full disk.
                    raise
                if self.outcome.in_vain and self._refused() is not None:
                    self._stopping = True

        results = await asyncio.gather(
            *(worker() for _ in range(self._plan.config.run.episodes_in_flight)), return_exceptions=True
        )
        for error in results:
            if error is not None and not isinstance(error, _StoppedError):
                raise error

        if not self.outcome.complete:
            self.outcome.stopped = self._refused()

    def _refused(self) -> str | None:
        """What an endpoint says that refused whatever it was asked."""
        agents = [agent for team in (self._teams or {}).values() for agent in team.values()]
        said = [self._judge.refused, *(agent.refused for agent in agents)]
        return next((refusal for refusal in said if refusal is not None), None)

    async def tell(self) -> None:
        """A line now and then."""
        while True:
            await asyncio.sleep(_PROGRESS_S)
            done = self.outcome
            print(f"sotopia: {done.begun} episodes played, {done.done} scored", file=sys.stderr, flush=True)

    async def _episode(self, key: EpisodeKey) -> None:
        scenario, config = self._plan.scenarios[key.env_id], self._plan.config
        found = self._store.read(key, config.judge.name)
        episode = found.episode if found else new_episode(key, scenario, config.episode.pairing.value, self._plan.rules.view)
        scored = found is not None and found.scores is not None
        if not episode.played and self._teams is None:
            self.outcome.miss("not played", f"{_named(key)}: not played; run without judge_only first")
            return
        if not (episode.played and scored):
            self._store.begin(episode)
        if not episode.played and self._teams is not None:
            episode = await play(episode, scenario, self._teams[key.seat], self._plan.rules, self)
        if not episode.played:
            self.outcome.miss("failed", f"{_named(key)}: {episode.error}")
            return
        self.outcome.begun += 1
        if not scored:
            with self._replies.question() if self._replies is not None else contextlib.nullcontext():
                scores = await self._score(episode, scenario, config.judge)
                self._store.add_scores(key, scores)
            if isinstance(scores, ScoreError):
                self.outcome.miss(scores.kind, f"{_named(key)}: no scores, {scores.kind}: {scores.message}")
                return
        self.outcome.done += 1

    async def _score(self, episode: Episode, scenario: Scenario, config: ScoreJudgeConfig) -> Scores | ScoreError:
        try:
            asked = await self._judge.ask(
                score_messages(scenario, episode.dialogue(), self._prompt),
                lambda text: parse_scores(text, config.name),
                temperatures=config.temperatures,
                schema=SCORES_SCHEMA,
                seed=config.seed,
            )
        except ChatError as failure:
            return ScoreError(config.name, failure.kind, str(failure))
        return replace(
            asked.value,
            prompt_tokens=asked.completion.prompt_tokens,
            completion_tokens=asked.completion.completion_tokens,
            tries=asked.tries,
        )


def _named(key: EpisodeKey) -> str:
    return f"episode env_id={key.env_id} seat={key.seat} seed={key.seed}"


def _plain(items: list[tuple[str, object]]) -> dict[str, object]:
    """Configuration values as YAML can write them."""
    return {name: getattr(value, "value", value) for name, value in items}
