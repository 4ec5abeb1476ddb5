from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nemo_ampo import doctor as machine
from nemo_ampo.compat import common, cpu, versions
from nemo_ampo.doctor import Check, Package, Report, Status, compat_table, doctor, memory_bytes, num_cores

ROOT = Path(__file__).resolve().parents[2]


def printed(table: object) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def found(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def test_no_framework_is_imported_to_look_at_it() -> None:
    code = (
        "import sys; from nemo_ampo.doctor import doctor, compat_table; doctor(); compat_table();"
        "print({'nemo', 'nemo_aligner', 'megatron', 'lightning', 'transformers', 'openai'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.strip() == "set()", done.stderr


def test_every_framework_is_named_with_its_version() -> None:
    report = doctor()
    for name, wanted in versions.EXPECTED.items():
        check = found(report, name)
        if versions.installed(name) == wanted:
            assert (check.status, check.found) == (Status.OK, wanted)
        else:
            assert check.status is Status.MISSING and wanted in check.advice


def test_another_framework_version_stops_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.EXPECTED, "torch", "0.0.1")
    report = doctor()
    assert not report.ok
    assert "needs exactly 0.0.1" in [c for c in report.checks if c.name == "torch"][-1].advice


def test_only_required_packages_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    optional = Package("no-such-package-a", "no_such_module_a", False, "from the container")
    monkeypatch.setattr(machine, "PACKAGES", (optional,))
    assert found(doctor(), "no-such-package-a").status is Status.NOTE
    required = Package("no-such-package-b", "no_such_module_b", True, "run `make setup`")
    monkeypatch.setattr(machine, "PACKAGES", (optional, required))
    report = doctor()
    assert found(report, "no-such-package-b").status is Status.MISSING
    assert not report.ok
    assert "run `make setup`" in printed(report.table())


def test_a_report_is_ok_without_missing_parts() -> None:
    def check(status: Status) -> Check:
        return Check("x", status, "y")

    assert Report((check(Status.OK), check(Status.NOTE), check(Status.WARN))).ok
    assert not Report((check(Status.OK), check(Status.MISSING))).ok


def test_the_judge_key_is_looked_for_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_JUDGE_KEY", "sk-very-secret")
    report = doctor("SOME_JUDGE_KEY")
    assert found(report, "judge key").status is Status.OK
    assert "very-secret" not in printed(report.table())
    monkeypatch.delenv("SOME_JUDGE_KEY")
    assert found(doctor("SOME_JUDGE_KEY"), "judge key").status is Status.WARN
    assert "judge key" not in [check.name for check in doctor().checks]


def test_slurm_is_asked_for_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(doctor(), "Slurm").status is Status.NOTE
    command = tmp_path / "sbatch"
    command.write_text("#!/bin/sh\necho slurm 99.1\n")
    command.chmod(0o755)
    assert found(doctor(), "Slurm").found == "slurm 99.1"


def test_sizes_are_those_of_this_process(tmp_path: Path) -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory_bytes() <= total
    report = doctor(folder=tmp_path / "not" / "there" / "yet")
    assert found(report, "free disk").found.endswith("GiB")


def test_little_room_is_a_warning_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LOW_MEMORY_GIB", 10**9)
    check = found(doctor(), "memory")
    assert check.status is Status.WARN and "rollout.batch_size" in check.advice


def test_every_substitute_is_listed_with_its_reason() -> None:
    text = printed(compat_table())
    for row in (row for table in (*common.TABLES, *cpu.TABLES) for row in table.rows):
        assert row.upstream in text
        assert row.reason.split()[0] in text
