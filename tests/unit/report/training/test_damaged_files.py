"""Every way to damage a run folder that a seeded fuzzer finds: one line, an alarm on the page, or the same numbers."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_run import GROUP, evaluation, turn, write_ampo, write_bc

from nemo_ampo.checkpoint.store import MANIFEST, JobLayout, Manifest
from nemo_ampo.errors import UserError
from nemo_ampo.files import sealed
from nemo_ampo.report.training.inputs import read_run
from nemo_ampo.report.training.page import file_problems, write_report
from nemo_ampo.run.runlog import log_hashes, log_positions

INPUTS = 600
FILES = (
    "ampo/metrics.jsonl",
    "ampo/rollouts.jsonl",
    "ampo/provenance.json",
    "ampo/config.yaml",
    "bc/metrics.jsonl",
    "evaluate/bc.json",
)
STRANGE: tuple[Any, ...] = (None, True, "x", "1", [], {}, -1, 1.5, 10**400, "\x1b[2J", ["a"], {"a": 1})


def consistent(name: str) -> dict[str, Any]:
    """An evaluation whose summary is what its two samples give."""
    record = evaluation(name, 0.5)
    sample = record["samples"][0]
    means = {"samples": 2, "reward": 0.5, "goal": 0.5, "valid_format": 1.0, "tokens": 12.0, "judge_failed": 0}
    summary = means | {"mode_share": {"1": 1.0, "2": 0.0, "3": 0.0, "4": 0.0}}
    return sealed(
        record | {"summary": {"all": dict(summary), "easy": summary}, "samples": [sample, sample | {"row_id": "e-2"}]}
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run folder with a checkpoint behind its logs."""
    root = tmp_path_factory.mktemp("whole")
    write_bc(root / "bc", 10)
    write_ampo(root / "ampo", 4)
    rows = (root / "ampo" / "rollouts.jsonl").read_text().splitlines(keepends=True)
    (root / "ampo" / "rollouts.jsonl").write_text("".join(rows[:: GROUP // 4]))
    (root / "ampo" / "provenance.json").write_text(json.dumps({"packages": {"torch": "2"}, "data": {"a": "b"}}))
    (root / "ampo" / "config.yaml").write_text("checkpoint:\n  dir: null\ntrainer:\n  reinforce:\n    max_steps: 4\n")
    (root / "evaluate").mkdir()
    (root / "evaluate" / "bc.json").write_text(json.dumps(consistent("bc")))
    for stage in ("ampo", "bc"):
        logs = log_positions(root / stage)
        hashes = log_hashes(root / stage, logs)
        layout = JobLayout(**dict.fromkeys(JobLayout.__dataclass_fields__, 1))
        manifest = Manifest(stage, 4, {"step": 4}, layout, {}, None, logs, {}, log_hashes=hashes)
        folder = root / stage / "checkpoints" / "step-000004"
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text(manifest.dump())
    return root


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One thing changed: bytes, lines, or a value somewhere in the JSON."""
    place = rng.randrange(max(len(data), 1))
    lines = data.splitlines(keepends=True)
    line = rng.randrange(max(len(lines), 1))
    ways: list[Callable[[], bytes]] = [
        lambda: data[:place],
        lambda: data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :],
        lambda: data[:place] + rng.randbytes(4) + data[place:],
        lambda: b"".join(lines[:line] + lines[line + 1 :]),
        lambda: b"".join([*lines[: line + 1], *lines[line:]]),
        lambda: b"".join([*lines[:line], *reversed(lines[line:])]),
        lambda: b"".join([*lines[:line], value_changed(lines[line], rng), *lines[line + 1 :]]),
        lambda: b"".join([*lines[:line], value_changed(lines[line], rng), *lines[line + 1 :]]),
        lambda: b"".join([*lines[:line], digits_changed(lines[line], rng), *lines[line + 1 :]]),
        lambda: b"",
    ]
    return rng.choice(ways)()


def value_changed(line: bytes, rng: random.Random) -> bytes:
    try:
        record = json.loads(line)
    except ValueError:
        return b"[" * rng.randrange(1, 5000) + b"\n"
    holder, key = rng.choice(holders(record)) if holders(record) else ([record], 0)
    way = rng.randrange(4)
    if way == 0 and isinstance(holder, dict):
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[key] = rng.choice((*STRANGE, float("nan"), float("inf"), -float("inf")))
    text = json.dumps(record)
    if way == 3 and text.startswith("{"):
        text = '{"step": 0, "name": "x", ' + text[1:]
    return text.encode() + (b"\n" if line.endswith(b"\n") else b"")


def holders(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON value as container and key."""
    places = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [(value, key) for key, _ in places] + [place for _, inner in places for place in holders(inner)]


def digits_changed(line: bytes, rng: random.Random) -> bytes:
    digits = [i for i, byte in enumerate(line) if chr(byte).isdigit()]
    if not digits:
        return line + b"7"
    i = rng.choice(digits)
    return line[:i] + str((int(chr(line[i])) + 1) % 10).encode() + line[i + 1 :]


def shown(root: Path) -> str:
    """What a page can be made of."""
    run = read_run(root)
    stages = [(stage.log.lines, stage.samples) for stage in (run.bc, run.ampo) if stage is not None]
    return repr((stages, [(e.name, e.summary, e.samples) for e in run.evaluations]))


def test_no_damage_is_a_traceback_or_a_changed_number_without_a_word(whole: Path, tmp_path: Path) -> None:
    rng, before, outcomes = random.Random(12), shown(whole), {"refused": 0, "alarm": 0, "same": 0}
    assert file_problems(read_run(whole)) == []
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    for number in range(INPUTS):
        name = FILES[number % len(FILES)]
        original = (copy / name).read_bytes()
        (copy / name).write_bytes(damaged(original, rng))
        try:
            alarms, after = file_problems(read_run(copy)), shown(copy)
        except UserError as error:
            assert "\n" not in str(error) and str(copy) in str(error), (name, error)
            outcomes["refused"] += 1
        else:
            assert alarms or after == before, (number, name, (copy / name).read_bytes()[:2000])
            outcomes["alarm" if alarms else "same"] += 1
        (copy / name).write_bytes(original)
    assert sum(outcomes.values()) == INPUTS and min(outcomes.values()) > 10, outcomes


def test_a_removed_line_and_an_edited_number_are_alarms_on_the_page(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(whole, root)
    log = root / "ampo" / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:1] + lines[2:]))
    problems = file_problems(read_run(root))
    assert problems[0] == "AMPO, metrics.jsonl: the lines of steps 1 are missing."
    assert "the lines up to step 4 are not those that its checkpoint was written after" in problems[1]
    assert "the lines of steps 1 are missing." in write_report(root).read_text()


def test_a_summary_without_a_seal_that_its_samples_do_not_give_is_an_alarm(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(whole, root)
    record = consistent("bc")
    del record["seal"]
    record["summary"]["all"] |= {"goal": 0.9}
    (root / "evaluate" / "bc.json").write_text(json.dumps(record))
    (problem,) = [problem for problem in file_problems(read_run(root)) if problem.startswith("bc.json")]
    assert problem.startswith("bc.json: goal of 'all' are not what its samples give")


def test_a_reply_turns_no_text_of_the_page_around(tmp_path: Path) -> None:
    hostile = {"text": "a\u202eb\x1b[2Jc\x9bd<script>", "dialogue": "\u2066x", "tag": "t\x07"}
    extra = {"row_id": turn("x", "t").row_id, "mode": 0, **hostile}
    write_ampo(tmp_path, 2, (extra,))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "a\\u202eb\\x1b[2Jc\\x9bd&lt;script&gt;" in page
    assert not set(page) & set("\u202e\x1b\x9b\u2066\x07")
