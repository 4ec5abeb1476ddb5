"""What a report is made from: logs, samples and evaluations of a run folder, never completed by guesses.

A run folder is either the folder of one stage (it holds ``metrics.jsonl`` or ``rollouts.jsonl``) or a root
with the sub folders ``bc/``, ``ampo/`` and ``evaluate/``. Every part may be absent, at least one must be
there. ``rollouts.jsonl`` is streamed: of a run of any length only the few samples that are shown stay in
memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeGuard

from nemo_ampo.checkpoint.store import Store
from nemo_ampo.errors import DataError
from nemo_ampo.files import disk_errors, is_torn, read_record, stream_jsonl
from nemo_ampo.job.attempts import resolved_config
from nemo_ampo.output.outcome import PARTIAL_FOLDER
from nemo_ampo.reply.modes import MODES, NO_MODE
from nemo_ampo.run.runlog import log_hashes
from nemo_ampo.text import one_line

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
PROVENANCE_FILE = "provenance.json"
EVALUATIONS_FOLDER = "evaluate"
CHECKPOINT_ORDER = ("base", "bc", "ampo")
"""Evaluations of these names come first and in this order, further ones by name."""

ALL_TAGS = "all"
KINDS = ("train", "val")
DAMAGED = "; the file was damaged or edited"
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
    """Lines of a ``metrics.jsonl`` by kind (``train``, ``val``), ascending in step.

    Attributes:
        lines: step and numbers of each.
        problems: what of the file is not as it was written, in words.
    """

    lines: Mapping[str, tuple[tuple[int, Mapping[str, float]], ...]]
    problems: tuple[str, ...] = ()

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
        DataError: a line that no run writes: without a ``step`` or a known ``kind``, with a metric that is no number, or
            with a step that another line has or that comes too early.
    """
    lines: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
    for where, row in stream_jsonl(path):
        step, kind = row.get("step"), row.get("kind")
        if not is_whole(step) or kind not in KINDS:
            raise DataError(
                f"{where}: needs an integer 'step' and a 'kind' ({' or '.join(KINDS)}), got {step!r} and {kind!r}{DAMAGED}"
            )
        values = {name: value for name, value in row.items() if name not in ("step", "kind")}
        for name, value in values.items():
            if not is_number(value):
                raise DataError(f"{where}, metric {name!r}: not a number: {value!r}{DAMAGED}")
        before = lines.setdefault(kind, [])
        if before and step <= before[-1][0]:
            raise DataError(f"{where}: {kind} step {step} after step {before[-1][0]}{DAMAGED}")
        before.append((step, values))
    return MetricsLog(
        {kind: tuple(rows) for kind, rows in lines.items()}, (*_torn(path), *_gaps(path, lines.get("train", [])))
    )


def _torn(path: Path) -> list[str]:
    return [f"{path.name}: the last line was not written whole and is left out."] if is_torn(path) else []


def _gaps(path: Path, lines: Sequence[tuple[int, Any]]) -> list[str]:
    """Steps that a run has trained, because later ones are there, and the log does not know."""
    expected, missing = 0, []
    for step, _ in lines:
        if step > expected:
            missing.append(f"{expected}" if step == expected + 1 else f"{expected} to {step - 1}")
        expected = step + 1
    return [f"{path.name}: the lines of steps {', '.join(missing[:5])} are missing."] if missing else []


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number; JSON's true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308


