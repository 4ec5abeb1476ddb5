"""A whole generation: play every situation, write the rows, lose no paid answer.

Every answer goes into a cache beside the output before it is used, and every question's seed derives from what it
asks, so a job that was killed, or ran into its limits, goes on where it was when it is started again: answered
questions are not asked again, and the rows come out as if it had never stopped. The rows appear complete or not
at all; a job that reached its limit writes the rows it has and says so.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from nemo_ampo.chat.client import ChatClient
from nemo_ampo.chat.config import EndpointConfig
from nemo_ampo.chat.limiter import LocalLimiter, SpentFile
from nemo_ampo.chat.limits import Limits
from nemo_ampo.data.rows import as_record, write_json, write_rows
from nemo_ampo.errors import ConfigError
from nemo_ampo.files import file_name_problem
from nemo_ampo.generate.overlap import check_records
from nemo_ampo.generate.rows import Played, play_bc, play_rl
from nemo_ampo.generate.situations import Situation, Situations
from nemo_ampo.generate.teacher import Teacher
from nemo_ampo.judge.client import Judge, verdict_protocol
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.output.lock import hold_output
from nemo_ampo.output.outcome import Outcome
from nemo_ampo.output.protocol import digest, keep_protocol
from nemo_ampo.reply.modes import MODES
from nemo_ampo.run.interrupt import stop_after_calls
from nemo_ampo.run.progress import Progress

Kind = Literal["bc", "rl"]
OUT_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class TeacherConfig(EndpointConfig):
    """The endpoint that speaks."""

    section: ClassVar[str] = "teacher"


@dataclass(frozen=True)
class JobConfig:
    """What to write and how much it may cost.

    Attributes:
        kind: ``bc`` or ``rl``.
        out: row file.
        teacher: who speaks.
        judge: who scores; needed for ``rl`` only.
        system: system prompt of every row, None for none.
        seed: of everything drawn.
        temperatures: of the teacher's tries.
        modes_per_turn: cloning rows per turn, 1..4.
        max_calls, max_usd: of teacher and judge together, earlier starts of the same job included.
        max_concurrency: calls in flight at a time.
    """

    kind: Kind
    out: Path
    teacher: TeacherConfig
    judge: JudgeConfig | None = None
    system: str | None = None
    seed: int = 0
    temperatures: tuple[float, ...] = (0.7, 0.7, 1.0, 1.0)
    modes_per_turn: int = 1
    max_calls: int | None = None
    max_usd: float | None = None
    max_concurrency: int = 16

    def __post_init__(self) -> None:
        problem = file_name_problem(self.out.name)
        if problem is not None:
            raise ConfigError(f"--out: the name {problem}")
        if self.out.suffix not in OUT_SUFFIXES:
            raise ConfigError(f"--out: expected a file ending in {' or '.join(OUT_SUFFIXES)}, got {self.out}")
        if (self.judge is not None) != (self.kind == "rl"):
            raise ConfigError("--judge: needed for rl rows, and for those only")
        if not 1 <= self.modes_per_turn <= len(MODES):
            raise ConfigError(f"--modes-per-turn: expected 1 to {len(MODES)}, got {self.modes_per_turn}")
        if not self.temperatures:
            raise ConfigError("--tries: expected at least 1")
        unpriced = [e.model for e in (self.teacher, self.judge) if e is not None and not e.price]
        if self.max_usd is not None and unpriced:
            raise ConfigError(f"--max-usd: nothing says what {unpriced[0]} costs; give its price per million tokens")

    def beside(self, ending: str) -> Path:
        """A file beside the rows: ``rows.jsonl`` and ``meta.json`` give ``rows.meta.json``."""
        return self.out.with_name(f"{self.out.stem}.{ending}")


@dataclass(frozen=True)
class JobSummary:
    """What a job wrote; also the content of ``OUT.meta.json``.

    Attributes:
        kind: ``bc`` or ``rl``.
        complete: every situation was played to its end.
        rows: written.
        situations: played, or begun.
        modes: mode to cloning rows.
        rejected: rule to the teacher's replies refused for it.
        failed: kind to situations that ended early because teacher or judge gave nothing usable.
        stopped: situations cut short by the limit of calls or money, or by whoever asked the job to stop.
        asked_to_stop: whether it was the latter.
        refused: what teacher or judge say, where they refused whatever they were asked.
        calls, cached: HTTP calls of this start, and questions answered from the cache.
        usd: spent in this start.
        excluded: keys of evaluation situations that were left out.
        teacher, judge: model names.
        seed: of the job.
    """

    kind: Kind
    complete: bool
    rows: int
    situations: int
    modes: dict[str, int]
    rejected: dict[str, int]
    failed: dict[str, int]
    stopped: int
    asked_to_stop: bool
    refused: str | None
    calls: int
    cached: int
    usd: float
    excluded: tuple[str, ...]
    teacher: str
    judge: str | None
    seed: int

    def lines(self) -> list[str]:
        """For the terminal."""
        lines = [f"{self.rows} rows of {self.situations} situations; {self.calls} calls, {self.cached} from the cache"]
        if self.usd:
            lines[0] += f", {self.usd:.4f} USD"
        for name, counts in (("modes", self.modes), ("rejected replies", self.rejected), ("failed situations", self.failed)):
            if counts:
                lines.append(f"{name}: " + ", ".join(f"{key} {number}" for key, number in counts.items()))
        if self.excluded:
            lines.append(f"{len(self.excluded)} evaluation situations left out")
        return [*lines, self.outcome.line()]

    @property
    def outcome(self) -> Outcome:
        """How far it got."""
        limit = f"the limit was reached in {self.stopped} situations; raise it and run again to go on"
        ended_early = sum(self.failed.values()) + self.stopped
        return Outcome(
            self.situations,
            begun=self.situations,
            done=self.situations - ended_early,
            missing=Counter(self.failed) + Counter({"asked to stop": self.stopped} if self.asked_to_stop else {}),
            stopped=limit if self.stopped and not self.asked_to_stop else self.refused,
        )


def most_calls(config: JobConfig, situations: Sequence[Situation]) -> int:
    """Upper bound of readable answers a job asks for; tries for unreadable ones come on top."""
    turns = sum(s.max_turns - len(s.opening) for s in situations)
    return turns * config.modes_per_turn if config.kind == "bc" else 2 * turns


def run(config: JobConfig, situations: Situations) -> JobSummary:
    """Play everything and write rows and description.

    Raises:
        ConfigError: teacher or judge cannot be reached.
        UserError: another start writes the same rows, or these were begun with other settings.
        DataError: the rows hold evaluation situations, which must not happen.
    """
    import uvloop

    with hold_output(config.out.with_suffix(""), "--out"):
        _hold_to_protocol(config, write=False)
        return uvloop.run(_run(config, situations))


def _hold_to_protocol(config: JobConfig, *, write: bool) -> None:
    """What decides the replies of a row file; how many are asked for, and at what cost, may change from start to start."""
    teacher, judge = config.teacher, config.judge
    protocol = {
        "kind": config.kind,
        "teacher": {"models": teacher.models, "max_tokens": teacher.max_tokens, "extra_body": teacher.extra_body},
        "judge": None if judge is None else verdict_protocol(judge),
        "system_prompt": None if config.system is None else digest(config.system),
        "seed": config.seed,
        "temperatures": list(config.temperatures),
        "modes_per_turn": config.modes_per_turn,
    }
    path = config.beside("protocol.json")
    cure = f"give another --out, or remove {path} to replace these rows"
    keep_protocol(path, protocol, "--out", parts=("teacher", "judge"), cure=cure, write=write)


async def _run(config: JobConfig, situations: Situations) -> JobSummary:
    limits = Limits(config.max_concurrency, max_calls=config.max_calls, max_usd=config.max_usd, section="generate")
    limiter = LocalLimiter(limits, SpentFile(config.beside("spent.json")))
    async with _clients(config, limiter) as (chat, judge):
        await chat.check()
        if judge is not None:
            await judge.check(first_call=False)  # nothing waits beside it: the first dialogue's call is as good
        _hold_to_protocol(config, write=True)
        teacher = Teacher(chat, config.temperatures, config.seed)
        slots, done_so_far = asyncio.Semaphore(config.max_concurrency), Counter[str]()

        async def play(situation: Situation) -> Played:
            async with slots:
                if judge is None:
                    done = await play_bc(situation, teacher, config.system, config.modes_per_turn, config.seed)
                else:
                    done = await play_rl(situation, teacher, judge, config.system)
            done_so_far.update(situations=1, rows=len(done.rows))
            progress.step(
                done_so_far["situations"], {"rows": done_so_far["rows"], "rejected": sum(teacher.rejected.values())}
            )
            return done

        loop = asyncio.get_running_loop()
        with (
            stop_after_calls(lambda: loop.call_soon_threadsafe(limiter.end)) as stop,
            Progress(f"generate {config.kind}", 0, len(situations.chosen)) as progress,
        ):
            played = await asyncio.gather(*map(play, situations.chosen))
        stats = [client.stats for client in (chat, judge) if client is not None]
    summary = JobSummary(
        kind=config.kind,
        complete=not any(p.failure or p.stopped for p in played),
        rows=sum(len(p.rows) for p in played),
        situations=len(played),
        modes=_sorted(Counter(str(mode) for p in played for mode in p.modes)),
        rejected=_sorted(teacher.rejected),
        failed=_sorted(Counter(p.failure for p in played if p.failure is not None)),
        stopped=sum(p.stopped for p in played),
        asked_to_stop=stop.requested,
        refused=next((c.refused for c in (chat, judge) if c is not None and c.refused is not None), None),
        calls=sum(s.calls for s in stats),
        cached=sum(s.cache_hits for s in stats),
        usd=sum(s.cost_usd for s in stats),
        excluded=situations.excluded,
        teacher=config.teacher.model,
        judge=config.judge.model if config.judge else None,
        seed=config.seed,
    )
    _publish(config, [row for p in played for row in p.rows], summary)
    return summary


@asynccontextmanager
async def _clients(config: JobConfig, limiter: LocalLimiter) -> AsyncIterator[tuple[ChatClient, Judge | None]]:
    """Teacher and judge, with one limit, one purse and one cache."""
    from nemo_ampo.chat.cache import ReplyFile

    cache = ReplyFile(config.beside("replies.sqlite"), "--out")
    async with ChatClient(config.teacher, limiter=limiter, cache=cache) as chat:
        if config.judge is None:
            yield chat, None
            return
        async with Judge(config.judge, limiter=limiter, cache=cache) as judge:
            yield chat, judge


def _publish(config: JobConfig, rows: list[dict[str, Any]], summary: JobSummary) -> None:
    if not rows and summary.asked_to_stop:
        return
    if not rows:
        raise ConfigError(f"{config.out}: no rows: {'; '.join(summary.lines())}")
    check_records([as_record(row, f"{config.out}, row {i}") for i, row in enumerate(rows, start=1)], str(config.out))
    write_rows(rows, config.out)
    write_json(asdict(summary), config.beside("meta.json"))


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
