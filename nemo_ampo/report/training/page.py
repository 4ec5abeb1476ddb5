"""The page: one self-contained HTML file that loads nothing and runs nothing.

Replies, labels and names come from a model or from data and are untrusted: the template escapes everything
but the charts, which hold numbers only, and a content security policy forbids scripts and network all the
same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ampo.errors import FormatError
from nemo_ampo.files import write_once
from nemo_ampo.reply.grammar import parse_reply
from nemo_ampo.reply.modes import MODES, NO_MODE
from nemo_ampo.report.plots import SMOOTH_FROM
from nemo_ampo.report.render import render_template
from nemo_ampo.report.training import alarms, charts, tables
from nemo_ampo.report.training.inputs import Evaluation, Run, StageRun, read_run
from nemo_ampo.report.training.samples import NO_TAG, ShownSample
from nemo_ampo.types import ALL_TAGS

REPORT_FILE = "report.html"
CHECKPOINT_TITLES = {"base": "Before BC", "bc": "After BC", "ampo": "After AMPO"}
MAX_COMPARED_TAGS = 4


@dataclass(frozen=True)
class CheckpointCard:
    """One card at the top of the page.

    Attributes:
        title: the checkpoint or the part of the run.
        note: what the figures are means of.
        goal, reward, valid, tokens: formatted figures.
        modes: share of each mode, of broken replies as 0.
    """

    title: str
    note: str
    goal: str
    reward: str
    valid: str
    tokens: str
    modes: Mapping[int, float]


@dataclass(frozen=True)
class Card:
    """One reply, taken apart for reading.

    Attributes:
        title: where it comes from.
        mode: 1..4, 0 when it breaks the grammar.
        context: the dialogue before the reply, None if it was not logged.
        answer: spoken words, None when the grammar is broken.
        thinking: section name and text.
        raw: the whole reply.
        facts: name and formatted value of each number that was logged.
        problem: the broken rule or the judge's failure.
    """

    title: str
    mode: int
    context: str | None
    answer: str | None
    thinking: tuple[tuple[str, str], ...]
    raw: str
    facts: tuple[tuple[str, str], ...]
    problem: str | None


@dataclass(frozen=True)
class SampleRow:
    """Early and late reply of one mode; None where the mode was not used then."""

    mode: int
    early: Card | None
    late: Card | None


@dataclass(frozen=True)
class AnsweredPrompt:
    """One prompt answered by every checkpoint."""

    tag: str
    row_id: str
    context: str | None
    cards: tuple[Card, ...]


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Render the report of a run folder.

    Args:
        folder: a stage's run folder or a root with ``bc/``, ``ampo/``, ``evaluate/``.
        out: file to write, ``report.html`` in the folder by default.

    Returns:
        The file written.

    Raises:
        DataError: nothing to report, or a bad file.
    """
    target = out or folder / REPORT_FILE
    write_once(target, render(read_run(folder)))
    return target


def render(run: Run) -> str:
    """The page as text."""
    return render_template("training.html.j2", context(run))


def context(run: Run) -> dict[str, Any]:
    """Everything the template shows."""
    ampo, bc = run.ampo, run.bc
    return {
        "title": run.folder.resolve().name,
        "missing": missing_parts(run),
        "headlines": headlines(run),
        "mode_names": {k: mode.name for k, mode in MODES.items()} | {NO_MODE: charts.BROKEN},
        "evaluation_columns": tables.EVALUATION_COLUMNS,
        "evaluation_rows": tables.evaluation_rows(run.evaluations),
        "evaluations": run.evaluations,
        "comparisons": comparisons(run.evaluations),
        "ampo_steps": ampo.log.num_steps if ampo else 0,
        "mode_charts": [*charts.mode_shares(ampo.log), *charts.draw(charts.MODE_PANELS, ampo.log)] if ampo else [],
        "alarms": [*file_problems(run), *(alarms.alarms(ampo.log) if ampo else [])],
        "judge_figures": alarms.judge_figures(ampo.log) if ampo else [],
        "ampo_sections": _sections(ampo),
        "training_rows": tables.training_rows(ampo.log) if ampo else [],
        "bc_charts": charts.draw(charts.BC_PANELS, bc.log) if bc else [],
        "bc_steps": bc.log.num_steps if bc else 0,
        "samples": _sample_rows(ampo),
        "left_out_tags": ampo.samples.left_out_tags if ampo and ampo.samples else 0,
        "provenance": [
            (name, json.dumps(stage.provenance, indent=2, ensure_ascii=False))
            for name, stage in (("BC", bc), ("AMPO", ampo))
            if stage is not None and stage.provenance is not None
        ],
        "smooth_from": SMOOTH_FROM,
    }


def file_problems(run: Run) -> list[str]:
    """Files that are not as the run wrote them; what is shown of them deserves no trust."""
    stages = (("BC", run.bc), ("AMPO", run.ampo))
    found = [f"{name}, {problem}" for name, stage in stages if stage is not None for problem in stage.problems]
    return [*found, *(problem for evaluation in run.evaluations for problem in evaluation.problems)]


def missing_parts(run: Run) -> list[str]:
    """One sentence for each part that was not found."""
    missing = []
    if not run.evaluations:
        missing.append("No evaluation (evaluate/*.json) was found.")
    if run.bc is None:
        missing.append("No behaviour-cloning log was found.")
    if run.ampo is None:
        missing.append("No AMPO log was found.")
    elif run.ampo.log.num_steps == 0:
        missing.append("The AMPO log holds no training step yet.")
    elif run.ampo.samples is None:
        missing.append("No sampled replies (rollouts.jsonl) were found.")
    return missing


