"""Keeps the evaluation scenarios out of training files.

The 90 situations of SOTOPIA's evaluation set are known by digests (``evaluation_scenarios.json``), so the check
needs no copy of the data: of each situation its key, and the lines of its scenario and goals as they appear in
prompts. A row is of an evaluation situation when it holds a line of the scenario and a line of a goal of the same
situation, or (RL rows) both its goals. Regenerate the file with
``python -m nemo_ampo.generate.overlap --sotopia-dir DIR``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from nemo_ampo.data.rows import Record, read_records, write_json
from nemo_ampo.dialogue.prompts import View, Viewer, visible_text
from nemo_ampo.dialogue.scenarios import Environment, check_official, load_scenarios
from nemo_ampo.errors import DataError, UserError

if TYPE_CHECKING:
    from nemo_ampo.dialogue.scenarios import ScenarioPack

SHIPPED = Path(__file__).with_name("evaluation_scenarios.json")
_LABEL = re.compile(r"^[^:\n]{1,80}: ")
_SHOWN_ROWS = 5


@dataclass(frozen=True)
class Fingerprint:
    """What one situation is recognised by; all texts as digests.

    Attributes:
        key: of its key in ``envs.json``.
        scenario: of the lines of its scenario, as any viewer may see them.
        goals: of the lines of each of its two goals.
    """

    key: str
    scenario: frozenset[str]
    goals: tuple[frozenset[str], frozenset[str]]


def digest(text: str) -> str:
    """Of a text without its spacing and capitals, 16 hex digits."""
    return hashlib.sha256(" ".join(text.lower().split()).encode("utf-8", "replace")).hexdigest()[:16]


def fingerprint(environment: Environment) -> Fingerprint:
    """Of one situation."""
    first, second = environment.goals
    return Fingerprint(digest(environment.environment_id), _lines(environment.scenario), (_lines(first), _lines(second)))


def _lines(text: str) -> frozenset[str]:
    """Digests of the lines of a text with viewer tags, in every version that may stand in a prompt."""
    versions = {visible_text(text, viewer, view) for viewer in get_args(Viewer) for view in get_args(View)}
    return frozenset(digest(line) for version in versions for line in version.split("\n") if line.strip())


def fingerprints(pack: ScenarioPack) -> list[Fingerprint]:
    """Of every situation of a folder."""
    return [fingerprint(environment) for environment in pack.environments.values()]


@cache
def evaluation_fingerprints() -> tuple[Fingerprint, ...]:
    """Of SOTOPIA's 90 evaluation situations."""
    records = json.loads(SHIPPED.read_text(encoding="utf-8"))["situations"]
    return tuple(
        Fingerprint(r["key"], frozenset(r["scenario"]), (frozenset(r["goals"][0]), frozenset(r["goals"][1])))
        for r in records
    )


def is_evaluation(environment: Environment) -> bool:
    """Whether a situation belongs to the evaluation set, by its key or, under another key, by its texts."""
    own = fingerprint(environment)
    return any(own.key == known.key or _same_texts(own, known) for known in evaluation_fingerprints())


def _same_texts(own: Fingerprint, known: Fingerprint) -> bool:
    goals = own.goals[0] == known.goals[0] and own.goals[1] == known.goals[1]
    swapped = own.goals[0] == known.goals[1] and own.goals[1] == known.goals[0]
    return bool(own.scenario & known.scenario) and (goals or swapped)


def check_no_overlap(path: str | Path, sotopia_dir: str | Path | None = None) -> int:
    """Refuse a training file that holds evaluation situations.

    Args:
        path: BC or RL rows, as JSON, JSONL or Parquet.
        sotopia_dir: another evaluation folder whose situations are looked for too.

    Returns:
        Number of rows checked.

    Raises:
        DataError: naming the rows.
    """
    known = list(evaluation_fingerprints())
    if sotopia_dir is not None:
        known += fingerprints(load_scenarios(sotopia_dir))
    return check_records(read_records(path), str(path), known)


