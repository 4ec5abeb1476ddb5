"""What a report is made from: logs, samples and evaluations of a run folder, never completed by guesses.

A run folder is either the folder of one stage (it holds ``metrics.jsonl`` or ``rollouts.jsonl``) or a root
with the sub folders ``bc/``, ``ampo/`` and ``evaluate/``. Every part may be absent, at least one must be
there. ``rollouts.jsonl`` is streamed: of a run of any length only the few samples that are shown stay in
memory.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ampo.errors import DataError
from nemo_ampo.files import read_jsonl
from nemo_ampo.modes import MODES

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
PROVENANCE_FILE = "provenance.json"
EVALUATIONS_FOLDER = "evaluate"
CHECKPOINT_ORDER = ("base", "bc", "ampo")
"""Evaluations of these names come first and in this order, further ones by name."""

ALL_TAGS = "all"
NO_TAG = ""
"""Stands for the label of samples that have none."""


# --- metrics --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One metric over the steps at which it was logged.

    Attributes:
        steps: ascending.
        values: finite numbers, one per step.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __bool__(self) -> bool:
        """True when there is at least one point."""
        return bool(self.steps)

    def ends(self) -> tuple[float, float]:
        """Mean over the first and over the last tenth of the points, at least one point each."""
        count = max(1, len(self.values) // 10)
        return math.fsum(self.values[:count]) / count, math.fsum(self.values[-count:]) / count


@dataclass(frozen=True)
class MetricsLog:
    """Lines of a ``metrics.jsonl`` by kind (``train``, ``val``), ascending in step."""

    lines: Mapping[str, tuple[tuple[int, Mapping[str, float]], ...]]

    def series(self, name: str, kind: str = "train") -> Series:
        """The points of one metric; empty when it was never logged."""
        points = [
            (step, values[name]) for step, values in self.lines.get(kind, ()) if math.isfinite(values.get(name, math.nan))
        ]
        return Series(tuple(step for step, _ in points), tuple(value for _, value in points))

    def counts(self, name: str, kind: str = "train") -> Series:
        """A metric that is left out where it is zero, at every logged step."""
        lines = self.lines.get(kind, ())
        return Series(tuple(step for step, _ in lines), tuple(values.get(name, 0.0) for _, values in lines))

    def names(self, prefix: str = "") -> list[str]:
        """Names that begin with ``prefix``, in order of first appearance."""
        seen = (name for lines in self.lines.values() for _, values in lines for name in values)
        return [name for name in dict.fromkeys(seen) if name.startswith(prefix)]

    @property
    def num_steps(self) -> int:
        """Number of training lines."""
        return len(self.lines.get("train", ()))


def read_metrics(path: Path) -> MetricsLog:
    """A ``metrics.jsonl``.

    Raises:
        DataError: a line without an integer ``step`` or a ``kind``, or with a metric that is no number.
    """
    lines: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}, line {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object")
        step, kind = row.get("step"), row.get("kind")
        if not isinstance(step, int) or not isinstance(kind, str):
            raise DataError(f"{where}: needs an integer 'step' and a 'kind', got {step!r} and {kind!r}")
        values = {name: value for name, value in row.items() if name not in ("step", "kind")}
        for name, value in values.items():
            if not isinstance(value, int | float):
                raise DataError(f"{where}, metric {name!r}: not a number: {value!r}")
        lines.setdefault(kind, []).append((step, values))
    return MetricsLog({kind: tuple(sorted(rows, key=lambda row: row[0])) for kind, rows in lines.items()})


# --- samples --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShownSample:
    """One reply as the page shows it; None where the log says nothing.

    Attributes:
        row_id: of the dialogue turn.
        tag: label of the turn, :data:`NO_TAG` without one.
        mode: 1..4, 0 when the reply breaks the grammar.
        text: the whole decoded reply.
        dialogue: what the reply answers.
        step: of training; None for an evaluation.
        reward, goal, length: the reward and its two factors.
        advantage: what the update saw.
        agent1_score, agent2_score: the judge's verdict, 0..10.
        num_tokens, answer_tokens: of the whole reply, of the spoken answer.
        format_rule: first rule a broken reply violates.
        judge_error: how the judge failed.
    """

    row_id: str
    tag: str
    mode: int
    text: str
    dialogue: str | None = None
    step: int | None = None
    reward: float | None = None
    goal: float | None = None
    length: float | None = None
    advantage: float | None = None
    agent1_score: float | None = None
    agent2_score: float | None = None
    num_tokens: int | None = None
    answer_tokens: int | None = None
    format_rule: str | None = None
    judge_error: str | None = None


_OPTIONAL = (
    *("dialogue", "step", "reward", "goal", "length", "advantage", "agent1_score", "agent2_score"),
    *("num_tokens", "answer_tokens", "format_rule", "judge_error"),
)


def shown_sample(row: Mapping[str, Any], where: str) -> ShownSample:
    """A line of ``rollouts.jsonl`` or a sample of an evaluation.

    Raises:
        DataError: a required field is absent or of the wrong type.
    """
    for name, kind in (("row_id", str), ("text", str), ("mode", int)):
        if not isinstance(row.get(name), kind):
            raise DataError(f"{where}, field {name!r}: expected {kind.__name__}, got {row.get(name)!r}")
    return ShownSample(
        row_id=row["row_id"],
        tag=row.get("tag") or NO_TAG,
        mode=row["mode"],
        text=row["text"],
        **{name: row.get(name) for name in _OPTIONAL},
    )


@dataclass(frozen=True)
class EarlyAndLate:
    """The first sample of a mode from the first quarter of a run and the last one from its last quarter."""

    mode: int
    early: ShownSample | None
    late: ShownSample | None


@dataclass(frozen=True)
class RolloutSamples:
    """Samples picked from a ``rollouts.jsonl``.

    Attributes:
        by_tag: for each label, most frequent first: one entry per mode that occurs, broken replies (0) last.
        left_out_tags: number of further labels.
    """

    by_tag: Mapping[str, tuple[EarlyAndLate, ...]]
    left_out_tags: int


def read_rollouts(path: Path, max_tags: int = 4) -> RolloutSamples:
    """Pick samples from a ``rollouts.jsonl`` in one pass.

    Raises:
        DataError: a line lacks a field that the page needs.
    """
    first: dict[tuple[str, int], ShownSample] = {}
    last: dict[tuple[str, int], ShownSample] = {}
    counts: Counter[str] = Counter()
    begin, end = math.inf, -math.inf
    for where, row in _stream(path):
        sample = shown_sample(row, where)
        if sample.step is None:
            raise DataError(f"{where}, field 'step': missing")
        key = (sample.tag, sample.mode)
        first.setdefault(key, sample)
        last[key] = sample
        counts[sample.tag] += 1
        begin, end = min(begin, sample.step), max(end, sample.step)
    quarter = (end - begin) / 4

    def pair(key: tuple[str, int]) -> EarlyAndLate:
        early, late = first[key], last[key]
        assert early.step is not None and late.step is not None
        is_early, is_late = early.step <= begin + quarter, late.step >= end - quarter
        shown_twice = is_early and late is early
        return EarlyAndLate(key[1], early if is_early else None, late if is_late and not shown_twice else None)

    tags = [tag for tag, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    by_tag = {tag: tuple(pair((tag, mode)) for mode in (*MODES, 0) if (tag, mode) in first) for tag in tags[:max_tags]}
    return RolloutSamples(by_tag, max(0, len(tags) - max_tags))


def _stream(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines with their place; a torn last line (the run died while writing) is left out."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError:
                if line.endswith("\n"):
                    raise DataError(f"{path}, line {number}: not JSON") from None


# --- evaluations ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Means over the samples of one label; None where there was nothing to average.

    Attributes:
        samples: number of answers.
        reward: mean reward.
        goal: mean goal component, 0..1, 0.5 means no change.
        valid_format: share of replies that obey the grammar.
        tokens: mean tokens of a reply.
        judge_failed: number of verdicts that could not be had.
        mode_share: mode to its share among all samples.
    """

    samples: int
    reward: float | None
    goal: float | None
    valid_format: float | None
    tokens: float | None
    judge_failed: int
    mode_share: Mapping[int, float]


