"""One SOTOPIA run, summarised: scores with intervals, counts, a few dialogues, and whether anything is missing.

A run is a folder of episodes (:class:`~nemo_ampo.dialogue.records.EpisodeStore`) or a result file of the authors'
evaluation (:class:`~nemo_ampo.sotopia.results.ImportedResults`). Episodes are read one at a time; what stays in
memory is 14 numbers for each scored one, and the dialogues that are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from nemo_ampo.dialogue.records import EpisodeKey
from nemo_ampo.dialogue.scenarios import OFFICIAL_COUNTS, SEATS, PackCounts, load_scenarios, unlike_published
from nemo_ampo.errors import DataError
from nemo_ampo.sotopia.dimensions import DIMENSIONS, Scores
from nemo_ampo.sotopia.records import EPISODES_FOLDER, PROTOCOL_FILE, EpisodeResult, EpisodeStore
from nemo_ampo.sotopia.results import ImportedResults
from nemo_ampo.sotopia.statistics import RESAMPLES, ScoredEpisode, SubsetSummary, summarise, with_overall
from nemo_ampo.sotopia.tally import SELF_PLAY, Tally
from nemo_ampo.types import Seat

SUBSETS = ("all", "hard")
ROLES = ("actor", "partner", "average")
SCENARIOS_FILE = "scenarios.json"
"""What the scenarios of a run are meant to be, and how many they are."""
DEFAULT_JUDGE = "default"
SHOWN_EXTREMES, SHOWN_SPREAD, SHOWN_PROBLEMS = 3, 6, 3


class Source(Protocol):
    """Where episodes come from; may be read more than once."""

    def results(self) -> Iterator[EpisodeResult]:
        """The episodes with their scores."""
        ...


@dataclass(frozen=True)
class Shown:
    """A dialogue of the report.

    Attributes:
        reason: why this one.
        result: the episode with its scores.
    """

    reason: str
    result: EpisodeResult


@dataclass(frozen=True)
class RunSummary:
    """Everything a report says about one run.

    Attributes:
        path: folder or file it was read from.
        name: for headings.
        pairing: ``self_play``, ``partner``, ``vs_base`` or ``api``.
        view: ``sotopia`` or ``reference``: what the characters knew of each other.
        judge: name of the scoring; None when nothing is scored.
        judged_with: the judge's protocol, empty for imported results and where nothing was scored.
        made_with: the protocol of the run, empty for imported results.
        scenario_set: ``published``, ``own``, or None where the folder does not say.
        unlike: how the scenarios differ from the published set where they should not; None otherwise.
        expected: episodes the run should have; None when nothing says so.
        tally: counts over all episodes.
        scored: one entry per scored episode, also of those that count for no subset.
        subsets: ``all`` and ``hard`` to estimates.
        shown: dialogues to read.
    """

    path: Path
    name: str
    pairing: str
    view: str
    judge: str | None
    judged_with: Mapping[str, Any]
    made_with: Mapping[str, Any]
    scenario_set: str | None
    unlike: str | None
    expected: int | None
    tally: Tally
    scored: tuple[ScoredEpisode, ...]
    subsets: Mapping[str, SubsetSummary]
    shown: tuple[Shown, ...]

    @property
    def role(self) -> str:
        """Whose scores are the run's: both agents' in self-play, otherwise the actor's."""
        return "average" if self.pairing == SELF_PLAY else "actor"

    @property
    def missing(self) -> int:
        """Episodes without scores: never begun, cut short, failed or not judged."""
        return max(self.expected or 0, self.tally.begun) - self.tally.scored

    @property
    def partial(self) -> bool:
        """True when any score is missing or the scenarios are not those meant; such a run must not be published."""
        return self.missing > 0 or self.tally.scored == 0 or self.unlike is not None

    @property
    def imported(self) -> bool:
        """Whether these are others' results, which say nothing of their protocol."""
        return not self.made_with

    @property
    def suffix(self) -> str:
        """What the names of the report's files end with, so that two scorings of one folder do not replace each other."""
        return "" if self.imported or self.judge in (None, DEFAULT_JUDGE) else f"-{self.judge}"

    @property
    def short_seeds(self) -> tuple[str, ...]:
        """Seeds of which only the hard pairings were asked for; their episodes do not count for ``all``."""
        return short_seeds(self.made_with)

    def notes(self) -> list[str]:
        """What a reader of the tables should know though nothing is missing, one sentence each."""
        found = []
        if self.short_seeds:
            seeds = ", ".join(self.short_seeds)
            found.append(f'only the hard pairings of seed {seeds} were asked for (run.subset=hard); "all" leaves them out')
        if self.scenario_set == "own":
            found.append("own scenarios, not the published set (data.set=own)")
        return found

    def of_subset(self, subset: str) -> list[ScoredEpisode]:
        """The episodes that a subset's numbers are made of."""
        return of_subset(self.scored, subset, self.short_seeds)

    def problems(self) -> list[str]:
        """What is missing, one sentence each; empty for a complete run."""
        counts = self.tally
        never = max(self.expected or 0, counts.begun) - counts.begun
        found = [
            (never, "not in the file" if self.imported else "never begun"),
            (counts.unfinished, "begun and not over"),
            (counts.failed_episodes, "could not be played"),
            *((number, f"played and not scored ({kind})") for kind, number in sorted(counts.unscored.items())),
        ]
        shown = [f"{number} episode{'s' if number > 1 else ''} {what}" for number, what in found if number]
        return [*shown, self.unlike] if self.unlike is not None else shown

    def as_json(self) -> dict[str, Any]:
        """Content of ``result.json``; NaN (nothing to average) is null."""
        return {
            "name": self.name,
            "partial": self.partial,
            "problems": self.problems(),
            "notes": self.notes(),
            "pairing": self.pairing,
            "view": self.view,
            "judge": {"name": self.judge, **self.judged_with},
            "scenario_set": self.scenario_set,
            "headline_role": self.role,
            "episodes": {
                "expected": self.expected,
                "begun": self.tally.begun,
                "scored": self.tally.scored,
                "missing": self.missing,
            },
            "scores": {name: without_nan(asdict(subset)) for name, subset in self.subsets.items()},
            **self.tally.as_json(),
            "made_with": dict(self.made_with),
        }


