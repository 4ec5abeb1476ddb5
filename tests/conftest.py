"""What holds for every test."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

LONGEST = ("test_slurm", "test_smollm2", "test_resume", "test_sotopia_run", "test_slurm_rollout", "test_engine_contract")

# A shell starts background jobs with SIGINT ignored, and processes of the tests would inherit that: Ctrl-C is tested too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left alone with one at the end; the first mostly waits for Slurm."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _sigterm_as_before() -> Iterator[None]:
    """A stage that stopped ignores it until its process ends, which is that of the tests where they call the stage.

    Whatever a later test starts would ignore it too.
    """
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Keeps a figure for the end of the output, where those of passing tests are seen too."""
    return lambda figure: record_property("measured", figure)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists what the tests measured, in the order they ended."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    figures = [str(value) for report in reports for key, value in report.user_properties if key == "measured"]
    if figures:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(figures))
