"""Single replies of a run folder: the few of ``rollouts.jsonl`` that are shown, whatever its length."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ampo.errors import DataError
from nemo_ampo.files import stream_jsonl
from nemo_ampo.reply.modes import MODES, NO_MODE
from nemo_ampo.report.training.metrics_log import DAMAGED, torn
from nemo_ampo.report.training.numbers import is_number, is_whole
from nemo_ampo.text import one_line

ROLLOUTS_FILE = "rollouts.jsonl"
NO_TAG = ""
"""Stands for the label of samples that have none."""


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
    return RolloutSamples(by_tag, max(0, len(tags) - max_tags), tuple(torn(path)))