def read_summary(
    path: str | Path,
    judge: str | None = None,
    sotopia_dir: str | Path | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> RunSummary:
    """Read and summarise a run.

    Args:
        path: folder of a run, or a JSON file of the authors' evaluation.
        judge: whose scores; may be left out where one judge gave them all.
        sotopia_dir: the scenario files, for imported results only.
        seed, resamples: of the intervals.

    Raises:
        DataError: nothing to read, or a damaged file.
    """
    path = Path(path)
    if is_result_file(path):
        return _imported(path, sotopia_dir, seed, resamples)
    if not is_sotopia_run(path):
        raise DataError(f"{path}: neither a folder with {PROTOCOL_FILE} and {EPISODES_FOLDER}/ nor a result file (.json)")
    store = EpisodeStore(path)
    protocol = store.protocol() or {}
    return _summary(_Scoring(store, judge), _Made(store, protocol), path, path.resolve().name, judge, seed, resamples)


def is_sotopia_run(path: Path) -> bool:
    """Whether a folder holds the episodes of an evaluation."""
    return (path / PROTOCOL_FILE).is_file() and (path / EPISODES_FOLDER).is_dir()


def is_result_file(path: Path) -> bool:
    """Whether a path is a file that may hold others' results."""
    return path.suffix == ".json" and path.is_file()


@dataclass(frozen=True)
class _Scoring:
    """The episodes of a store with the scores of one judge."""

    store: EpisodeStore
    judge: str | None

    def results(self) -> Iterator[EpisodeResult]:
        return self.store.results(self.judge)


def _imported(path: Path, sotopia_dir: str | Path | None, seed: int, resamples: int) -> RunSummary:
    pack = load_scenarios(sotopia_dir) if sotopia_dir is not None else None
    return _summary(ImportedResults(path, pack), None, path, path.stem, None, seed, resamples)


@dataclass(frozen=True)
class _Made:
    """What a run of ours was made with."""

    store: EpisodeStore
    protocol: Mapping[str, Any]

    def judge(self, name: str | None) -> Mapping[str, Any]:
        return (self.store.protocol(f"judge-{name}.json") or {}) if name is not None else {}

    def scenario_set(self) -> tuple[str | None, str | None]:
        """What the scenarios are meant to be, and how they differ from it."""
        found = self.store.protocol(SCENARIOS_FILE)
        if found is None:
            return None, None
        try:
            meant, counts = found["set"], PackCounts(**found["counts"])
        except (LookupError, TypeError):
            raise DataError(
                f"{self.store.folder / SCENARIOS_FILE}: expected 'set' and 'counts'; run again to write it"
            ) from None
        return meant, unlike_published(counts) if meant == "published" else None


def _summary(
    source: Source, made: _Made | None, path: Path, name: str, judge: str | None, seed: int, resamples: int
) -> RunSummary:
    counted, scored = Tally(), []
    goals: dict[EpisodeKey, float | None] = {}
    pairings, views, judges = set(), set(), set()
    for result in source.results():
        counted.add(result)
        pairings.add(result.episode.pairing)
        views.add(result.episode.view)
        goals[result.episode.key] = None
        if result.scores is not None:
            judges.add(result.scores.judge)
            scored.append(scored_episode(result, result.scores))
            goals[result.episode.key] = scored[-1].actor[1 + list(DIMENSIONS).index("goal")]
    if not counted.begun:
        raise DataError(f"{path}: holds no episodes")
    if len(pairings) > 1 or len(views) > 1:
        raise DataError(f"{path}: holds episodes of several protocols: {', '.join(sorted(pairings | views))}")
    if len(judges) > 1:
        raise DataError(f"{path}: holds scores of several judges; choose one with --judge: {', '.join(sorted(judges))}")
    reasons = _chosen(goals)
    shown = [Shown(reasons[r.episode.key], r) for r in source.results() if r.episode.key in reasons]
    order = {key: i for i, key in enumerate(reasons)}
    protocol: Mapping[str, Any] = made.protocol if made is not None else {}
    judge = judges.pop() if judges else judge
    scenario_set, unlike = made.scenario_set() if made is not None else (None, None)
    (pairing,), (view,) = pairings, views
    left_out = short_seeds(protocol)
    return RunSummary(
        path=path,
        name=name,
        pairing=pairing,
        view=view,
        judge=judge,
        judged_with=made.judge(judge) if made is not None else {},
        made_with=protocol,
        scenario_set=scenario_set,
        unlike=unlike,
        expected=expected_episodes(protocol) if made is not None else published_episodes(pairing),
        tally=counted,
        scored=tuple(scored),
        subsets={subset: summarise(of_subset(scored, subset, left_out), seed, resamples) for subset in SUBSETS},
        shown=tuple(sorted(shown, key=lambda s: order[s.result.episode.key])),
    )


def expected_episodes(protocol: Mapping[str, Any]) -> int | None:
    """How many episodes the protocol asks for; None when it does not say."""
    number = protocol.get("episodes")
    return number if isinstance(number, int) else None


def published_episodes(pairing: str) -> int:
    """How many episodes the published set gives: each pairing once in self-play, in both seats otherwise."""
    return OFFICIAL_COUNTS.scenarios * (1 if pairing == SELF_PLAY else len(SEATS))


def short_seeds(protocol: Mapping[str, Any]) -> tuple[str, ...]:
    """Seeds of which the protocol asks for less than all pairings."""
    return tuple(seed for seed, subset in protocol.get("subsets", {}).items() if subset != "all")


def of_subset(scored: Iterable[ScoredEpisode], subset: str, left_out: Sequence[str]) -> list[ScoredEpisode]:
    """Episodes of ``all`` or ``hard``. A seed of hard pairings only (``left_out``) is no sample of all."""
    return [e for e in scored if (e.hard if subset == "hard" else str(e.seed) not in left_out)]


def scored_episode(result: EpisodeResult, scores: Scores) -> ScoredEpisode:
    """The numbers of one episode."""
    episode = result.episode
    of_seat: dict[Seat, tuple[float, ...]] = {
        seat: with_overall([scores.of(seat)[name] for name in DIMENSIONS]) for seat in SEATS
    }
    return ScoredEpisode(
        env_id=episode.key.env_id,
        seat=episode.key.seat,
        seed=episode.key.seed,
        scenario=episode.environment_id,
        hard=episode.hard,
        actor=of_seat[episode.key.seat],
        partner=of_seat[episode.partner_seat],
    )


def _chosen(goals: Mapping[EpisodeKey, float | None]) -> dict[EpisodeKey, str]:
    """Which dialogues to show, and why: problems first, both ends of the goal, and some in between by position."""
    scored = sorted((key for key, goal in goals.items() if goal is not None), key=lambda key: (goals[key], key))
    unscored = [key for key, goal in goals.items() if goal is None]
    reasons: dict[EpisodeKey, str] = dict.fromkeys(unscored[:SHOWN_PROBLEMS], "not scored")
    for key in scored[-SHOWN_EXTREMES:][::-1]:
        reasons.setdefault(key, "among the highest goal scores")
    for key in scored[:SHOWN_EXTREMES]:
        reasons.setdefault(key, "among the lowest goal scores")
    rest = [key for key in goals if key not in reasons]
    for i in range(min(SHOWN_SPREAD, len(rest))):
        reasons[rest[i * len(rest) // min(SHOWN_SPREAD, len(rest))]] = "taken at regular distance"
    return reasons


def without_nan(value: Any) -> Any:
    """A JSON value in which NaN, also inside of objects, is null."""
    if isinstance(value, float):
        return value if value == value else None
    if isinstance(value, Mapping):
        return {str(key): without_nan(entry) for key, entry in value.items()}
    return value
