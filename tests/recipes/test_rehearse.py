"""What a rehearsal refuses before it builds a model, the table of layouts, and what stops a rank."""

from __future__ import annotations

import os
import signal

import pytest
from typer.testing import CliRunner, Result

from nemo_ampo.commands.cli import make_app
from nemo_ampo.errors import UserError
from nemo_ampo.rehearse.sizes import GB, hardware_of
from recipes.rehearse import in_a_fork, ranks_that_differ

SEVEN = ("ampo", "--config-name", "qwen2.5_7b")


def rehearse(*words: str) -> Result:
    return CliRunner().invoke(make_app(), ["rehearse", *words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate"], "STAGE: a plan is for bc or ampo"),
        ([*SEVEN, "--gpus", "6"], "4 does not divide the 6 ranks"),
        ([*SEVEN, "--gpus", "8", "model.tensor_model_parallel_size=8"], "8 does not divide num_attention_heads=28"),
        ([*SEVEN, "--gpus", "8", "model.pipeline_model_parallel_size=3"], "pipeline_model_parallel_size"),
        ([*SEVEN, "--gpus", "8", "--rank", "8"], "--rank: expected all or a number below 8, got '8'"),
        ([*SEVEN, "--gpus", "8", "--rank", "first"], "--rank: expected all or a number below 8, got 'first'"),
        ([*SEVEN, "--gpus", "8", "--gpu", "b200"], "--gpu: expected one of h100, h200, a100"),
        ([*SEVEN, "--gpus", "8", "rollout.groupsize=4"], "groupsize"),
        ([*SEVEN, "--gpus", "8", "model.global_batch_size=3"], "global_batch_size"),
    ],
)
def test_what_the_stage_would_refuse_is_refused_before_a_model_is_built(words: list[str], told: str) -> None:
    result = rehearse(*words)
    assert isinstance(result.exception, UserError) and told in str(result.exception)


def test_the_search_lists_the_layouts_that_fit_and_no_other() -> None:
    result = rehearse(*SEVEN, "--gpus", "8", "--search")
    assert result.exit_code == 0
    head, *rows = [line.split() for line in result.output.splitlines() if line.strip()]
    assert head[:3] == ["TP", "PP", "DP"] and len(rows) > 4
    for row in rows:
        tensor, pipeline, data, _, _, _, _, memory, free, *_ = row
        assert int(tensor) * int(pipeline) * int(data) == 8
        assert float(memory) <= hardware_of("h100").room / GB + 0.05
        assert float(memory) + float(free) == pytest.approx(80, abs=0.2)
    # 7.6 G parameters with their optimizer do not fit one GPU without being split.
    assert all((row[0], row[1]) != ("1", "1") for row in rows)


def test_one_rank_of_each_kind() -> None:
    assert ranks_that_differ(1, 1, 1) == [0]
    assert ranks_that_differ(4, 1, 2) == [0, 3, 4]
    assert ranks_that_differ(2, 2, 2) == [0, 1, 2, 4, 5, 6]


def test_what_stops_a_rank_is_told_with_its_line() -> None:
    assert in_a_fork("rank 0", lambda: 6 * 7) == 42
    with pytest.raises(UserError, match=r"rank 3: division by zero \(test_rehearse\.py, line \d+: .*1 / 0"):
        in_a_fork("rank 3", lambda: 1 / 0)
    with pytest.raises(UserError, match="rank 3: died with status -9"):
        in_a_fork("rank 3", lambda: os.kill(os.getpid(), signal.SIGKILL))
