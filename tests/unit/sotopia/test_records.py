import errno
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_ampo.dialogue.records import Episode, EpisodeKey, Termination, Turn
from nemo_ampo.errors import ConfigError, DataError, UserError
from nemo_ampo.sotopia.dimensions import DIMENSIONS
from nemo_ampo.sotopia.records import EpisodeStore, ScoreError, Scores


def key(env_id=0, seat="agent1", seed=1):
    return EpisodeKey(env_id, f"C{env_id}", seat, seed, "abc")


def episode(k):
    return Episode(k, "self_play", "sotopia", "E1", "code", 2, True, "A1", "A2", "Ada Quill", "Bo Reed", "g", "h")


def turn(index, text="Hi \ud800 \u2028 there"):
    return Turn(index, ("agent1", "agent2")[index % 2], "Ada Quill", text, "raw\n" + text, mode=2, prompt_tokens=5)


def scores(judge="default", goal=7.0):
    graded = dict.fromkeys(DIMENSIONS, 0.0) | {"goal": goal}
    return Scores(judge, graded, graded, {"goal": "why"}, {"goal": "not"}, 10, 20, 2)


@pytest.fixture
def store(tmp_path):
    return EpisodeStore(tmp_path)


def filled(store, k, turns=2):
    store.begin(episode(k))
    for index in range(turns):
        store.add_turn(k, turn(index))
    return store.path(k)


def test_what_was_written_comes_back(store):
    k = key(7, "agent2", 3)
    filled(store, k)
    store.end(k, Termination.max_turns)
    store.add_scores(k, scores())
    result = store.read(k)
    assert result.episode == replace(episode(k), turns=(turn(0), turn(1)), terminated_by=Termination.max_turns)
    assert result.scores == scores() and result.score_error is None
    assert store.path(k).relative_to(store.folder).as_posix() == "episodes/seed3/agent2/0007.jsonl"
    assert list(store.scores()) == [(k, scores())]
    assert store.read(key(8)) is None


def test_episodes_come_by_seed_seat_and_id(store):
    keys = [key(e, seat, seed) for seed in (2, 10) for seat in ("agent1", "agent2") for e in (1, 3, 200)]
    for k in reversed(keys):
        filled(store, k, turns=1)
    assert [e.key for e in store.episodes()] == keys


@pytest.mark.parametrize("torn", [b'{"record": "turn", "ind', b"{", b'{"record": "end", "terminated_by": "left"}'])
def test_a_torn_last_line_is_not_read_and_cut_off_before_the_next_one(store, torn):
    path = filled(store, key())
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [t.index for t in store.read(key()).episode.turns] == [0, 1] and not store.read(key()).episode.played
    store.begin(store.read(key()).episode)
    assert path.read_bytes() == whole
    store.add_turn(key(), turn(2))
    assert [t.index for t in store.read(key()).episode.turns] == [0, 1, 2]


def test_a_torn_first_line_is_an_episode_not_begun(store):
    path = filled(store, key(), turns=0)
    path.write_bytes(path.read_bytes()[:20])
    assert store.read(key()) is None and list(store.episodes()) == []
    filled(store, key(), turns=1)
    assert len(store.read(key()).episode.turns) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: [lines[0], "nonsense", *lines[1:]], "line 2: not a record"),
        (lambda lines: [lines[0], '{"record": "song"}'], "line 2: unknown kind of record 'song'"),
        (lambda lines: [lines[0], '{"record": "end", "record": "turn"}'], "line 2: not a record"),
        (lambda lines: [lines[0], '{"record": "scores", "goal": NaN}'], "line 2: not a record"),
        (lambda lines: lines[1:], "line 1: expected the start of an episode"),
        (lambda lines: [lines[0], lines[2]], "turns out of order"),
        (lambda lines: [*lines[:2], json.dumps({**json.loads(lines[2]), "colour": "red"})], "line 3: not what was"),
    ],
)
def test_damage_is_named(store, spoil, message):
    path = filled(store, key())
    path.write_text("\n".join(spoil(path.read_text().splitlines())) + "\n")
    with pytest.raises(DataError, match=message) as raised:
        list(store.episodes())
    assert str(path) in str(raised.value)


def test_an_episode_of_another_model_is_refused(store):
    filled(store, key())
    with pytest.raises(DataError, match="evaluate into another folder"):
        store.read(replace(key(), model="other"))


def test_a_failed_episode_goes_on(store):
    filled(store, key())
    store.end(key(), Termination.failed, "turn 2: timeout")
    assert store.read(key()).episode.error == "turn 2: timeout" and not store.read(key()).episode.played
    store.add_turn(key(), turn(2))
    assert store.read(key()).episode.terminated_by is None
    store.end(key(), Termination.left)
    assert store.read(key()).episode.played and store.read(key()).episode.error is None


def test_every_judge_has_its_own_scores(store):
    filled(store, key())
    store.end(key(), Termination.left)
    store.add_scores(key(), ScoreError("first", "parse", "prose"))
    assert store.read(key(), "first").score_error.kind == "parse" and store.read(key(), "second").score_error is None
    store.add_scores(key(), scores("first", 3.0))
    store.add_scores(key(), scores("second", 9.0))
    assert store.read(key(), "first").scores.of("agent1")["goal"] == 3.0
    assert store.read(key(), "first").score_error is None
    assert store.read(key()).scores.judge == "second"
    assert [s.judge for _, s in store.scores()] == ["first", "second"]


