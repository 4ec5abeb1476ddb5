"""An evaluation is complete or says that it is not, keeps what was paid for, and continues only itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from fault_judge import MODEL, FaultJudge, fault_judge
from tiny_hf import edit_weights, write_model

from nemo_ampo.config.compose import compose
from nemo_ampo.config.reading import read_config
from nemo_ampo.data.episodes import read_turns
from nemo_ampo.errors import ConfigError, DataError
from nemo_ampo.evaluate import held_out as evaluation
from nemo_ampo.evaluate.config import EvaluateConfig
from nemo_ampo.files import read_jsonl
from nemo_ampo.judge.client import _FIRST_REQUEST
from nemo_ampo.prompts import load_prompt, render_judge_prompt
from nemo_ampo.report.training.inputs import parse_evaluation, read_evaluation
from nemo_ampo.report.training.tables import evaluation_rows
from nemo_ampo.serve.engine import Generated, GenerateRequest, ServingEngine
from nemo_ampo.world.pack import make_pack
from recipes import evaluate as recipe
from recipes.launch import main

Evaluate = Callable[..., int]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    write_model(folder / "hf", "qwen2", tied=True, max_position_embeddings=4096)
    make_pack(folder / "world", 1, num_bc=1, num_rl=1, num_heldout=10)
    return folder


@pytest.fixture
def judge() -> Iterator[FaultJudge]:
    with fault_judge(0) as running:
        yield running


@pytest.fixture
def run(policy: Path, judge: FaultJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy / "hf")

    def submit(self: ServingEngine, request: GenerateRequest) -> Future[Generated]:
        """What a trained policy says, drawn by the request's seed; an untrained one would say nothing the judge must see."""
        text = f'Thinking Level: 1\n<|begin_of_answer|>\n"Meet {request.seed}."\n<|end_of_answer|>'
        reply: Future[Generated] = Future()
        reply.set_result(Generated(tuple(tokenizer.encode(text, add_special_tokens=False)), text, "stop"))
        return reply

    monkeypatch.setattr(ServingEngine, "submit", submit)

    def evaluate(*overrides: str, name: str = "one") -> int:
        given = [
            *(f"run.dir={tmp_path}", f"run.name={name}", f"run.checkpoint={policy / 'hf'}", "run.device=cpu"),
            *(f"data.turns={policy / 'world' / 'rl_heldout.jsonl'}", f"judge.base_url={judge.url}", f"judge.model={MODEL}"),
            *("generate.batch_size=4", "judge.connection_retries=0"),
        ]
        return main("evaluate", recipe.run, ["--config-name", "tiny", *given, *overrides], unfinished=recipe.PARTIAL)

    return evaluate


def asked(judge: FaultJudge) -> dict[str, int]:
    """How often each answer was asked about; the call at the start is about none."""
    probe = render_judge_prompt(load_prompt("judge"), _FIRST_REQUEST)
    return {prompt: count for prompt, count in judge.asked.items() if prompt != probe}


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "one.json").read_text())