def check_records(records: Sequence[Record], name: str, known: Sequence[Fingerprint] | None = None) -> int:
    """Refuse rows of known situations, before they become a file.

    Args:
        records: rows of any layout.
        name: of the file, for the message.
        known: SOTOPIA's evaluation situations by default.

    Returns:
        Number of rows checked.

    Raises:
        DataError: naming the rows.
    """
    index = _Index(known if known is not None else evaluation_fingerprints())
    found = [record.where for record in records if index.holds(record)]
    if found:
        shown = ", ".join(place.removeprefix(f"{name}, ") for place in found[:_SHOWN_ROWS])
        more = f" and {len(found) - _SHOWN_ROWS} more" if len(found) > _SHOWN_ROWS else ""
        raise DataError(
            f"{name}: {len(found)} of {len(records)} rows are of evaluation scenarios ({shown}{more}); "
            "a model trained on them has seen the test. Remove them, or say data.allow_evaluation_scenarios=true"
        )
    return len(records)


class _Index:
    """Which situations a line belongs to."""

    def __init__(self, known: Sequence[Fingerprint]) -> None:
        self.by_scenario = _inverted((line, i) for i, f in enumerate(known) for line in f.scenario)
        self.by_goal = _inverted((line, (i, j)) for i, f in enumerate(known) for j in (0, 1) for line in f.goals[j])

    def holds(self, record: Record) -> bool:
        """Whether a row is of a known situation."""
        lines = list(_digests(_prompt_of(record.values)))
        goals = {hit for line in lines for hit in self.by_goal.get(line, ())}
        if {i for line in lines for i in self.by_scenario.get(line, ())} & {i for i, _ in goals}:
            return True
        source = record.values.get("reward_model") or record.values
        both = [
            {hit for line in _digests(str(source.get(key) or "")) for hit in self.by_goal.get(line, ())}
            for key in ("agent1_goal", "agent2_goal")
        ]
        return any((i, 1 - j) in both[1] for i, j in both[0])


def _inverted(pairs: Iterable[tuple[str, Any]]) -> dict[str, set[Any]]:
    table: dict[str, set[Any]] = {}
    for line, value in pairs:
        table.setdefault(line, set()).add(value)
    return table


def _prompt_of(values: Mapping[str, Any]) -> str:
    """The user message of a row of any of the layouts."""
    messages = values.get("prompt")
    parts = [values.get("instruction"), values.get("input")]
    if isinstance(messages, list):
        parts += [message.get("content") for message in messages if isinstance(message, Mapping)]
    return "\n".join(part for part in parts if isinstance(part, str))


def _digests(text: str) -> Iterable[str]:
    """Of every line, with and without its label (``Scenario: ...``)."""
    for line in text.split("\n"):
        if line.strip():
            yield digest(line)
            if (label := _LABEL.match(line)) is not None:
                yield digest(line[label.end() :])


def write_fingerprints(sotopia_dir: str | Path, path: Path = SHIPPED) -> int:
    """Write the digests of an evaluation folder. Returns how many situations it holds.

    Raises:
        DataError: the folder is not the published evaluation set.
    """
    pack = load_scenarios(sotopia_dir)
    check_official(pack)
    situations = [
        {"key": f.key, "scenario": sorted(f.scenario), "goals": [sorted(goal) for goal in f.goals]}
        for f in sorted(fingerprints(pack), key=lambda f: f.key)
    ]
    note = "SHA-256 digests of SOTOPIA's evaluation situations, see nemo_ampo/generate/overlap.py; not the data itself"
    write_json({"note": note, "situations": situations}, path)
    return len(situations)


def main(argv: Sequence[str] | None = None) -> int:
    """Command: write the digests of the evaluation set, or check a training file against them."""
    parser = argparse.ArgumentParser(prog="python -m nemo_ampo.generate.overlap", description=main.__doc__)
    parser.add_argument("--sotopia-dir", help="evaluation folder: written down, or looked for too with --check")
    parser.add_argument("--check", metavar="ROWS", help="training file to check instead")
    args = parser.parse_args(argv)
    try:
        if args.check:
            sys.stdout.write(f"{check_no_overlap(args.check, args.sotopia_dir)} rows, none of an evaluation scenario\n")
        elif args.sotopia_dir:
            sys.stdout.write(f"{write_fingerprints(args.sotopia_dir)} situations -> {SHIPPED}\n")
        else:
            raise UserError("give --sotopia-dir or --check")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