@dataclass(frozen=True)
class Evaluation:
    """Answers of one checkpoint to held-out dialogue turns.

    Attributes:
        name: label of the checkpoint.
        checkpoint: where it came from.
        seed: of the sampling.
        summary: ``all`` and each label.
        samples: every answer.
    """

    name: str
    checkpoint: str
    seed: int | None
    summary: Mapping[str, Summary]
    samples: tuple[ShownSample, ...]


def parse_evaluation(data: Any, where: str) -> Evaluation:
    """An evaluation from its JSON form.

    Args:
        data: ``{"name", "checkpoint", "seed", "summary": {"all": ..., "<tag>": ...}, "samples": [...]}``.
        where: named in errors.

    Raises:
        DataError: a field is missing or of the wrong type.
    """
    if not isinstance(data, dict):
        raise DataError(f"{where}: expected an object with name, summary and samples")
    for key, kind in (("name", str), ("summary", dict), ("samples", list)):
        if not isinstance(data.get(key), kind):
            raise DataError(f"{where}, field {key!r}: expected {kind.__name__}, got {type(data.get(key)).__name__}")
    if ALL_TAGS not in data["summary"]:
        raise DataError(f"{where}, field 'summary': has no {ALL_TAGS!r}")
    return Evaluation(
        name=data["name"],
        checkpoint=str(data.get("checkpoint") or ""),
        seed=data.get("seed"),
        summary={tag: _summary(row, f"{where}, summary {tag!r}") for tag, row in data["summary"].items()},
        samples=tuple(shown_sample(row, f"{where}, sample {i}") for i, row in enumerate(data["samples"])),
    )


