"""Cloning rows: examples of the four modes, checked, and encoded as prompt tokens plus reply tokens.

Prompt and reply are tokenised apart, so that the prompt tokens are exactly those the policy sees later in RL
and evaluation (:func:`~nemo_ampo.data.chat.encode_prompt`), and the reply tokens are a sequence it can
sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nemo_ampo.data.chat import build_messages, check_tokenizer, encode_prompt
from nemo_ampo.data.rows import Record, read_records
from nemo_ampo.errors import DataError, FormatError
from nemo_ampo.reply.grammar import parse_reply

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BcExample",
    "BcRow",
    "EncodedRows",
    "check_tokenizer",
    "encode_bc_row",
    "encode_bc_rows",
    "encode_prompt",
    "read_bc_rows",
    "system_prompt_of",
]

FIELDS = ("system", "instruction", "input", "output")

_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class BcRow:
    """One cloning example.

    Attributes:
        row_id: its place, ``FILE, line 3`` or ``FILE, row 3``; names the row in errors.
        system: system prompt, or None.
        instruction, input: parts of the user message; ``input`` is often empty.
        output: the reply to imitate, in the grammar.
        mode: thinking mode of the reply, 1..4.
    """

    row_id: str
    system: str | None
    instruction: str
    input: str
    output: str
    mode: int

    @property
    def user(self) -> str:
        """The user message: ``instruction``, and ``input`` on a line of its own unless empty."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as chat messages."""
        return build_messages(self.system, self.user)


@dataclass(frozen=True)
class BcExample:
    """One encoded example.

    Attributes:
        row_id: of its row.
        tokens: prompt, reply, end-of-sequence token.
        prompt_len: how many of them are prompt.
        mode: 1..4.
    """

    row_id: str
    tokens: tuple[int, ...]
    prompt_len: int
    mode: int


@dataclass(frozen=True)
class EncodedRows:
    """What :func:`encode_bc_rows` gives back.

    Attributes:
        examples: in row order.
        dropped: ids of rows left out because they were too long; empty unless asked for.
    """

    examples: tuple[BcExample, ...]
    dropped: tuple[str, ...]


def read_bc_rows(path: str | Path) -> list[BcRow]:
    """All cloning rows of a file, in file order.

    Args:
        path: JSON list, JSONL or Parquet with ``instruction`` and ``output``, and optionally ``system`` and
            ``input``.

    Raises:
        DataError: naming file, row and field; replies that break the grammar are listed together, each with
            the rule.
    """
    rows: list[BcRow] = []
    problems: list[str] = []
    for record in read_records(path):
        record.only(FIELDS)
        try:
            mode = parse_reply(record.text("output")).mode
        except FormatError as error:
            problems.append(f"{record.where}, field 'output', rule '{error.rule}': {error}")
            continue
        rows.append(_row(record, mode))
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        shown = problems[:_SHOWN_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
        raise DataError(f"{path}: {len(problems)} replies break the grammar\n  " + "\n  ".join(shown))
    return rows


def _row(record: Record, mode: int) -> BcRow:
    return BcRow(
        row_id=record.where,
        system=record.optional_text("system"),
        instruction=record.text("instruction"),
        input=record.optional_text("input") or "",
        output=record.text("output"),
        mode=mode,
    )


def system_prompt_of(rows: Sequence[BcRow]) -> str | None:
    """The one system prompt all rows share (None if they have none): the policy's in every later stage.

    Raises:
        DataError: rows disagree, so no later stage could repeat what the model was trained with.
    """
    first: dict[str | None, str] = {}
    for row in rows:
        first.setdefault(row.system, row.row_id)
    if len(first) > 1:
        one, other = list(first.values())[:2]
        raise DataError(
            f"{one} and {other}, field 'system': {len(first)} different system prompts; "
            "give every row the same one, or none at all"
        )
    return next(iter(first), None)


def encode_bc_row(row: BcRow, tokenizer: PreTrainedTokenizerBase, max_len: int) -> BcExample:
    """Encode one row.

    Args:
        row: a checked row.
        tokenizer: with a chat template and an end-of-sequence token (:func:`check_tokenizer`).
        max_len: largest number of tokens of prompt, reply and end-of-sequence together.

    Raises:
        DataError: naming the row: it is longer than ``max_len``, or its reply spells a special token of the
            tokenizer.
    """
    example = _encode(row, tokenizer)
    if len(example.tokens) > max_len:
        raise DataError(
            f"{row.row_id}: {len(example.tokens)} tokens ({example.prompt_len} of them prompt) exceed "
            f"data.max_tokens={max_len}; raise it, shorten the row, or set data.on_too_long=drop"
        )
    return example


def encode_bc_rows(
    rows: Sequence[BcRow],
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    on_too_long: Literal["error", "drop"] = "error",
) -> EncodedRows:
    """Encode rows; too long ones are an error, or left out and named when ``on_too_long="drop"``.

    Raises:
        DataError: see :func:`encode_bc_row`; also when every row would be dropped.
    """
    if on_too_long == "error":
        return EncodedRows(tuple(encode_bc_row(row, tokenizer, max_len) for row in rows), ())
    encoded = [_encode(row, tokenizer) for row in rows]
    kept = tuple(example for example in encoded if len(example.tokens) <= max_len)
    if not kept:
        raise DataError(f"all {len(encoded)} rows are longer than data.max_tokens={max_len}")
    return EncodedRows(kept, tuple(e.row_id for e in encoded if len(e.tokens) > max_len))


def _encode(row: BcRow, tokenizer: PreTrainedTokenizerBase) -> BcExample:
    eos_id = tokenizer.eos_token_id
    assert eos_id is not None, "check_tokenizer comes first"
    prompt = encode_prompt(row.messages, tokenizer)
    reply = tokenizer.encode(row.output, add_special_tokens=False)
    # A reply that spells the end-of-turn token would teach the model to stop there.
    control = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = sorted(set(reply) & control)
    if special:
        names = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(special))
        raise DataError(f"{row.row_id}, field 'output': holds the tokenizer's special token {names}; remove it")
    return BcExample(row.row_id, (*prompt, *reply, eos_id), len(prompt), row.mode)
