"""Which rows a training stage learns from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING

from nemo_ampo.ranges import number


class OnTooLong(StrEnum):
    """What happens to a row longer than the limit."""

    error = "error"
    drop = "drop"


@dataclass
class BcDataConfig:
    """Rows of the behaviour-cloning stage.

    Attributes:
        train, heldout: JSON or JSONL with system, instruction, input, output.
        max_tokens: longest prompt plus reply, tokens.
        on_too_long: ``error`` or ``drop`` (said and counted on stderr).
        heldout_replies: held-out prompts answered by the model at each validation to measure the share of valid replies.
        max_new_tokens: limit of those replies, tokens.
        allow_evaluation_scenarios: train on rows of SOTOPIA's evaluation situations all the same.
    """

    train: str = MISSING
    heldout: str = MISSING
    max_tokens: int = number(8192, least=1)
    on_too_long: OnTooLong = OnTooLong.error
    heldout_replies: int = number(64, least=0)
    max_new_tokens: int = number(2048, least=1)
    allow_evaluation_scenarios: bool = False


@dataclass
class AmpoDataConfig:
    """Dialogue turns of the RL stage.

    Attributes:
        train: rows in the published layout (JSON, JSONL or Parquet).
        sotopia_dir: a SOTOPIA folder; its opening turns become the rows when ``train`` is null.
        system_prompt: text file for rows without a ``system`` column; null takes the one stored with the BC checkpoint,
            or else the project's own.
        allow_evaluation_scenarios: train on rows of SOTOPIA's evaluation situations all the same.
    """

    train: str | None = None
    sotopia_dir: str | None = None
    system_prompt: str | None = None
    allow_evaluation_scenarios: bool = False