def test_without_verdicts_it_is_partial_and_the_same_command_asks_for_what_is_missing(
    run: Evaluate, judge: FaultJudge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.percent = 40
    assert run() == 75
    failed = len(judge.faulty())
    assert 0 < failed < 10
    out, err = capsys.readouterr()
    assert f"PARTIAL: 10 of 10 answers drawn, {10 - failed} judged" in out and "* one is PARTIAL" in out
    assert "the same command draws and asks for what is missing" in err and "no verdict" in err
    assert not (tmp_path / "one.json").exists()
    partial = json.loads((tmp_path / "partial" / "one.json").read_text())
    assert (partial["planned"], partial["complete"], partial["summary"]["all"]["judge_failed"]) == (10, False, failed)
    answered = set(judge.answered) & set(asked(judge))
    judge.asked.clear()
    judge.percent = 0
    assert run() == 0
    assert not answered & set(asked(judge)), "no verdict is paid for twice"
    assert "complete: 10 of 10" in capsys.readouterr().out
    assert result(tmp_path)["samples"][0]["text"] == partial["samples"][0]["text"], "the replies stay"
    assert not list((tmp_path / "partial").iterdir())


def test_a_judge_that_refuses_everything_is_something_to_mend(
    run: Evaluate, judge: FaultJudge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first calls went well. One that refuses some of what it is asked leaves verdicts missing instead."""
    judge.refuses_after = 6
    assert run("judge.max_concurrency=1", name="some") == 75
    capsys.readouterr()
    judge.asked.clear()
    judge.refuses_after = 2
    assert run() == 2
    out, err = capsys.readouterr()
    assert "PARTIAL: " in out and "error: judge: status 400" in err and "not with me" in err
    assert not (tmp_path / "one.json").exists() and "missing: verdict (status)" in out


def test_a_spent_budget_keeps_every_paid_verdict_and_goes_on_as_if_it_had_never_stopped(
    run: Evaluate, judge: FaultJudge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name="whole") == 0
    judge.asked.clear()
    assert run("judge.max_calls=5") == 2
    out, err = capsys.readouterr()
    assert "PARTIAL: " in out and "error: judge.max_calls: the 5 calls of this job are spent" in err
    assert sum(judge.asked.values()) == 5 and sum(asked(judge).values()) > 0 and not (tmp_path / "one.json").exists()
    assert run("judge.max_calls=5") == 2
    assert sum(judge.asked.values()) == 5, "the budget is the job's, not the start's"
    assert run("judge.max_calls=50") == 0
    assert set(asked(judge).values()) == {1}
    assert result(tmp_path)["samples"] == json.loads((tmp_path / "whole.json").read_text())["samples"]
    capsys.readouterr()
    judge.asked.clear()
    assert run() == 0 and not judge.asked, "a finished one costs nothing"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_keeps_every_answer_under_way_and_asks_no_more(
    run: Evaluate, judge: FaultJudge, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """Three of ten questions are under way, the others wait for their turn; the answers come after the signal."""

    def interrupt() -> None:
        while len(asked(judge)) < 3:
            time.sleep(0.01)
        judge.held.set()
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 60
        while "stopping after the calls under way" not in seen[0] and time.monotonic() < deadline:
            seen[0] += capfd.readouterr().err
            time.sleep(0.01)
        judge.held.clear()

    seen = [""]
    judge.answer_after_s = 0.2
    person = threading.Thread(target=interrupt)
    person.start()
    assert run("judge.max_concurrency=3") == 75
    person.join()
    out, err = capfd.readouterr()
    assert (
        "the same command draws and asks for what is missing" in seen[0] + err and "missing: verdict (asked to stop) " in out
    )
    kept = read_jsonl(tmp_path / "judge" / "one" / "answers.jsonl")
    answered = len(asked(judge))
    assert 3 <= answered < 10 and sum(row["record"] == "verdict" for row in kept) == answered
    judge.answer_after_s = 0.0
    assert run() == 0
    assert set(asked(judge).values()) == {1}, "no verdict is paid for twice"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("run.seed=2", "seed"),
        ("generate.temperature=0.5", "generate.temperature"),
        ("reward.combine=additive", "reward.combine"),
        ("judge.temperatures=[0.5]", "judge.temperatures"),
        ("judge.max_tokens=7", "judge.max_tokens"),
        ("judge.seed=3", "judge.seed"),
        ("+judge.extra_body.top_p=0.5", "judge.extra_body"),
        ("judge.structured=off", "judge.structured"),
        ("data.limit=3", "limit"),
        ("data.samples=2", "samples"),
    ],
)
def test_it_continues_only_itself(
    run: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, key: str
) -> None:
    assert run("judge.max_calls=5") == 2
    before = (tmp_path / "judge" / "one" / "answers.jsonl").read_bytes()
    capsys.readouterr()
    assert run(override) == 2
    err = capsys.readouterr().err
    assert f" {key} was " in err and "give another run.name" in err and len(err.splitlines()) == 1
    assert (tmp_path / "judge" / "one" / "answers.jsonl").read_bytes() == before


def test_a_first_start_that_fails_binds_the_name_to_nothing(run: Evaluate, tmp_path: Path) -> None:
    assert run("judge.base_url=http://127.0.0.1:1/v1", "data.limit=3", "judge.model=typo") == 2
    assert not (tmp_path / "judge" / "one" / "protocol.json").exists()
    assert run() == 0
    assert (tmp_path / "judge" / "one" / "protocol.json").exists()


def test_contents_count_and_places_do_not(
    run: Evaluate, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, system = tmp_path / "judge.md", tmp_path / "system.txt"
    prompt.write_text((Path(evaluation.__file__).parents[1] / "prompts" / "judge.txt").read_text())
    system.write_text("Think.")
    given = [f"judge.prompt={prompt}", f"data.system_prompt={system}"]
    assert run(*given, "judge.max_calls=5") == 2
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copytree(policy / "hf", moved / "hf")
    shutil.copy(policy / "world" / "rl_heldout.jsonl", moved / "turns.jsonl")
    for file in (prompt, system):
        shutil.copy(file, moved / file.name)
    places = [f"run.checkpoint={moved / 'hf'}", f"data.turns={moved / 'turns.jsonl'}", "judge.timeout_s=9"]
    places += [f"judge.prompt={moved / prompt.name}", f"data.system_prompt={moved / system.name}"]
    assert run(*places, "judge.max_calls=6") == 2
    assert "calls of this job are spent" in capsys.readouterr().err
    for file, key in ((prompt, "judge.prompt"), (system, "system_prompt")):
        before = file.read_text()
        file.write_text(before + "\nBe strict.")
        assert run(*given) == 2
        assert f" {key} was " in capsys.readouterr().err
        file.write_text(before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.system_prompt=/no/such.txt"], "data.system_prompt: no such file: /no/such.txt"),
        (["judge.prompt=/no/such.txt"], "prompt '/no/such.txt': no such file"),
        (["run.name=org/model"], "run.name: must be a file name without a path, got 'org/model'"),
        (["run.name=../x"], "run.name: must be a file name"),
        (["run.name=''"], "run.name: must not be empty"),
        (["run.name=.x"], "run.name: must not begin with a dot"),
        (["run.name=provenance"], "run.name: stands for another file"),
    ],
)
def test_what_would_be_silently_another_evaluation_is_refused(
    run: Evaluate, judge: FaultJudge, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert run(*overrides) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
    assert not judge.asked and not list(tmp_path.rglob("*.json"))


def test_a_prompt_beyond_the_models_positions_is_named(
    run: Evaluate, policy: Path, judge: FaultJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate.max_new_tokens=4000") == 2
    row = read_turns(policy / "world" / "rl_heldout.jsonl")[0].row_id
    err = capsys.readouterr().err
    assert f"row {row}: prompt of " in err and "generate.max_new_tokens=4000 exceeds the 4096 positions" in err
    assert not judge.asked


def test_a_model_that_computes_no_numbers_is_one_line(policy: Path, judge: FaultJudge, tmp_path: Path, capsys) -> None:
    """Each weight is a number, and what comes of them is none."""
    hf = Path(shutil.copytree(policy / "hf", tmp_path / "hf"))
    edit_weights(hf, lambda t: t["model.norm.weight"].fill_(3e38))
    given = (f"run.dir={tmp_path}", "run.name=one", f"run.checkpoint={hf}", "run.device=cpu", f"judge.base_url={judge.url}")
    turns = f"data.turns={policy / 'world' / 'rl_heldout.jsonl'}"
    assert main("evaluate", recipe.run, ["--config-name", "tiny", *given, turns, f"judge.model={MODEL}"]) == 2
    err = capsys.readouterr().err
    assert f"{hf}: " in err and "the model's logits are no finite numbers" in err and len(err.splitlines()) == 1, err


def test_a_second_start_of_the_same_evaluation_is_refused(
    run: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo_ampo.output.lock import hold_output

    with hold_output(tmp_path / "one.json", "run.name"):
        assert run() == 2
        assert "run.name: " in (err := capsys.readouterr().err) and "is in use by another job" in err
        assert run(name="two") == 0, "another checkpoint may be evaluated into the folder meanwhile"


def test_a_start_that_failed_binds_the_evaluation_to_nothing(
    run: Evaluate, judge: FaultJudge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("judge.base_url=http://127.0.0.1:9/v1", "judge.max_tokens=7") == 2
    assert "judge.base_url" in capsys.readouterr().err
    assert run("judge.max_tokens=70") == 0


def test_what_nobody_answered_yet_has_no_numbers() -> None:
    record = {"name": "one", "summary": evaluation.summarise([]), "samples": [], "planned": 3}
    parsed = parse_evaluation(json.loads(json.dumps(record, allow_nan=False)), "one.json")
    assert parsed.partial == "PARTIAL: 0 of 3 answers judged"
    assert evaluation_rows([parsed]) == [["one *", "all", "0", *["\N{EN DASH}"] * 8, "0"]]


def test_an_edited_score_of_a_result_is_named(run: Evaluate, tmp_path: Path) -> None:
    assert run() == 0
    written = (tmp_path / "one.json").read_text()
    record = result(tmp_path)
    record["samples"][0]["agent1_score"] = 9.5
    (tmp_path / "one.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"one\.json: not what was written there"):
        read_evaluation(tmp_path / "one.json")
    (tmp_path / "one.json").write_text(written)
    read_evaluation(tmp_path / "one.json")


def test_a_name_is_what_was_typed_and_a_number_of_a_file_is_none(run: Evaluate, tmp_path: Path) -> None:
    assert run(name="1e3") == 0 and (tmp_path / "1e3.json").exists()
    raw = compose("evaluate", "tiny", [f"run.dir={tmp_path}", "run.name=x", "run.checkpoint=c", "data.turns=t"])
    raw.judge.base_url = "http://h/v1"
    for section, key, value in (("run", "name", 1000.0), ("run", "dir", 202401), ("judge", "model", True)):
        changed = raw.copy()
        changed[section][key] = value
        with pytest.raises(ConfigError, match=rf"^{section}\.{key}: YAML reads {str(value).lower()} where text is expected"):
            read_config(changed, EvaluateConfig)
