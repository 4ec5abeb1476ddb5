"""What a stage's command line says and returns, however the stage ends."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from forking import torchrun_environment
from omegaconf import DictConfig

from nemo_ampo.errors import EngineError, UserError
from nemo_ampo.rollout.engine import Caps, Request, SamplingSpec, UnavailableError
from nemo_ampo.rollout.engine import check_requests as refuse
from recipes import launch, rollout_doctor
from recipes.launch import main

CAPS = Caps("raw", 8, 5, 9, 300, False)
SAMPLING = SamplingSpec(max_new_tokens=4, stop_token_ids=(0,))
STAGE = ["run.name=x", "run.checkpoint=c", "run.dir=r", "data.turns=t"]


def raising(error: BaseException) -> Callable[[DictConfig], bool]:
    def run(cfg: DictConfig) -> bool:
        """Fail."""
        raise error

    return run


def test_an_engine_that_fails_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    status = main("evaluate", raising(UnavailableError("rollout server: no answer")), STAGE)
    assert (status, capsys.readouterr().err) == (2, "error: rollout server: no answer\n")


def test_what_fails_another_rank_alone_is_said_by_that_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "MAIN_RANK_FIRST_S", 0.0)
    for name, text in torchrun_environment(3, 4, 4711).items():
        monkeypatch.setenv(name, text)
    assert main("evaluate", raising(EngineError("worn out")), STAGE) == 2
    assert capsys.readouterr().err == "error: rank 3: worn out\n"
    assert main("evaluate", raising(UserError("full here")), STAGE) == 2
    assert capsys.readouterr().err == "error: rank 3: full here\n"


def test_a_prompt_too_long_for_the_engine_is_the_user_s_a_repeated_request_id_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_long(cfg: DictConfig) -> bool:
        """Ask for more than the engine can."""
        refuse([Request(0, (1,) * 6, 0)], SAMPLING, CAPS)
        return True

    def repeated(cfg: DictConfig) -> bool:
        """Ask twice under one id."""
        refuse([Request(0, (1,), 0)] * 2, SAMPLING, CAPS)
        return True

    assert main("evaluate", too_long, STAGE) == 2
    assert (
        "error: request 0: prompt of 6 tokens exceeds the engine's 5 (rollout.max_prompt_tokens)" in capsys.readouterr().err
    )
    with pytest.raises(EngineError, match="distinct"):
        main("evaluate", repeated, STAGE)


@pytest.mark.parametrize("program", ["stage", "rollout-doctor"])
def test_started_alone_in_an_allocation_it_is_one_process(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "3", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, text)
    seen: set[str] = set()

    def run(cfg: DictConfig) -> bool:
        """Look around."""
        seen.update(os.environ)
        return True

    monkeypatch.setattr(rollout_doctor, "run", run)
    assert (main("evaluate", run, STAGE) if program == "stage" else rollout_doctor.main([])) == 0
    assert seen and not seen & {"SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_PROCID", "WORLD_SIZE"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [({}, "stopped at a checkpoint; the same command continues"), ({"unfinished": "more to play"}, "more to play")],
)
def test_a_stage_says_in_its_own_words_that_it_is_not_done(
    words: dict[str, str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(cfg: DictConfig) -> bool:
        """Stop."""
        return False

    assert main("evaluate", run, STAGE, **words) == 75
    assert capsys.readouterr().err == f"{expected}\n"
