"""RL rows: unfinished dialogues, each waiting for one utterance of the policy.

Two published layouts are read into :class:`~nemo_ampo.types.DialogueTurn`: the raw rows (JSON list or JSONL)
and the Parquet columns that the authors' training reads. Every row is checked; the first bad one stops the
program. Run as ``python -m nemo_ampo.data.episodes --input rows.json --output rows.parquet`` to check raw
rows and convert them.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_ampo.data.chat import build_messages
from nemo_ampo.data.rows import Record, published, read_records, write_rows
from nemo_ampo.errors import DataError, UserError
from nemo_ampo.overrides import typed_path
from nemo_ampo.types import ALL_TAGS, DialogueTurn

STATE_MIN, STATE_MAX = 0.0, 10.0

UNUSED_SCORES = ("agent1_goal_score", "agent2_goal_score", "agent1_avg_score", "agent2_avg_score")
"""Columns of the published data that training carries along and never reads."""

RAW_FIELDS = (
    *("dialog", "env_id", "turn", "instruction", "agent1_name", "agent2_name", "agent1_goal", "agent2_goal"),
    *("rollout", "state", *UNUSED_SCORES),
    *("row_id", "system", "tag"),  # ours, optional
)
PARQUET_FIELDS = ("data_source", "prompt", "ability", "reward_model", "extra_info", *UNUSED_SCORES)
REWARD_FIELDS = (
    *("style", "turn", "dialog", "agent1_name", "agent2_name", "agent1_goal", "agent2_goal"),
    "state_reward",
)
EXTRA_FIELDS = ("split", "index", "env_id", "turn", "rollout", "row_id", "tag")


def chat_messages(turn: DialogueTurn, default_system: str | None) -> list[dict[str, str]]:
    """A turn as messages: its own system prompt, else ``default_system``, else none; then the instruction."""
    return build_messages(turn.system if turn.system is not None else default_system, turn.instruction)


def read_turns(path: str | Path) -> list[DialogueTurn]:
    """All RL rows of a file, in file order.

    A raw row has ``dialog`` (list of lines, the last one open), ``turn``, ``env_id``, ``rollout``,
    ``instruction``, ``agent1_name``, ``agent2_name``, ``agent1_goal``, ``agent2_goal`` and ``state``
    (``{"agent1": {"score": 0..10}, "agent2": {"score": 0..10}, "step": int}``); ``row_id``, ``system`` and
    ``tag`` are optional. A row without ``row_id`` gets one made of its ids and a digest of its text, which
    does not depend on its place in the file.

    Args:
        path: ``.json``, ``.jsonl`` or ``.parquet``.

    Raises:
        DataError: naming file, row and field.
    """
    parse = _parquet_turn if Path(path).suffix == ".parquet" else _raw_turn
    return _with_row_ids([(record.where, parse(record)) for record in read_records(path)])


def write_turns(turns: Sequence[DialogueTurn], path: str | Path) -> None:
    """Write turns as raw rows, a JSON list or JSONL by suffix, so that :func:`read_turns` gives them back."""
    write_rows([raw_row(turn) for turn in turns], path)


def raw_row(turn: DialogueTurn) -> dict[str, Any]:
    """A turn as a row of the published JSON, plus ``row_id`` and, when set, ``system`` and ``tag``."""
    row: dict[str, Any] = {
        "row_id": turn.row_id,
        "dialog": list(turn.dialog),
        "env_id": turn.env_id,
        "turn": turn.turn,
        "rollout": turn.rollout,
        "instruction": turn.instruction,
        "agent1_name": turn.agent1_name,
        "agent2_name": turn.agent2_name,
        "agent1_goal": turn.agent1_goal,
        "agent2_goal": turn.agent2_goal,
        "state": _state(turn),
    }
    row |= {key: value for key, value in (("system", turn.system), ("tag", turn.tag)) if value is not None}
    return row


def rows_to_parquet(path: str | Path, out: str | Path) -> int:
    """Check the rows of ``path`` and write them in the published Parquet layout.

    Scores are stored as float64 (the authors' file rounds them to float32); :func:`read_turns` accepts both.

    Args:
        path: what :func:`read_turns` reads.
        out: ``.parquet`` file to write; it appears complete or not at all.

    Returns:
        Number of rows written, which is the number of rows read.
    """
    import pyarrow
    import pyarrow.parquet

    out = Path(out)
    if out.suffix != ".parquet":
        raise DataError(f"{out}: the output file must end in .parquet")
    turns = read_turns(path)
    table = pyarrow.Table.from_pylist([_parquet_row(i, turn) for i, turn in enumerate(turns)], _parquet_schema())
    with published(out) as part:
        pyarrow.parquet.write_table(table, part)
    return len(turns)


def _raw_turn(record: Record) -> DialogueTurn:
    record.only(RAW_FIELDS)
    for key in UNUSED_SCORES:
        if record.has(key):
            record.number(key)
    return _turn(
        record,
        dialog_of=record,
        state=record.child("state"),
        instruction=record.text("instruction"),
        system=record.optional_text("system"),
        env_id=record.integer("env_id"),
        rollout=record.integer("rollout"),
        row_id=record.optional_text("row_id"),
        tag=record.optional_text("tag"),
    )


def _parquet_turn(record: Record) -> DialogueTurn:
    record.only(PARQUET_FIELDS)
    reward, extra, messages = (
        record.child("reward_model"),
        record.child("extra_info"),
        record.children("prompt"),
    )
    reward.only(REWARD_FIELDS)
    extra.only(EXTRA_FIELDS)
    roles = [message.text("role") for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise record.error("prompt", f"expected an optional system message and one user message, got roles {roles}")
    if extra.integer("turn") != reward.integer("turn"):
        raise extra.error("turn", f"is {extra.integer('turn')}, but reward_model.turn is {reward.integer('turn')}")
    return _turn(
        record,
        dialog_of=reward,
        state=reward.child("state_reward"),
        instruction=messages[-1].text("content"),
        system=messages[0].optional_text("content") if len(messages) == 2 else None,
        env_id=extra.integer("env_id"),
        rollout=extra.integer("rollout"),
        row_id=extra.optional_text("row_id"),
        tag=extra.optional_text("tag"),
    )


def _turn(
    record: Record,
    *,
    dialog_of: Record,
    state: Record,
    instruction: str,
    system: str | None,
    env_id: int,
    rollout: int,
    row_id: str | None,
    tag: str | None,
) -> DialogueTurn:
    """Put the parts of either layout together and check the open line; an absent id stays empty."""
    state.only(("agent1", "agent2", "step"))
    if state.has("step"):
        state.integer("step")
    if tag == ALL_TAGS:
        raise record.error("tag", f"{tag!r} stands for all rows in every table; give the row another label")
    dialog = dialog_of.texts("dialog")
    if not dialog:
        raise dialog_of.error("dialog", "is empty; it must end in the open line of the speaker to act")
    turn = DialogueTurn(
        row_id=row_id or "",
        dialog=dialog,
        turn=dialog_of.integer("turn", low=0),
        instruction=instruction,
        agent1_name=dialog_of.name("agent1_name"),
        agent2_name=dialog_of.name("agent2_name"),
        agent1_goal=dialog_of.text("agent1_goal"),
        agent2_goal=dialog_of.text("agent2_goal"),
        agent1_state=state.child("agent1").number("score", STATE_MIN, STATE_MAX),
        agent2_state=state.child("agent2").number("score", STATE_MIN, STATE_MAX),
        env_id=env_id,
        rollout=rollout,
        system=system,
        tag=tag,
    )
    speaker = turn.agent1_name if turn.seat == "agent1" else turn.agent2_name
    open_line = f"Turn {turn.turn}: {speaker} said:"
    if dialog[-1] != open_line:
        raise dialog_of.error(
            f"dialog[{len(dialog) - 1}]",
            f"expected the open line {open_line!r} ({turn.seat} speaks in turn {turn.turn}), got {dialog[-1]!r}",
        )
    return turn


def _with_row_ids(located: Sequence[tuple[str, DialogueTurn]]) -> list[DialogueTurn]:
    """Give every row an id of its own: ids decide sampling seeds and name rows in reports.

    An id written in the file must be unique there; a derived one gets ``#2``, ``#3``, ... where the same text
    comes again.
    """
    places: dict[str, str] = {}
    turns = []
    for where, turn in located:
        base = row_id = turn.row_id or _derived_id(turn)
        copies = 1
        while row_id in places:
            if turn.row_id:
                raise DataError(f"{where}, field 'row_id': {row_id!r} is already used by {places[row_id]}")
            copies += 1
            row_id = f"{base}#{copies}"
        places[row_id] = where
        turns.append(replace(turn, row_id=row_id))
    return turns


def _derived_id(turn: DialogueTurn) -> str:
    digest = hashlib.sha256("\0".join((turn.instruction, *turn.dialog)).encode()).hexdigest()
    return f"env{turn.env_id}-rollout{turn.rollout}-{digest[:12]}"


def _state(turn: DialogueTurn) -> dict[str, Any]:
    return {
        "agent1": {"score": turn.agent1_state},
        "agent2": {"score": turn.agent2_state},
        "step": turn.turn,
    }


def _parquet_row(index: int, turn: DialogueTurn) -> dict[str, Any]:
    return {
        "data_source": "sotopia",
        "prompt": chat_messages(turn, default_system=None),
        "ability": "reason",
        "reward_model": {
            "style": "model",
            "turn": turn.turn,
            "dialog": list(turn.dialog),
            "agent1_name": turn.agent1_name,
            "agent2_name": turn.agent2_name,
            "agent1_goal": turn.agent1_goal,
            "agent2_goal": turn.agent2_goal,
            "state_reward": _state(turn),
        },
        "extra_info": {
            "split": "train",
            "index": index,
            "env_id": turn.env_id,
            "turn": turn.turn,
            "rollout": turn.rollout,
            "row_id": turn.row_id,
            "tag": turn.tag,
        },
    }


def _parquet_schema() -> Any:
    import pyarrow as pa

    text, whole, score = pa.string(), pa.int64(), pa.struct([("score", pa.float64())])
    state = pa.struct([("agent1", score), ("agent2", score), ("step", whole)])
    reward = [("style", text), ("turn", whole), ("dialog", pa.list_(text))]
    reward += [(key, text) for key in ("agent1_name", "agent2_name", "agent1_goal", "agent2_goal")]
    extra = [("split", text), ("index", whole), ("env_id", whole), ("turn", whole), ("rollout", whole)]
    return pa.schema(
        [
            ("data_source", text),
            ("prompt", pa.list_(pa.struct([("role", text), ("content", text)]))),
            ("ability", text),
            ("reward_model", pa.struct([*reward, ("state_reward", state)])),
            ("extra_info", pa.struct([*extra, ("row_id", text), ("tag", text)])),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command: check RL rows and write them as Parquet."""
    parser = argparse.ArgumentParser(prog="python -m nemo_ampo.data.episodes", description=main.__doc__)
    parser.add_argument("--input", required=True, help="RL rows: .json, .jsonl or .parquet")
    parser.add_argument("--output", type=typed_path, required=True, help="the .parquet file to write")
    args = parser.parse_args(argv)
    try:
        count = rows_to_parquet(args.input, args.output)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{count} rows -> {args.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