def _summary(row: Any, where: str) -> Summary:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object")
    for key in ("samples", "judge_failed"):
        if not isinstance(row.get(key), int):
            raise DataError(f"{where}: needs an integer {key!r}, got {row.get(key)!r}")

    def number(key: str) -> float | None:
        value = row.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float):
            raise DataError(f"{where}, field {key!r}: not a number: {value!r}")
        return float(value) if math.isfinite(value) else None

    shares = row.get("mode_share") or {}
    return Summary(
        samples=row["samples"],
        reward=number("reward"),
        goal=number("goal"),
        valid_format=number("valid_format"),
        tokens=number("tokens"),
        judge_failed=row["judge_failed"],
        mode_share={mode: float(shares.get(str(mode), 0.0)) for mode in MODES},
    )


def read_evaluation(path: Path) -> Evaluation:
    """An evaluation from its file.

    Raises:
        DataError: not JSON, or not an evaluation.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    return parse_evaluation(data, str(path))


def in_checkpoint_order(evaluations: list[Evaluation]) -> list[Evaluation]:
    """``base``, ``bc``, ``ampo``, then the others by name."""

    def key(evaluation: Evaluation) -> tuple[int, str]:
        known = evaluation.name in CHECKPOINT_ORDER
        return CHECKPOINT_ORDER.index(evaluation.name) if known else len(CHECKPOINT_ORDER), evaluation.name

    return sorted(evaluations, key=key)


# --- the folder -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageRun:
    """One training stage.

    Attributes:
        folder: where it was read from.
        log: its metrics.
        samples: picked rollouts, None without a ``rollouts.jsonl``.
        provenance: versions and data hashes, None without the file.
    """

    folder: Path
    log: MetricsLog
    samples: RolloutSamples | None
    provenance: Mapping[str, Any] | None


@dataclass(frozen=True)
class Run:
    """Everything found in a run folder."""

    folder: Path
    bc: StageRun | None
    ampo: StageRun | None
    evaluations: tuple[Evaluation, ...]


def read_run(folder: Path) -> Run:
    """Read what a run folder holds.

    Raises:
        DataError: no such folder, nothing to report in it, or a bad file.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    bc, ampo = _stage(folder / "bc"), _stage(folder / "ampo")
    here = _stage(folder)
    if here is not None:
        if here.log.names("bc/"):
            bc = here
        else:
            ampo = here
    files = sorted((folder / EVALUATIONS_FOLDER).glob("*.json"))
    evaluations = in_checkpoint_order([read_evaluation(f) for f in files if f.name != PROVENANCE_FILE])
    if bc is None and ampo is None and not evaluations:
        raise DataError(
            f"{folder}: nothing to report; expected {METRICS_FILE} of a stage, or bc/, ampo/ or {EVALUATIONS_FOLDER}/*.json"
        )
    return Run(folder, bc, ampo, tuple(evaluations))


def _stage(folder: Path) -> StageRun | None:
    metrics, rollouts, provenance = (folder / name for name in (METRICS_FILE, ROLLOUTS_FILE, PROVENANCE_FILE))
    if not metrics.exists() and not rollouts.exists():
        return None
    return StageRun(
        folder,
        read_metrics(metrics),
        read_rollouts(rollouts) if rollouts.exists() else None,
        json.loads(provenance.read_text(encoding="utf-8")) if provenance.exists() else None,
    )
