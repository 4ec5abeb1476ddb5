"""What a run keeps and promises when it is stopped, killed, or started with something wrong: real servers, small folder."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from scripted_chat import Act, serve

from nemo_ampo.config.compose import compose
from nemo_ampo.config.reading import read_config
from nemo_ampo.dialogue.config import PartnerConfig, PolicyConfig
from nemo_ampo.errors import BudgetError, ConfigError
from nemo_ampo.output.outcome import Outcome
from nemo_ampo.serve.local import server_process
from nemo_ampo.sotopia.config import ScoreJudgeConfig, SotopiaConfig
from nemo_ampo.sotopia.plan import EvaluationPlan, make_plan
from nemo_ampo.sotopia.run import evaluate, shared_limits
from nemo_ampo.sotopia.summary import read_summary

ROOT = Path(__file__).resolve().parents[3]
SERVER = [sys.executable, str(ROOT / "tests" / "support" / "rule_server.py"), "--patience", "20"]
SELF_PLAY = ("episode.pairing=self_play", "partner.base_url=", "partner.model=", "policy.modes=true", "episode.max_turns=2")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server_process(SERVER, what="the rule server", start_timeout_s=60) as url:
        yield url


def words(url: str, run: Path, folder: Path, *more: str) -> list[str]:
    agents = {"policy": "rule-speaker", "partner": "rule-reasoner", "judge": "rule-judge"}
    where = [word for role, model in agents.items() for word in (f"{role}.base_url={url}", f"{role}.model={model}")]
    return [*where, f"run.dir={run}", f"data.sotopia_dir={folder}", "data.set=own", *SELF_PLAY, *more]


def plan(*overrides: str) -> EvaluationPlan:
    return make_plan(read_config(compose("sotopia", "api", overrides), SotopiaConfig))


def counts(url: str) -> dict:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/counts") as answer:
        return json.load(answer)


def hold_after(url: str, calls: int) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{url.removesuffix('/v1')}/hold/{calls}", method="POST")).close()


def start(*overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "recipes.sotopia", "--config-name", "api", *overrides]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_until(holds, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.05)


def test_a_cut_down_folder_is_not_the_published_set(url: str, tmp_path: Path, folder: Path) -> None:
    given = words(url, tmp_path / "run", folder)
    outcome = evaluate(plan(*given, "data.set=published"))
    assert (outcome.planned, outcome.done, outcome.complete) == (6, 6, False)
    assert "PARTIAL: " in outcome.line() and "not the published set: 6 of 450 pairings" in outcome.line()
    summary = read_summary(tmp_path / "run", resamples=50)
    assert summary.partial
    assert summary.problems() == [
        "not the published set: 6 of 450 pairings, 6 of 90 scenarios, 3 of 40 agents, 2 of 70 hard pairings"
    ]
    # Said to be our own afterwards, the same episodes are complete; nobody is asked again.
    before = counts(url)["answered"]
    assert evaluate(plan(*given)).complete
    assert counts(url)["answered"] == before
    assert not read_summary(tmp_path / "run", resamples=50).partial


def test_the_published_folder_is_as_published(real_folder: Path, tmp_path: Path) -> None:
    given = words("http://127.0.0.1:9/v1", tmp_path / "run", real_folder, "data.set=published")
    assert (plan(*given).unlike_published, plan(*given).episodes) == (None, 450)
    assert plan(*given, "run.subset=hard", "run.seeds=[1,2]").episodes == 140


def test_a_start_that_failed_binds_the_folder_to_nothing(url: str, tmp_path: Path, folder: Path) -> None:
    given = words(url, tmp_path / "run", folder)
    with pytest.raises(ConfigError, match=r"judge\.base_url"):
        evaluate(plan(*given, "judge.model=misspelt"))
    with pytest.raises(ConfigError, match=r"policy\.base_url"):
        evaluate(plan(*given, "policy.model=misspelt"))
    assert not list((tmp_path / "run").glob("*.json"))
    assert evaluate(plan(*given)).complete


@pytest.mark.slow
def test_what_was_planned_is_counted_however_little_was_begun(url: str, tmp_path: Path, folder: Path) -> None:
    run = tmp_path / "run"
    evaluate(plan(*words(url, run, folder)))
    again = words(url, run, folder, "run.judge_only=true", "judge.name=second", "run.episodes_in_flight=2")
    hold_after(url, 2)
    before = counts(url)["answered"]
    process = start(*again)
    try:
        wait_until(lambda: counts(url)["answered"] == before + 2, process)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert any("stopping after the calls under way" in line for line in process.stderr)
    finally:
        hold_after(url, 0)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert re.search(r"^PARTIAL: [234] of 6 episodes played, [234] scored$", out, re.MULTILINE), out
    assert not Outcome(planned=6, begun=2, done=2).complete


def test_a_budget_counts_resumed_runs_too(url: str, tmp_path: Path, folder: Path) -> None:
    run = tmp_path / "run"
    before = counts(url)["models"].get("rule-speaker", 0)
    for _ in range(3):
        with pytest.raises(BudgetError, match=r"policy\.max_calls: the 5 calls of this job are spent"):
            evaluate(plan(*words(url, run, folder, "policy.max_calls=5")))
    assert counts(url)["models"]["rule-speaker"] - before == 5
    judged = counts(url)["models"].get("rule-judge", 0)
    for _ in range(2):
        with pytest.raises(BudgetError, match=r"judge\.max_calls: the 4 calls"):
            evaluate(plan(*words(url, run, folder, "judge.max_calls=4")))
    # Those judged under the first budget count as well.
    assert json.loads((run / "spent" / "judge-default.json").read_text())["calls"] == 4
    assert counts(url)["models"]["rule-judge"] - judged <= 4
    assert evaluate(plan(*words(url, run, folder))).complete


def test_agents_of_one_model_at_one_address_share_a_budget(url: str, tmp_path: Path, folder: Path) -> None:
    place = {"base_url": url, "model": "m"}
    both = shared_limits([PolicyConfig(**place, max_concurrency=8), PartnerConfig(**place, max_calls=5)])
    assert (both.max_concurrency, both.max_calls, both.requests_per_minute) == (8, 5, 0)
    two = ("episode.pairing=api", f"partner.base_url={url}", "partner.model=rule-speaker", "partner.max_calls=7")
    before = counts(url)["models"].get("rule-speaker", 0)
    with pytest.raises(BudgetError, match=r"policy and partner\.max_calls: the 7 calls"):
        evaluate(plan(*words(url, tmp_path / "run", folder, *two)))
    assert counts(url)["models"]["rule-speaker"] - before == 7


def test_an_unreadable_answer_is_not_asked_for_again_after_a_kill(tmp_path: Path, folder: Path) -> None:
    run = tmp_path / "run"
    # Slow enough that both questions are there before the first of them is answered.
    with server_process([*SERVER, "--latency-ms", "1000"], what="the rule server", start_timeout_s=60) as url:
        assert evaluate(plan(*words(url, run, folder, "run.subset=hard"))).complete
        again = words(url, run, folder, "run.subset=hard", "run.judge_only=true", "judge.name=second")
        again += ["judge.model=second-try-judge"]
        hold_after(url, 2)  # both first tries are answered, both second ones wait
        process = start(*again)
        wait_until(lambda: kept(run) == 2, process)
        process.kill()
        process.communicate()
        hold_after(url, 0)
        assert evaluate(plan(*again)).complete
        found = counts(url)
        assert (found["repeated"], found["models"]["second-try-judge"]) == (0, 4)
        assert kept(run) == 0


def test_an_episode_without_scores_is_asked_about_afresh(url: str, tmp_path: Path, folder: Path) -> None:
    given = words(url, tmp_path / "run", folder, "run.subset=hard", "judge.model=prose-judge")
    for start_number in (1, 2):
        before = counts(url)["models"].get("prose-judge", 0)
        assert evaluate(plan(*given)).done == 0, start_number
        assert counts(url)["models"]["prose-judge"] - before == 2 * 3


def test_a_cache_that_the_config_names_keeps_every_reply(url: str, tmp_path: Path, folder: Path) -> None:
    given = words(url, tmp_path / "run", folder, "run.subset=hard", f"judge.cache={tmp_path / 'mine.sqlite'}")
    evaluate(plan(*given))
    assert not (tmp_path / "run" / "replies").exists()
    with closing(sqlite3.connect(tmp_path / "mine.sqlite")) as db:
        assert db.execute("SELECT count(*) FROM replies").fetchone() == (2,)


def kept(run: Path) -> int:
    """Answers of the second judge that are on the disk and led to no scores yet."""
    path = run / "replies" / "judge-second.sqlite"
    if not path.exists():
        return -1
    with closing(sqlite3.connect(path)) as db:
        tables = db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'replies'").fetchone()[0]
        return db.execute("SELECT count(*) FROM replies").fetchone()[0] if tables else -1


def test_a_scorings_name_makes_file_names(url: str) -> None:
    ScoreJudgeConfig(base_url=url, model="m", name="a" * 120)
    for name in ("a" * 121, "../x", "", ".x", "a b", "a\n"):
        with pytest.raises(ConfigError, match=r"judge\.name: letters, digits, .* at most 120"):
            ScoreJudgeConfig(base_url=url, model="m", name=name)


@pytest.mark.parametrize("role", ["judge", "policy"])
def test_an_endpoint_that_refuses_whatever_it_is_asked_ends_the_run(
    role: str, url: str, tmp_path: Path, folder: Path
) -> None:
    with serve(Act('{"error": {"message": "no such parameter: seed"}}', status=400)) as chat:
        given = words(url, tmp_path / "run", folder, f"{role}.base_url={chat.url}", f"{role}.model=referee")
        process = start(*given)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2, (out, err)
    assert err.splitlines()[-1].startswith(f"error: {role}: status 400: ") and "no such parameter: seed" in err
    assert "PARTIAL: " in out
