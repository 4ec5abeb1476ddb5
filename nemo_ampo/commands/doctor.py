"""What this machine can run, and what is missing for the rest: one table, no heavy framework imported.

A check is *required* when the CPU default (``make quickstart``) cannot run without it; everything else is a
note about what a cluster would add. Packages are looked up by their metadata, so that a broken installation
is still described.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from nemo_ampo.compat.versions import TestedEnvironment, WrongVersion

LOW_MEMORY_GIB = 8
LOW_DISK_GIB = 5


class Status(Enum):
    """Outcome of one check."""

    OK = "ok"
    NOTE = "note"
    """Absent, and only needed elsewhere."""
    WARN = "warn"
    """Present but short of what is comfortable."""
    MISSING = "missing"
    """The CPU default cannot run."""


@dataclass(frozen=True)
class ReportLine:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: how it is.
        found: version, size or address.
        advice: what to do about it, empty when there is nothing to do.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """All checks, in reading order.

    Attributes:
        checks: what was looked at.
        mend: the one command that installs what is missing or of another version; empty when nothing is.
    """

    checks: tuple[ReportLine, ...]
    mend: str = ""

    @property
    def ok(self) -> bool:
        """True when the CPU default can run, on the versions that it was tested with."""
        return not self.mend and all(check.status is not Status.MISSING for check in self.checks)

    def table(self) -> Table:
        """For a terminal."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        colours = {Status.OK: "green", Status.NOTE: "dim", Status.WARN: "yellow", Status.MISSING: "bold red"}
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("check", "", "found", "what to do"):
            table.add_column(heading, overflow="fold")
        for check in self.checks:
            status = Text(check.status.value, style=colours[check.status])
            table.add_row(Text(check.name), status, Text(check.found), Text(check.advice))
        return table


@dataclass(frozen=True)
class Package:
    """A package beside the pinned frameworks.

    Attributes:
        name: distribution name.
        module: its top-level module.
        required: the CPU default needs it.
        advice: what it is for and where it comes from.
    """

    name: str
    module: str
    required: bool
    advice: str


_BELOW = "see below"
PACKAGES: tuple[Package, ...] = (
    *(
        Package(name, module, True, _BELOW)
        for name, module in (
            ("openai", "openai"),
            ("aiohttp", "aiohttp"),
            ("orjson", "orjson"),
            ("fastapi", "fastapi"),
            ("hydra-core", "hydra"),
            ("jinja2", "jinja2"),
            ("lightning", "lightning"),
            ("matplotlib", "matplotlib"),
            ("omegaconf", "omegaconf"),
            ("pyarrow", "pyarrow"),
            ("safetensors", "safetensors"),
            ("tenacity", "tenacity"),
            ("typer", "typer"),
            ("uvicorn", "uvicorn"),
            ("uvloop", "uvloop"),
        )
    ),
    Package("gguf", "gguf", False, "for converters.gguf_to_hf; pip install gguf"),
    Package("transformer-engine", "transformer_engine", False, "GPU layers; part of the NeMo container"),
    Package("apex", "apex", False, "GPU optimizer kernels; part of the NeMo container"),
    Package("tensorrt-llm", "tensorrt_llm", False, "for rollout.engine=trtllm, needs 0.17; see docs/engines.md"),
)


def doctor(judge_key_env: str | None = None, folder: Path = Path()) -> Report:
    """Look at this machine.

    Args:
        judge_key_env: name of the environment variable that should hold the judge's key; its value is never
            shown.
        folder: where runs will be written.
    """
    from nemo_ampo.compat.versions import cure, differences, environment

    of = environment()
    wrong = differences(of) if of else []
    checks = (
        *_machine(folder),
        *_torch(),
        *_frameworks(),
        *_packages(),
        _pins(of, wrong),
        _slurm(),
        *_judge_key(judge_key_env),
    )
    short = any(check.status is Status.MISSING for check in checks)
    return Report(checks, cure() if wrong or short else "")


