"""What a report is made from: logs, samples and evaluations of a run folder, never completed by guesses.

A run folder is either the folder of one stage (it holds ``metrics.jsonl`` or ``rollouts.jsonl``) or a root
with the sub folders ``bc/``, ``ampo/`` and ``evaluate/``. Every part may be absent, at least one must be
there. ``rollouts.jsonl`` is streamed: of a run of any length only the few samples that are shown stay in
memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nemo_ampo.checkpoint.store import Store
from nemo_ampo.errors import DataError
from nemo_ampo.files import disk_errors, read_record
from nemo_ampo.job.attempts import resolved_config
from nemo_ampo.output.outcome import PARTIAL_FOLDER
from nemo_ampo.reply.modes import MODES
from nemo_ampo.report.training.metrics_log import DAMAGED, METRICS_FILE, MetricsLog, read_metrics
from nemo_ampo.report.training.numbers import is_number, is_whole
from nemo_ampo.report.training.samples import (
    ROLLOUTS_FILE,
    RolloutSamples,
    ShownSample,
    read_rollouts,
    shown_sample,
)
from nemo_ampo.run.runlog import log_hashes
from nemo_ampo.text import one_line
from nemo_ampo.types import ALL_TAGS

PROVENANCE_FILE = "provenance.json"
EVALUATIONS_FOLDER = "evaluate"
CHECKPOINT_ORDER = ("base", "bc", "ampo")
"""Evaluations of these names come first and in this order, further ones by name."""


# --- metrics --------------------------------------------------------------------------------------


# --- samples --------------------------------------------------------------------------------------


# --- evaluations ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleMeans:
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
    summary: Mapping[str, SampleMeans]
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


def _summary(row: Any, where: str) -> SampleMeans:
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
    return SampleMeans(
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
        wrong = [f.name for f in fields(SampleMeans) if not _alike(getattr(stated, f.name), getattr(counted, f.name))]
        if wrong:
            problems.append(f"{name}: {', '.join(wrong)} of {tag!r} are not what its samples give{DAMAGED}.")
    return problems


def _summary_of(samples: Sequence[ShownSample]) -> SampleMeans:
    return SampleMeans(
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