def headlines(run: Run) -> list[CheckpointCard]:
    """A card per evaluated checkpoint, or the two ends of the training run when nothing was evaluated."""
    if run.evaluations:
        return [_evaluated(evaluation) for evaluation in run.evaluations]
    if run.ampo is None or not run.ampo.log.series("reward/mean"):
        return []
    names = ("reward/goal", "reward/mean", "format/failed_fraction", "tokens/response")
    series = {name: run.ampo.log.series(name) for name in (*names, *(f"mode/{k}/share" for k in MODES))}
    cards = []
    for end, title in enumerate(("First steps", "Last steps")):
        values = {name: points.ends()[end] for name, points in series.items() if points}
        failed = values.get("format/failed_fraction")
        cards.append(
            CheckpointCard(
                title=title,
                note=f"training samples, mean over the {title.split()[0].lower()} tenth of the steps",
                goal=tables.number(values.get("reward/goal")),
                reward=tables.number(values.get("reward/mean")),
                valid=tables.percent(None if failed is None else 1 - failed),
                tokens=tables.number(values.get("tokens/response"), 1),
                modes=_with_broken({k: values.get(f"mode/{k}/share", 0.0) for k in MODES}),
            )
        )
    return cards


def _evaluated(evaluation: Evaluation) -> CheckpointCard:
    summary = evaluation.summary[ALL_TAGS]
    return CheckpointCard(
        title=CHECKPOINT_TITLES.get(evaluation.name, evaluation.name),
        note=evaluation.partial or f"{summary.samples} held-out answers",
        goal=tables.number(summary.goal),
        reward=tables.number(summary.reward),
        valid=tables.percent(summary.valid_format),
        tokens=tables.number(summary.tokens, 1),
        modes=_with_broken(summary.mode_share) if summary.samples else {},
    )


def _with_broken(shares: Mapping[int, float]) -> dict[int, float]:
    return dict(shares) | {NO_MODE: max(0.0, 1.0 - sum(shares.values()))}


def _sections(ampo: StageRun | None) -> list[tuple[str, list[charts.Chart]]]:
    if ampo is None:
        return []
    drawn = ((title, charts.draw(panels, ampo.log)) for title, panels in charts.AMPO_PANELS.items())
    return [(title, found) for title, found in drawn if found]


# --- samples --------------------------------------------------------------------------------------


def card(sample: ShownSample, title: str) -> Card:
    """Take a reply apart; one that breaks the grammar stays whole."""
    try:
        reply = parse_reply(sample.text)
        answer, thinking = reply.answer, tuple(reply.thinking.items())
    except FormatError:
        answer, thinking = None, ()
    problem = None
    if sample.format_rule is not None:
        problem = f"breaks the grammar (rule: {sample.format_rule})"
    elif sample.judge_error is not None:
        problem = f"the judge failed ({sample.judge_error}); no reward"
    before = sample.dialogue
    if before is not None and answer is not None:
        before = before.rstrip().removesuffix(answer).rstrip()
    return Card(title, sample.mode, before, answer, thinking, sample.text, _facts(sample), problem)


def _facts(sample: ShownSample) -> tuple[tuple[str, str], ...]:
    judged = sample.agent1_score is not None and sample.agent2_score is not None
    facts = (
        ("reward", tables.number(sample.reward)),
        ("goal", tables.number(sample.goal)),
        ("length", tables.number(sample.length)),
        ("judge", f"{sample.agent1_score:.3g} / {sample.agent2_score:.3g}" if judged else tables.ABSENT),
        ("advantage", tables.ABSENT if sample.advantage is None else f"{sample.advantage:+.3f}"),
        ("tokens", tables.number(sample.num_tokens, 0)),
        ("answer tokens", tables.number(sample.answer_tokens, 0)),
    )
    return tuple((name, value) for name, value in facts if value != tables.ABSENT)


def _sample_rows(ampo: StageRun | None) -> list[tuple[str, list[SampleRow]]]:
    if ampo is None or ampo.samples is None:
        return []

    def at_step(sample: ShownSample | None) -> Card | None:
        return None if sample is None else card(sample, f"step {sample.step}")

    return [
        (
            "all prompts" if tag == NO_TAG else tag,
            [SampleRow(pair.mode, at_step(pair.early), at_step(pair.late)) for pair in pairs],
        )
        for tag, pairs in ampo.samples.by_tag.items()
    ]


def comparisons(evaluations: Sequence[Evaluation]) -> list[AnsweredPrompt]:
    """For each label one prompt that every checkpoint answered."""
    if len(evaluations) < 2:
        return []
    answered = [{sample.row_id: sample for sample in reversed(e.samples)} for e in evaluations]
    found: dict[str, AnsweredPrompt] = {}
    for sample in evaluations[0].samples:
        if sample.tag in found or not all(sample.row_id in answers for answers in answered):
            continue
        cards = tuple(
            card(answers[sample.row_id], CHECKPOINT_TITLES.get(evaluation.name, evaluation.name))
            for evaluation, answers in zip(evaluations, answered, strict=True)
        )
        contexts = [c.context for c in cards if c.context is not None and c.answer is not None]
        found[sample.tag] = AnsweredPrompt(sample.tag, sample.row_id, contexts[0] if contexts else cards[0].context, cards)
    return [found[tag] for tag in sorted(found)][:MAX_COMPARED_TAGS]
