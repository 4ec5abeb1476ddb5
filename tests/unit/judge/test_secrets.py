"""The API key is nowhere but in the request: not in the run folder, the logs or the last words of a crash.

The server echoes the key in everything it says, as some gateways do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_chat import Act, ScriptedChat, Seen, says, serve, verdict_json

KEY = "sk-4711-not-to-be-seen"

RUN = """
import logging, sys
from pathlib import Path
from omegaconf import OmegaConf
from nemo_ampo.compose import compose
from nemo_ampo.config import EvaluateConfig, read_config
from nemo_ampo.judge import JudgeRequest, open_judge
from nemo_ampo.runlog import RunLog, write_provenance

logging.basicConfig(level=logging.DEBUG)
folder, url, end = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
raw = compose("evaluate", "tiny", [
    f"run.dir={folder}", "run.name=n", "run.checkpoint=c", "data.turns=t", f"judge.base_url={url}", "judge.model=referee",
    "judge.api_key_env=SECRET_KEY", f"judge.cache={folder}/cache.sqlite", "judge.backoff_initial_s=0.001",
    "judge.backoff_max_s=0.002", "judge.temperatures=[0,0,1,1,1]", "judge.timeout_s=5"])
config = read_config(raw, EvaluateConfig)
write_provenance(folder, OmegaConf.to_container(raw, resolve=True), {})
with open_judge(config.judge, folder) as judge:
    outcomes = judge.score_all(JudgeRequest(f"dialogue {n}", "A", "B", "g", "h") for n in range(8))
    print(*map(repr, outcomes), repr(judge.stats), judge.stats.metrics(), config, sep="\\n", flush=True)
    (folder / "metrics.jsonl").write_text(repr(judge.stats.metrics()))
    if end == "failed":
        judge.submit(JudgeRequest("refuse me", "A", "B", "g", "h")).result()
    if end == "killed":
        import os, signal
        judge.submit(JudgeRequest("dialogue 99", "A", "B", "g", "h"))
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def server() -> Any:
    with serve(Act()) as running:
        yield running


def echo(number: int, call: Seen) -> Act:
    text = f"your key is {KEY}, Bearer {KEY}"
    if "refuse me" in call.prompt:
        return Act(json.dumps({"error": {"message": text}}), status=401)
    acts = [
        Act(json.dumps({"error": {"message": text}}), status=500), Act(text), Act(says(text)),
        Act(says(verdict_json(KEY, 1))), Act(says(verdict_json(5, 5).replace("one", text))),
        Act(says(verdict_json(5, 5), reasoning=text)), Act(says(verdict_json(5, 5)), hang_up_after=30),
    ]  # fmt: skip
    return acts[number % len(acts)]


@pytest.mark.parametrize("end", ["success", "failed", "killed"])
def test_the_key_is_nowhere(server: ScriptedChat, tmp_path: Path, end: str) -> None:
    server.play(echo)
    environment = {**os.environ, "SECRET_KEY": KEY, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", RUN, str(tmp_path), server.url, end]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert {call.authorization for call in server.calls} == {f"Bearer {KEY}"}, "it was used"
    assert "judge" in done.stderr.lower() and "Verdict(" in done.stdout, done.stderr
    if end == "failed":
        assert "Traceback" in done.stderr and "401" in done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"cache.sqlite", "judge_spent.json", "metrics.jsonl"} <= {path.name for path in files} or end == "killed"
    assert len(files) >= 3
    for text in (done.stdout, done.stderr):
        assert KEY not in text
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