def compat_table() -> Table:
    """What is replaced in the frameworks, on every machine and on a CPU: upstream symbol, version, reason."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from nemo_ampo.compat import common, cpu

    table = Table(
        title="Substitutes: on every machine, then on a CPU",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("upstream", "version", "reason"):
        table.add_column(heading, overflow="fold")
    for rows in (part.rows for part in (*common.TABLES, *cpu.TABLES)):
        for row in rows:
            table.add_row(Text(row.upstream), Text(row.version), Text(row.reason), end_section=row is rows[-1])
    return table


def _machine(folder: Path) -> Iterator[ReportLine]:
    from nemo_ampo import __version__
    from nemo_ampo.compat.versions import ENVIRONMENTS

    yield ReportLine("nemo-ampo", Status.OK, __version__)
    version = ".".join(map(str, sys.version_info[:3]))
    right = sys.version_info[:2] in ENVIRONMENTS
    yield ReportLine("Python", Status.OK if right else Status.MISSING, version, "" if right else _BELOW)
    yield ReportLine("platform", Status.OK, f"{platform.system()} {platform.machine()}, {num_cores()} cores")
    yield _size("memory", memory_bytes(), LOW_MEMORY_GIB, "close other programs, or lower rollout.batch_size")
    free = shutil.disk_usage(_existing(folder)).free
    yield _size("free disk", free, LOW_DISK_GIB, f"checkpoints go below {folder.resolve()}; free some space")


def _size(name: str, size: int, low_gib: int, advice: str) -> ReportLine:
    gib = size / 2**30
    low = gib < low_gib
    return ReportLine(name, Status.WARN if low else Status.OK, f"{gib:.1f} GiB", advice if low else "")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or its container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def _torch() -> Iterator[ReportLine]:
    from nemo_ampo.compat.versions import installed

    version = installed("torch")
    if version is None:
        yield ReportLine("torch", Status.MISSING, "not installed", _BELOW)
        return
    try:
        import torch
    except (ImportError, OSError) as error:  # a library of the installation is absent or for another machine
        yield ReportLine("torch", Status.MISSING, f"{version}, cannot be imported: {error}", _BELOW)
        return
    yield ReportLine("torch", Status.OK, version)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield ReportLine("GPU", Status.OK, f"{len(names)} x {names[0]}")
    elif shutil.which("nvidia-smi"):
        yield ReportLine(
            "GPU",
            Status.NOTE,
            "a driver, but torch sees no GPU",
            "install a CUDA build of torch, or use device=cpu",
        )
    else:
        yield ReportLine("GPU", Status.NOTE, "none", "recipes run on the CPU over gloo")


def _frameworks() -> Iterator[ReportLine]:
    from nemo_ampo.compat.versions import EXPECTED, fits, installed

    for name, want in EXPECTED.items():
        found = installed(name)
        if fits(found, want):
            yield ReportLine(name, Status.OK, str(found))
        else:
            yield ReportLine(name, Status.MISSING, found or "not installed", f"needs {want}; {_BELOW}")


def _packages() -> Iterator[ReportLine]:
    from nemo_ampo.compat.versions import installed

    for package in PACKAGES:
        found = installed(package.name)
        if found is None and util.find_spec(package.module) is not None:
            found = "version unknown"
        if found is not None:
            yield ReportLine(package.name, Status.OK, found)
        else:
            status = Status.MISSING if package.required else Status.NOTE
            yield ReportLine(package.name, status, "not installed", package.advice)


def _pins(of: TestedEnvironment | None, wrong: Sequence[WrongVersion]) -> ReportLine:
    if of is None:
        return ReportLine(
            "pins", Status.NOTE, "no lock for this Python in this installation", "versions are not compared one by one"
        )
    from nemo_ampo.compat.versions import ROOT, pins

    found = f"{len(pins(ROOT / of.lock))} of {of.lock}"
    if not wrong:
        return ReportLine("pins", Status.OK, f"{found}, all as pinned")
    rows = ", ".join(f"{d.name} {d.found or 'absent'} (pinned: {d.pinned})" for d in wrong)
    return ReportLine("pins", Status.WARN, f"{found}, {len(wrong)} differ: {rows}", _BELOW)


def _slurm() -> ReportLine:
    command = shutil.which("sbatch")
    if command is None:
        return ReportLine("Slurm", Status.NOTE, "no sbatch", "only needed on a cluster")
    try:
        answer = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return ReportLine("Slurm", Status.WARN, f"sbatch does not answer: {error}", "ask the cluster's support")
    return ReportLine("Slurm", Status.OK, answer.stdout.strip() or command)


def _judge_key(variable: str | None) -> Iterator[ReportLine]:
    if variable is None:
        return
    if os.environ.get(variable):
        yield ReportLine("judge key", Status.OK, f"${variable} is set")
    else:
        yield ReportLine("judge key", Status.WARN, f"${variable} is empty", f"export {variable}=... before the run")
