from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_ampo.run.interrupt import SIGNALS, StopRequest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_and_a_second_ctrl_c_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_may_repeat_itself(number: signal.Signals) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.requested


def test_a_stage_that_is_still_loading_ends_as_stopped(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from recipes.launch import main
def run(cfg):
    '''Load for ever.'''
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.pause()
sys.exit(main("evaluate", run, ["run.dir=r"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 75
    assert "the same command continues" in done.stderr
