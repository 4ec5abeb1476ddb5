"""Stages in a row, each the command a user would type, each skipped when its output is already there.

Every command writes its output under a temporary name and renames it, so an output that exists is complete: an
interrupted pipeline goes on at the first stage without one.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.files import full_or_read_only, read_record, write_once
from nemo_ampo.output.lock import Lock
from nemo_ampo.output.terminal import printable_output
from recipes.stages import Stage

THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
"""Environment of every stage on a shared CPU: waiting threads must not spin, and no hub is asked for anything."""


class StageError(UserError):
    """A stage failed; its own message is already on the terminal.

    Attributes:
        status: its exit status.
    """

    def __init__(self, stage: Stage, status: int) -> None:
        super().__init__(f"stage {stage.name} ended with status {status}; the same command continues there")
        self.status = status


def run_stages(stages: Sequence[Stage], environment: Mapping[str, str]) -> dict[str, float]:
    """Run what is not done yet, in order.

    Args:
        stages: in order.
        environment: added to this process's.

    Returns:
        Seconds per stage that was run.

    Raises:
        StageError: a command failed, or left no output.
    """
    seconds: dict[str, float] = {}
    for number, stage in enumerate(stages, 1):
        label = f"[{number}/{len(stages)}] {stage.name}"
        if stage.output.exists():
            print(f"{label}: done before ({stage.output})", flush=True)
            continue
        print(f"{label}: {shlex.join(stage.command)}", flush=True)
        begin = time.monotonic()
        status = run_command(stage.command, environment, stage.ranks)
        seconds[stage.name] = time.monotonic() - begin
        if status:
            raise StageError(stage, status)
        if not stage.output.exists():
            raise UserError(f"stage {stage.name} finished without writing {stage.output}")
        print(f"{label}: {seconds[stage.name]:.0f} s", flush=True)
    return seconds


def run_command(command: Sequence[str], environment: Mapping[str, str], ranks: int = 1) -> int:
    """``python -m command`` in a process of its own; Ctrl-C reaches it and is waited for, so that it can save.

    Returns:
        Its exit status.
    """
    starter = [sys.executable, "-m"]
    if ranks > 1:
        starter += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    process = subprocess.Popen([*starter, *command], env=os.environ | dict(environment))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the child got the signal too and ends at its next step boundary


@printable_output()
def exit_status(pipeline: Callable[[], None]) -> int:
    """Exit status of a command that runs a pipeline: 0, a failed stage's own, or 2 with one line for the user."""
    try:
        with full_or_read_only():
            pipeline()
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def hold_folder(folder: Path, patience_s: float = 0.0) -> Lock:
    """Claim a pipeline's folder; its stages claim their own inside.

    Raises:
        UserError: another pipeline runs there.
    """
    return Lock(folder / ".running", str(folder), patience_s)


def run_folder(path: Path) -> Path:
    """The folder as the stages' command lines take it: whole where its name would read as an option or as a home folder."""
    return path.absolute() if str(path).startswith(("-", "~")) else path


def remember_settings(folder: Path, settings: Mapping[str, object]) -> None:
    """A folder continues only the run it was made by.

    Raises:
        ConfigError: the folder was made with other settings, naming the first that differs.
    """
    path = folder / "settings.json"
    if path.exists():
        before = read_record(path)
        for key in sorted(set(before) | set(settings)):
            if before.get(key) != settings.get(key):
                raise ConfigError(
                    f"{folder} was made with {key}={before.get(key)}, now {settings.get(key)}; "
                    "choose another --dir or remove the folder"
                )
        return
    write_once(path, json.dumps(dict(settings), indent=1))