def is_whole(value: Any) -> TypeGuard[int]:
    """A count or a step."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


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


_NUMBERS = ("reward", "goal", "length", "advantage", "agent1_score", "agent2_score")
_COUNTS = ("step", "num_tokens", "answer_tokens")
_TEXTS = ("dialogue", "format_rule", "judge_error")


def shown_sample(row: Mapping[str, Any], where: str) -> ShownSample:
    """A line of ``rollouts.jsonl`` or a sample of an evaluation.

    Raises:
        DataError: not an object, or a field is absent or not what a run writes there.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object{DAMAGED}")

    def check(name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise DataError(
                f"{where}, field {name!r}: expected {expected}, got {one_line(repr(row.get(name)), 60)}{DAMAGED}"
            )

    for name in ("row_id", "text"):
        check(name, isinstance(row.get(name), str), "str")
    check("mode", is_whole(row.get("mode")) and row["mode"] in (NO_MODE, *MODES), f"int from 0 to {max(MODES)}")
    check("tag", row.get("tag") is None or isinstance(row["tag"], str), "str or null")
    for names, fits, expected in (
        (_NUMBERS, is_number, "a finite number or null"),
        (_COUNTS, is_whole, "a count or null"),
        (_TEXTS, lambda value: isinstance(value, str), "str or null"),
    ):
        for name in names:
            check(name, row.get(name) is None or fits(row[name]), expected)
    return ShownSample(
        row_id=row["row_id"],
        tag=row.get("tag") or NO_TAG,
        mode=row["mode"],
        text=row["text"],
        **{name: row.get(name) for name in (*_NUMBERS, *_COUNTS, *_TEXTS)},
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
        problems: what of the file is not as it was written, in words.
    """

    by_tag: Mapping[str, tuple[EarlyAndLate, ...]]
    left_out_tags: int
    problems: tuple[str, ...] = ()


def read_rollouts(path: Path, max_tags: int = 4) -> RolloutSamples:
    """Pick samples from a ``rollouts.jsonl`` in one pass.

    Raises:
        DataError: a line lacks a field that the page needs.
    """
    first: dict[tuple[str, int], ShownSample] = {}
    last: dict[tuple[str, int], ShownSample] = {}
    counts: Counter[str] = Counter()
    begin, end = math.inf, -math.inf
    for where, row in stream_jsonl(path):
        sample = shown_sample(row, where)
        if sample.step is None:
            raise DataError(f"{where}, field 'step': missing{DAMAGED}")
        if sample.step < end:
            raise DataError(f"{where}: step {sample.step} after step {end}{DAMAGED}")
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
    return RolloutSamples(by_tag, max(0, len(tags) - max_tags), tuple(_torn(path)))


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
        planned: number of answers there should be.
        problems: figures that the samples do not give, in words.
    """

    name: str
    checkpoint: str
    seed: int | None
    summary: Mapping[str, Summary]
    samples: tuple[ShownSample, ...]
    planned: int
    problems: tuple[str, ...] = ()

    @property
    def partial(self) -> str | None:
        """What is missing, marked PARTIAL; None when nothing is."""
        judged = self.summary[ALL_TAGS].samples - self.summary[ALL_TAGS].judge_failed
        return None if judged == self.planned else f"PARTIAL: {judged} of {self.planned} answers judged"


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
    checkpoint, seed = data.get("checkpoint"), data.get("seed")
    if not isinstance(checkpoint, str | None) or not (seed is None or is_whole(seed)):
        raise DataError(f"{where}: expected a text as 'checkpoint' and a number as 'seed'{DAMAGED}")
    summary = {tag: _summary(row, f"{where}, summary {tag!r}") for tag, row in data["summary"].items()}
    planned = data.get("planned", summary[ALL_TAGS].samples)
    if not is_whole(planned):
        raise DataError(f"{where}, field 'planned': expected a whole number, got {planned!r}{DAMAGED}")
    return Evaluation(
        name=data["name"],
        checkpoint=checkpoint or "",
        seed=seed,
        summary=summary,
        samples=tuple(shown_sample(row, f"{where}, sample {i}") for i, row in enumerate(data["samples"])),
        planned=planned,
    )


def _summary(row: Any, where: str) -> Summary:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object")
    for key in ("samples", "judge_failed"):
        if not is_whole(row.get(key)):
            raise DataError(f"{where}: needs an integer {key!r}, got {row.get(key)!r}{DAMAGED}")

    def number(key: str, values: Mapping[str, Any] = row) -> float | None:
        value = values.get(key)
        if value is None or value != value:
            return None
        if not is_number(value):
            raise DataError(f"{where}, field {key!r}: not a number: {value!r}{DAMAGED}")
        return float(value)

    shares = row.get("mode_share") or {}
    if not isinstance(shares, dict) or not set(shares) <= {str(mode) for mode in MODES}:
        raise DataError(
            f"{where}, field 'mode_share': expected a share of each mode, got {one_line(repr(shares), 60)}{DAMAGED}"
        )
    return Summary(
        samples=row["samples"],
        reward=number("reward"),
        goal=number("goal"),
        valid_format=number("valid_format"),
        tokens=number("tokens"),
        judge_failed=row["judge_failed"],
        mode_share={mode: number(str(mode), shares) or 0.0 for mode in MODES},
    )


def read_evaluation(path: Path) -> Evaluation:
    """An evaluation from its file.

    Raises:
        DataError: not JSON, or not an evaluation.
    """
    evaluation = parse_evaluation(read_record(path), str(path))
    return replace(evaluation, problems=tuple(_unlike_samples(evaluation, path.name)))


def _unlike_samples(evaluation: Evaluation, name: str) -> list[str]:
    """Figures of the summary that the samples beside it do not give."""
    problems = []
    for tag, stated in evaluation.summary.items():
        samples = [sample for sample in evaluation.samples if tag in (ALL_TAGS, sample.tag)]
        counted = _summary_of(samples)
        wrong = [f.name for f in fields(Summary) if not _alike(getattr(stated, f.name), getattr(counted, f.name))]
        if wrong:
            problems.append(f"{name}: {', '.join(wrong)} of {tag!r} are not what its samples give{DAMAGED}.")
    return problems


def _summary_of(samples: Sequence[ShownSample]) -> Summary:
    return Summary(
        samples=len(samples),
        reward=_mean(s.reward for s in samples),
        goal=_mean(s.goal for s in samples if s.mode),
        valid_format=_mean(float(s.format_rule is None) for s in samples),
        tokens=_mean(s.num_tokens for s in samples),
        judge_failed=sum(s.judge_error is not None for s in samples),
        mode_share={k: _mean(float(s.mode == k) for s in samples) or 0.0 for k in MODES},
    )


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present else None


def _alike(stated: Any, counted: Any) -> bool:
    if isinstance(stated, Mapping):
        return all(_alike(stated[key], counted[key]) for key in stated)
    if stated is None or counted is None:
        return stated is counted
    return math.isclose(stated, counted, rel_tol=1e-6, abs_tol=1e-9)


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
        edited: logs that are not those the last checkpoint was written after, in words.
    """

    folder: Path
    log: MetricsLog
    samples: RolloutSamples | None
    provenance: Mapping[str, Any] | None
    edited: tuple[str, ...] = ()

    @property
    def problems(self) -> list[str]:
        """What of the files is not as it was written, one sentence each."""
        return [*self.log.problems, *(self.samples.problems if self.samples is not None else ()), *self.edited]


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
    evaluations = in_checkpoint_order([read_evaluation(file) for file in _evaluation_files(folder)])
    if bc is None and ampo is None and not evaluations:
        raise DataError(
            f"{folder}: nothing to report; expected {METRICS_FILE} of a stage, results of an evaluation, or bc/, "
            f"ampo/ or {EVALUATIONS_FOLDER}/"
        )
    return Run(folder, bc, ampo, tuple(evaluations))


def _evaluation_files(folder: Path) -> list[Path]:
    """Results under ``evaluate/``; else, where the folder is an evaluation's own, those of the names evaluated there."""
    results = folder / EVALUATIONS_FOLDER
    files = [*sorted(results.glob("*.json")), *sorted((results / PARTIAL_FOLDER).glob("*.json"))]
    if not files:
        names = sorted(f"{own.name}.json" for own in (folder / "judge").glob("*/"))
        files = [file for place in (folder, folder / PARTIAL_FOLDER) for name in names if (file := place / name).is_file()]
    return [file for file in files if file.name != PROVENANCE_FILE]


def _stage(folder: Path) -> StageRun | None:
    metrics, rollouts, provenance = (folder / name for name in (METRICS_FILE, ROLLOUTS_FILE, PROVENANCE_FILE))
    if not metrics.exists() and not rollouts.exists():
        return None
    return StageRun(
        folder,
        read_metrics(metrics),
        read_rollouts(rollouts) if rollouts.exists() else None,
        read_provenance(provenance) if provenance.exists() else None,
        tuple(_edited(folder)),
    )


def read_provenance(path: Path) -> dict[str, Any]:
    """Versions and data hashes of a stage.

    Raises:
        DataError: not what a stage writes.
    """
    record = read_record(path)
    for name in ("packages", "data"):
        values = record.get(name, {})
        if not isinstance(values, dict) or not all(isinstance(value, str | None) for value in values.values()):
            raise DataError(f"{path}, field {name!r}: expected an object of texts{DAMAGED}")
    return record


def _edited(folder: Path) -> list[str]:
    """Logs that are not what the last checkpoint was written after. The last one written: a run may have gone back."""
    config = resolved_config(folder).get("checkpoint") or {}
    complete, _ = Store(Path(config.get("dir") or folder / "checkpoints")).scan()
    if not complete:
        return []
    manifest = max(complete, key=lambda checkpoint: checkpoint.manifest.written).manifest
    with disk_errors(f"cannot read the log of {folder}"):
        found = log_hashes(folder, {name: position for name, position in manifest.logs.items() if (folder / name).exists()})
    return [
        f"{name}: the lines up to step {manifest.step} are not those that its checkpoint was written after; the file was "
        "damaged or edited."
        for name, expected in manifest.log_hashes.items()
        if found.get(name) != expected
    ]
