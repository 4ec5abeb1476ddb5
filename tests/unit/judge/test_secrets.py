"""The API key is nowhere but in the request: not in the run folder, the logs, a command line or the last words of a crash.

The server echoes the key in everything it says, in every spelling, as some gateways do.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from scripted_chat import Act, ScriptedChat, Seen, says, serve, verdict_json

KEY = "sk-4711/not+to/be-Seen=="
SPELLINGS = (
    KEY,
    KEY.replace("/", "\\/"),
    "".join(f"\\u{ord(sign):04x}" for sign in KEY),
    quote(KEY, safe=""),
    base64.b64encode(f"user:{KEY}".encode()).decode(),
    KEY.upper(),
)
TELLTALES = (KEY, SPELLINGS[1], SPELLINGS[2], SPELLINGS[3], SPELLINGS[4], KEY.upper(), KEY.lower(), "not+to", "not%2Bto")
"""What gives the key away; the last two are pieces that a cut in the wrong place would leave."""

PRELUDE = """
import logging, os, sys, traceback
from dataclasses import replace
from pathlib import Path
from omegaconf import OmegaConf
from nemo_ampo.config.compose import compose
from nemo_ampo.config.reading import read_config
from nemo_ampo.evaluate.config import EvaluateConfig
from nemo_ampo.types import JudgeRequest
from nemo_ampo.judge.job import open_judge
from nemo_ampo.run.runlog import RunLog, write_provenance

logging.basicConfig(level=logging.DEBUG)
folder, url, end = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
raw = compose("evaluate", "tiny", [
    f"run.dir={folder}", "run.name=n", "run.checkpoint=c", "data.turns=t", f"judge.base_url={url}", "judge.model=referee",
    "judge.api_key_env=SECRET_KEY", f"judge.cache={folder}/cache.sqlite", "judge.backoff_initial_s=0.001",
    "judge.backoff_max_s=0.002", "judge.temperatures=[0,0,1,1,1]", "judge.timeout_s=5"])
config = read_config(raw, EvaluateConfig)
write_provenance(folder, OmegaConf.to_container(raw, resolve=True), {})
"""

RUN = (
    PRELUDE
    + """
with open_judge(config.judge, folder) as judge:
    outcomes = judge.score_all(JudgeRequest(f"dialogue {n}", "A", "B", "g", "h") for n in range(48))
    print(*map(repr, outcomes), repr(judge.stats), judge.stats.metrics(), config, sep="\\n", flush=True)
    (folder / "metrics.jsonl").write_text(repr(judge.stats.metrics()))
    if end == "failed":
        judge.submit(JudgeRequest("refuse me", "A", "B", "g", "h")).result()
    if end == "killed":
        import signal
        judge.submit(JudgeRequest("dialogue 99", "A", "B", "g", "h"))
        os.kill(os.getpid(), signal.SIGKILL)
"""
)

CRASHES = (
    PRELUDE
    + """
for kind in sys.argv[4:]:
    settings = replace(config.judge, model=kind, timeout_s=0.5 if kind == "hang" else 5.0, connection_retries=1)
    for ask in (lambda judge: judge.check(), lambda judge: judge.submit(JudgeRequest("d", "A", "B", "g", "h")).result()):
        try:
            with open_judge(settings, folder / kind) as judge:
                try:
                    print(kind, ask(judge), flush=True)
                finally:
                    print(judge.stats, flush=True)
        except Exception:
            print(kind, "failed", file=sys.stderr)
            traceback.print_exc()
for process in Path("/proc").glob("[0-9]*/cmdline"):
    try:
        assert os.environ["SECRET_KEY"].encode() not in process.read_bytes(), process
    except OSError:
        pass  # it has ended