def test_the_protocol_is_kept_and_held_to(store):
    first = {"view": "sotopia", "max_turns": 20, "episodes": 70}
    store.keep_protocol(first)
    store.keep_protocol({**first, "episodes": 450})
    assert store.protocol() == {**first, "episodes": 450}
    with pytest.raises(ConfigError, match=r"view was 'sotopia', is now 'reference'"):
        store.keep_protocol({**first, "view": "reference"})
    assert store.protocol()["view"] == "sotopia"
    store.keep_protocol({"model": "j"}, "judge-a.json", write=False)
    assert store.protocol("judge-a.json") is None


def test_episodes_without_a_protocol_are_not_touched(store):
    filled(store, key())
    with pytest.raises(
        ConfigError,
        match=r"episodes is there, but nothing in .*; give another run\.dir",
    ):
        store.keep_protocol({"view": "sotopia"})


def test_one_writer_at_a_time(store):
    code = "import sys; from nemo_ampo.sotopia.records import EpisodeStore as S\nwith S(sys.argv[1]).locked(): print('in')"
    with (
        store.locked(),
        pytest.raises(UserError, match="in use by another job"),
        EpisodeStore(store.folder).locked(),
    ):
        pass
    done = subprocess.run([sys.executable, "-c", code, str(store.folder)], capture_output=True, text=True)
    assert done.stdout == "in\n", done.stderr


FULL_DISK = """
import resource, sys
sys.path[:0] = sys.argv[2:]
from test_records import EpisodeStore, UserError, filled, key, turn
store, room = EpisodeStore(sys.argv[1]), 4000
resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
try:
    for index in range(3, 100):
        store.add_turn(key(), turn(index))
except UserError as error:
    print(error)
    try:
        store.add_turn(key(), turn(index))
    except UserError as again:
        print(again)
"""


def test_a_full_disk_names_the_file_and_leaves_the_saved_turns(store):
    """The size limit of a process stands in for the disk: first a part of a line fits, then nothing."""
    path = filled(store, key(), turns=3)
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(store.folder), here], capture_output=True, text=True)
    partial, full = done.stdout.splitlines()
    assert partial.startswith(f"{path}: only ") and partial.endswith("is the disk full?")
    assert full == f"cannot write {path}: File too large"
    assert path.stat().st_size == 4000
    turns = store.read(key()).episode.turns
    assert len(turns) > 3 and turns == tuple(turn(index) for index in range(len(turns)))
    store.begin(store.read(key()).episode)
    store.add_turn(key(), turn(len(turns)))
    assert len(store.read(key()).episode.turns) == len(turns) + 1


def test_a_record_that_does_not_reach_the_disk_is_told(store, monkeypatch):
    path = filled(store, key(), turns=3)

    def broken(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    failure = re.escape(f"cannot write {path}: Input/output error")
    with pytest.raises(UserError, match=failure), store.locked():
        store.end(key(), Termination.left)
    with pytest.raises(UserError, match=failure):
        store.end(key(), Termination.left)
    monkeypatch.undo()
    with store.locked():
        store.end(key(), Termination.left)


def test_a_folder_that_cannot_be_made_is_named(store):
    (store.folder / "episodes").write_text("in the way")
    with pytest.raises(UserError, match=r"^cannot write .*0000\.jsonl: (Not a directory|File exists)"):
        store.begin(episode(key()))


def test_reading_holds_one_episode_at_a_time(store):
    import tracemalloc

    long = "word " * 4000
    for env_id in range(60):
        filled(store, key(env_id), turns=0)
        for index in range(10):
            store.add_turn(key(env_id), turn(index, long))

    def peak(number):
        tracemalloc.start()
        episodes = store.episodes()
        for _ in range(number):
            next(episodes)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(60) < 1.5 * peak(5)


ZEROS = dict.fromkeys(DIMENSIONS, 0)
JUNK = b'"{}[],:\\0-9e\xff\x00tn'


@pytest.mark.parametrize(
    ("record", "change"),
    [
        *(("scores", {"agent1": value}) for value in (None, {}, [], {"goal": 5}, dict.fromkeys([*DIMENSIONS, "more"], 0))),
        *(
            ("scores", {"agent2": dict.fromkeys(DIMENSIONS, 0) | {"goal": v}})
            for v in (11, -1, "7", None, True, float("nan"))
        ),
        *(("turn", {name: value}) for name, value in (("mode", 5), ("mode", "2"), ("seat", "me"), ("text", None))),
        ("scores", {"agent1": ZEROS}),
        ("turn", {"text": "something else"}),
        *(("end", {"terminated_by": value}) for value in ("done", None, ["left"])),
        *(("start", {name: value}) for name, value in (("hard", "yes"), ("relationship", "2"), ("key", []), ("view", 3))),
    ],
)
def test_an_edited_line_is_named_and_no_number_comes_of_it(store, record, change):
    path = filled(store, key())
    store.end(key(), Termination.max_turns)
    store.add_scores(key(), scores())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    number = next(i for i, row in enumerate(rows) if row["record"] == record)
    rows[number] |= change
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"0000\.jsonl, line {number + 1}: "):
        list(store.results())


def test_whatever_bytes_are_changed_no_other_score_comes_of_it(store):
    path = filled(store, key())
    store.end(key(), Termination.max_turns)
    store.add_scores(key(), scores())
    whole, rng = path.read_bytes(), random.Random(1)
    for _ in range(1500):
        content = bytearray(whole)
        place = rng.randrange(len(content))
        content[place : place + rng.randrange(3)] = bytes(rng.choice(JUNK) for _ in range(rng.randrange(1, 4)))
        path.write_bytes(content)
        try:
            found = list(store.results())
        except DataError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        for result in found:
            assert result.scores is None or result.scores == scores(), content
