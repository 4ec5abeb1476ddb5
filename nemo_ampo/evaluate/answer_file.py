"""What an evaluation has drawn and paid for so far, one JSON line each, so that the next start goes on from there.

A line is written in one piece, and sealed, as soon as there is a reply or a verdict. What died while it was written is
left out by the reader and cut off by the next writer; a line that was damaged or edited is named.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ampo.data.episodes import STATE_MAX, STATE_MIN
from nemo_ampo.data.rows import Record
from nemo_ampo.errors import DataError, DiskError
from nemo_ampo.files import append_whole, disk_errors, read_jsonl, sealed
from nemo_ampo.types import Verdict


@dataclass(frozen=True)
class StoredReply:
    """One reply.

    Attributes:
        row_id: of the turn it answers.
        text: decoded reply.
        num_tokens: reply tokens, the stop token included.
    """

    row_id: str
    text: str
    num_tokens: int


class AnswerFile:
    """Replies and verdicts of one evaluation by their place in the plan. Verdicts may be added from any thread.

    Args:
        path: the file; created if absent.
        row_ids: of the planned answers, in order.

    Attributes:
        replies, verdicts: what there is.

    Raises:
        DataError: a line that is no reply or verdict of this plan.
        DiskError: the file cannot be written.
    """

    def __init__(self, path: Path, row_ids: list[str]) -> None:
        self._path, self._row_ids = path, row_ids
        self.replies: dict[int, StoredReply] = {}
        self.verdicts: dict[int, Verdict] = {}
        for number, row in enumerate(read_jsonl(path), 1):
            self._take(Record(f"{path}, line {number}", row))
        self._lock = threading.Lock()
        self._failure: DiskError | None = None
        with disk_errors(f"cannot write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)

    def add_reply(self, index: int, reply: StoredReply) -> None:
        """Keep a reply.

        Raises:
            DiskError: it, or a verdict before it, cannot be written.
        """
        self.require_written()
        self.replies[index] = reply
        self._append({"record": "reply", "index": index} | vars(reply))

    def add_verdict(self, index: int, verdict: Verdict) -> None:
        """Keep a verdict. That it cannot be written is said by :meth:`require_written`: nobody waits for this thread."""
        try:
            self._append({"record": "verdict", "index": index, "agent1": verdict.agent1, "agent2": verdict.agent2})
        except DiskError as error:
            self._failure = error
        self.verdicts[index] = verdict

    def require_written(self) -> None:
        """Raise what kept a verdict from being written.

        Raises:
            DiskError: see above.
        """
        if self._failure is not None:
            raise self._failure

    def _append(self, row: Mapping[str, Any]) -> None:
        content = f"{json.dumps(sealed(row))}\n".encode("ascii")
        with self._lock, disk_errors(f"cannot write {self._path}"):
            append_whole(self._path, content)

    def _take(self, record: Record) -> None:
        index = record.integer("index", 0, len(self._row_ids) - 1)
        kind = record.text("record")
        if kind == "reply":
            record.only(("record", "index", "row_id", "text", "num_tokens"))
            reply = StoredReply(record.text("row_id"), record.text("text", blank=True), record.integer("num_tokens", 1))
            if reply.row_id != self._row_ids[index]:
                raise record.error("row_id", f"expected {self._row_ids[index]!r}, got {reply.row_id!r}")
            self._once(record, index, self.replies)
            self.replies[index] = reply
        elif kind == "verdict":
            record.only(("record", "index", "agent1", "agent2"))
            one, two = (record.number(name, STATE_MIN, STATE_MAX) for name in ("agent1", "agent2"))
            if index not in self.replies:
                raise record.error("index", f"a verdict about reply {index}, which stands in no line before")
            self._once(record, index, self.verdicts)
            self.verdicts[index] = Verdict(one, two)
        else:
            raise record.error("record", f"expected reply or verdict, got {kind!r}")

    @staticmethod
    def _once(record: Record, index: int, known: Mapping[int, object]) -> None:
        if index in known:
            raise DataError(f"{record.where}: holds number {index} a second time; the file was damaged or edited")