"""
)


@pytest.fixture(scope="module")
def server() -> Any:
    with serve(Act()) as running:
        yield running


def error(text: str) -> str:
    """A body that names the key, spelt as it is given: JSON would spell it anew."""
    return '{"error": {"message": "@@"}}'.replace("@@", text)


def spelt(number: int) -> str:
    spelling = SPELLINGS[number % len(SPELLINGS)]
    return f"your key is {spelling}, Bearer {spelling}"


def echo(number: int, call: Seen) -> Act:
    text = spelt(number // 7)
    if "refuse me" in call.prompt:
        return Act(error(text), status=401)
    acts = [
        Act(error(text), status=500), Act(text), Act(says("@@").replace("@@", text)),
        Act(says(verdict_json("@@", 1)).replace("@@", text)), Act(says(verdict_json(5, 5)).replace("one", text)),
        Act(says(verdict_json(5, 5), reasoning="@@").replace("@@", text)),
        Act(says(verdict_json(5, 5)), hang_up_after=30),
    ]  # fmt: skip
    return acts[number % len(acts)]


def crash(kind: str, text: str) -> Act:
    """What the model ``kind`` does."""
    if kind.isdigit():
        return Act(error(text), status=int(kind))
    in_parts = [{"type": "text", "text": KEY[:9]}, {"type": "text", "text": KEY[9:]}]
    thoughts = [{"type": "thinking", "thinking": "@@"}]
    acts = {
        "quota": Act(error(f"insufficient_quota {text}"), status=429),
        "page": Act(f"<html>{text}</html>"),
        "prose": Act(says("@@").replace("@@", text)),
        "score": Act(says(verdict_json("@@", 1)).replace("@@", text)),
        "twice": Act(says('{"agent1": 1, "agent1": "@@"}').replace("@@", text)),
        "key as a key": Act(says('{"@@": 1, "@@": 2}').replace("@@", text)),
        "parts": Act(says(in_parts)),
        "thoughts": Act(says(thoughts).replace("@@", text)),
        "cut": Act(says("@@").replace("@@", text).replace('"stop"', '"length"')),
        "finish": Act(says("").replace('"stop"', f'"{text}"')),
        "packed": Act("{}", headers={"content-encoding": KEY}),
        "moved": Act("", status=307, headers={"location": f"http://127.0.0.1:9/{KEY}"}),
        "wait": Act(error(text), status=429, headers={"retry-after": KEY}),
        "hang up": Act(says(verdict_json(5, 5)).replace("one", text), hang_up_after=120),
        "hang": Act(hang=True),
        "error 200": Act(error(text)),
        "broken": Act(says("@@").replace("@@", text)[:-9]),
    }
    return acts[kind]


STATUSES = ("400", "401", "403", "404", "413", "422", "429", "500", "503")
KINDS = (
    *STATUSES, "quota", "page", "prose", "score", "twice", "key as a key", "parts", "thoughts", "cut", "finish", "packed",
    "moved", "wait", "hang up", "hang", "error 200", "broken",
)  # fmt: skip


def run(program: str, folder: Path, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SECRET_KEY": KEY, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program, str(folder), url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def assert_nowhere(done: subprocess.CompletedProcess[str], folder: Path) -> list[Path]:
    """The key is in no output and no file; the files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for telltale in TELLTALES:
        assert telltale not in done.stdout and telltale not in done.stderr, telltale
        for path in files:
            assert telltale.encode() not in path.read_bytes(), (telltale, path)
    return files


@pytest.mark.parametrize("end", ["success", "failed", "killed"])
def test_the_key_is_nowhere(server: ScriptedChat, tmp_path: Path, end: str) -> None:
    server.play(echo)
    done = run(RUN, tmp_path, server.url, end)
    assert {call.authorization for call in server.calls} == {f"Bearer {KEY}"}, "it was used"
    assert "judge" in done.stderr.lower() and "Verdict(" in done.stdout, done.stderr
    assert "[API key]" in done.stdout, "it was said"
    if end == "failed":
        assert "Traceback" in done.stderr and "401" in done.stderr
    files = assert_nowhere(done, tmp_path)
    assert {"cache.sqlite", "judge_spent.json", "metrics.jsonl"} <= {path.name for path in files} or end == "killed"
    assert len(files) >= 3


def test_no_crash_shows_the_key(server: ScriptedChat, tmp_path: Path) -> None:
    """Every kind of failure, at the start and at a question, each call in the next spelling."""
    server.play(lambda number, call: crash(call.payload["model"], spelt(number)))
    done = run(CRASHES, tmp_path, server.url, "crash", *KINDS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {call.payload["model"] for call in server.calls} == set(KINDS)
    assert not [kind for kind in KINDS if f"\n{kind} failed\n" not in done.stderr]
    assert done.stderr.count("Traceback") > len(KINDS)
    assert_nowhere(done, tmp_path)
