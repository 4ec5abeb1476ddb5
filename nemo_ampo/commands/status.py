"""``nemo-ampo status RUN``: what of a batch run is done, running and left, and what went wrong last."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ampo.job.attempts import AttemptLog, PlannedStage, checkpoint_step, read_plan, resolved_config
from nemo_ampo.report.training.metrics_log import read_metrics

if TYPE_CHECKING:
    from rich.table import Table

MAX_STEPS = {"bc": "sft", "ampo": "reinforce"}


@dataclass(frozen=True)
class StageStatus:
    """One stage.

    Attributes:
        name: of the stage.
        state: ``done``, ``running`` (its job has begun and not ended), ``stopped`` or ``to do``.
        steps: steps trained, of how many, and the newest checkpoint's, where that applies.
    """

    name: str
    state: str
    steps: str


@dataclass(frozen=True)
class RunStatus:
    """The whole run.

    Attributes:
        stages: in order.
        attempts: how often a job began.
        running: a job has begun and not ended; after a crash of its node, until the next attempt.
        last_end: how the last attempt ended, empty before.
        last_error: last error line of its logs, empty without one.
    """

    stages: tuple[StageStatus, ...]
    attempts: int
    running: bool
    last_end: str
    last_error: str

    def table(self) -> Table:
        """For a terminal."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("stage", "state", "steps"):
            table.add_column(heading)
        for stage in self.stages:
            table.add_row(stage.name, stage.state, stage.steps)
        return table

    def lines(self) -> list[str]:
        """What the table does not say."""
        found = [f"attempts    {self.attempts}{', one running' if self.running else ''}"]
        found += [f"last end    {self.last_end}"] if self.last_end else []
        found += [f"last error  {self.last_error}"] if self.last_error else []
        return found


def read_status(run_dir: Path) -> RunStatus:
    """Read a run folder.

    Raises:
        UserError: not the run folder of a batch job.
    """
    plan, rows = read_plan(run_dir), AttemptLog(run_dir).rows()
    running = bool(rows) and rows[-1]["event"] == "begin"
    first_open = next((s.name for s in plan if not Path(s.output).exists()), None)
    stages = tuple(_stage(run_dir, stage, stage.name == first_open, running) for stage in plan)
    ends = [row for row in rows if row["event"] == "end"]
    return RunStatus(
        stages=stages,
        attempts=sum(row["event"] == "begin" for row in rows),
        running=running,
        last_end=_end(ends[-1]) if ends else "",
        last_error=_last_error(run_dir) if first_open is not None else "",
    )


def _stage(run_dir: Path, stage: PlannedStage, is_next: bool, running: bool) -> StageStatus:
    folder = run_dir / stage.name
    if Path(stage.output).exists():
        state = "done"
    elif is_next and running:
        state = "running"
    elif stage.trains and (folder / "metrics.jsonl").exists():
        state = "stopped"
    else:
        state = "to do"
    return StageStatus(stage.name, state, _steps(folder, stage.name) if stage.trains else "")


def _steps(folder: Path, name: str) -> str:
    trained = read_metrics(folder / "metrics.jsonl").lines.get("train", ())
    if not trained:
        return ""
    try:
        total = int(resolved_config(folder)["trainer"][MAX_STEPS[name]]["max_steps"])
    except (LookupError, TypeError, ValueError):
        total = -1
    text = f"{trained[-1][0] + 1}" + (f" of {total}" if total > 0 else "")
    saved = checkpoint_step(folder)
    return text + (f", checkpoint at {saved}" if saved is not None else ", no checkpoint yet")


def _end(row: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(row["time"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return f"{when}: {row['reason']} (status {row['status']})"


def _last_error(run_dir: Path) -> str:
    """Last line that looks like an error in the newest attempt's logs, with its file."""
    attempts = sorted((run_dir / "logs").glob("*"), key=lambda path: path.stat().st_mtime)
    for folder in reversed(attempts):
        for log in sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime, reverse=True):
            for line in reversed(log.read_text(encoding="utf-8", errors="replace").splitlines()):
                if _is_error(line):
                    return f"{log.relative_to(run_dir)}: {line.strip()[:300]}"
        break
    return ""


def _is_error(line: str) -> bool:
    head = line.strip().split(" ", 1)[0]
    return line.startswith(("error:", "preflight: ")) or (head.endswith((":", "Error")) and "Error" in head)
