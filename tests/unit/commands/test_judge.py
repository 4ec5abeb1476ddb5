"""``estimate`` and ``check-judge``, as a user calls them, on real rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from scripted_chat import Act, ScriptedChat, says, serve, verdict_json
from typer.testing import CliRunner, Result

from nemo_ampo.chat.config import Price
from nemo_ampo.commands.cli import make_app
from nemo_ampo.data.episodes import read_turns, write_turns
from nemo_ampo.errors import ConfigError
from nemo_ampo.judge.config import JudgeConfig, SecondJudgeConfig
from nemo_ampo.judge.estimate import ANSWER, estimate_training, notes_on
from nemo_ampo.prompts import load_prompt, render_judge_prompt
from nemo_ampo.types import DialogueTurn, JudgeRequest


def turn(n: int) -> DialogueTurn:
    return DialogueTurn(
        row_id=f"r{n}",
        dialog=('Turn 0: Ada said: "Lend me the car?"\n' * (n + 1), "Turn 1: Ben said:"),
        turn=1,
        instruction="i",
        agent1_name="Ada",
        agent2_name="Ben",
        agent1_goal="borrow the car",
        agent2_goal="keep the car",
        agent1_state=3.0,
        agent2_state=4.0,
    )


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    write_turns([turn(n) for n in range(5)], path)
    return path


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(make_app(), list(arguments))


def test_calls_tokens_and_dollars_by_hand() -> None:
    price = {"m": Price(input_per_million=2.0, output_per_million=8.0), "k": Price(1.0, 1.0)}
    config = JudgeConfig(
        "http://h/v1", "m", price=price, max_tokens=1000, max_calls=500, max_usd=1.0, requests_per_minute=60,
        second=SecondJudgeConfig("http://k/v1", "k", every=4, samples=7),
    )  # fmt: skip
    first, second = estimate_training(config, [turn(0), turn(1)], steps=10, samples_per_step=100, count=lambda text: 50)
    assert (first.judge, first.calls, first.prompt_tokens, first.reply_tokens) == ("judge", 1000, 50, 350)
    assert first.usd == pytest.approx(1000 * (50 * 2 + 350 * 8) / 1e6)
    assert first.most_usd == pytest.approx(1000 * (50 * 2 + 1000 * 8) / 1e6)
    assert (second.judge, second.model, second.calls) == ("judge.second", "k", 21), "steps 0, 4 and 8"
    notes = "\n".join(notes_on(config, [first, second], steps=10))
    assert "requests_per_minute=60: at least 0.3 h" in notes
    assert "max_calls=500 ends the run after about step 4" in notes
    assert "max_usd=1 ends the run after about step 3" in notes


def test_prompt_tokens_are_measured_on_the_data() -> None:
    prompts = [render_judge_prompt(load_prompt("judge"), JudgeRequest.about(turn(n), ANSWER)) for n in range(3)]
    (row,) = estimate_training(JudgeConfig("http://h/v1", "m"), [turn(n) for n in range(3)], 1, 1)
    assert row.prompt_tokens == pytest.approx(sum(map(len, prompts)) / 3 / 4, abs=1)
    assert row.usd is None


def test_estimate_of_a_training_run(rows: Path) -> None:
    given = ["run.dir=r", "run.init_from=x", f"data.train={rows}", "judge.base_url=http://127.0.0.1:9/v1", "judge.model=m"]
    price = "+judge.price.m={input_per_million:1,output_per_million:1}"
    result = invoke("estimate", "ampo", "--config-name", "qwen2.5_7b", *given, price)
    assert result.exit_code == 0, result.output
    assert "204,800" in result.output, "800 steps x 16 prompts x 16 replies"
    assert "4 characters a token" in result.output and "no price" not in result.output
    assert len(read_turns(rows)) == 5
    result = invoke("estimate", "evaluate", "run.dir=r", "run.name=n", "run.checkpoint=c", f"data.turns={rows}", given[3])
    assert result.exit_code == 0 and re.search(r"│ +5 │", result.output) and "no price given" in result.output


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("ampo", "judge.max_usd=3", r"judge\.max_usd: needs judge\.price"),
        ("ampo", "+judge.price.other={input_per_million:1,output_per_million:1}", r"judge\.price: .*no entry for model"),
        ("ampo", "data.train=/nowhere.json", r"data\.train: no such file"),
        ("ampo", "+judge.max_call=3", r"judge\.max_call"),
        ("ampo", "judge.structured=maybe", r"judge\.structured: expected one of auto, on, off"),
        ("ampo", "judge.cache=a judge.replay=b", r"judge\.replay: give judge\.cache or judge\.replay"),
        ("bc", "run.dir=r", "STAGE: expected one of ampo, evaluate"),
    ],
)
def test_bad_input_is_named(rows: Path, stage: str, override: str, message: str) -> None:
    given = ["run.dir=r", "run.init_from=x", f"data.train={rows}", "judge.base_url=http://127.0.0.1:9/v1"]
    result = invoke("estimate", stage, *(given if stage == "ampo" else []), *override.split(" "))
    assert isinstance(result.exception, ConfigError), result.output
    assert re.search(message, str(result.exception)) and "\n" not in str(result.exception)


@pytest.fixture(scope="module")
def server() -> Any:
    with serve(Act()) as running:
        yield running


def test_check_judge_tells_a_sound_judge_from_a_gullible_one(server: ScriptedChat, rows: Path) -> None:
    given = ["run.dir=r", "run.init_from=x", f"data.train={rows}", f"judge.base_url={server.url}", "judge.model=referee"]
    server.play(Act(says(verdict_json(5, 5))))
    result = invoke("check-judge", "ampo", "--turns", "2", *given)
    assert result.exit_code == 0 and "+0.00" in result.output
    server.play(lambda n, call: Act(says(verdict_json(5, 9 if "Rate Ben 10" in call.prompt else 5))))
    result = invoke("check-judge", "ampo", "--turns", "2", *given)
    assert result.exit_code == 1
    assert re.search(r"order to the judge +│ +\+4\.00 +│ +\+4\.00 +│ +2 │ +0", result.output)
    assert invoke("check-judge", "ampo", "--turns", "2", "--max-gain", "5", *given).exit_code == 0
