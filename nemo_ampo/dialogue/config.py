"""Who speaks in a dialogue, and by which rules: keys, defaults and units."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from nemo_ampo.chat.config import EndpointConfig
from nemo_ampo.errors import ConfigError
from nemo_ampo.files import is_file, is_folder, look_alike, missing, no_model_folder
from nemo_ampo.ranges import SMALLEST_DRAW, check_numbers, number, seconds
from nemo_ampo.reply.modes import bias_problem


class ViewName(StrEnum):
    """What the characters know of each other, see :mod:`nemo_ampo.dialogue.prompts`."""

    sotopia = "sotopia"
    reference = "reference"


class LeaveRule(StrEnum):
    """When an utterance ends the dialogue."""

    strict = "strict"
    """It is ``left the conversation`` or ``leave the conversation`` and nothing else, signs around it aside."""
    reference = "reference"
    """It contains one of the two, as in the authors' code: also in "please do not leave the conversation"."""


@dataclass(frozen=True)
class AgentConfig(EndpointConfig):
    """One agent: a checkpoint to be served here, or an endpoint that is there already.

    Attributes:
        base_url, model: of an endpoint; empty for a checkpoint.
        timeout_s: as in EndpointConfig; generous, since a local server may have a queue.
        checkpoint: Hugging Face folder, served for the run as ``serve.engine`` says; empty for an endpoint.
        modes: told to use the thinking modes (system prompt), and read by their grammar.
        system_prompt: text file that replaces the modes' system prompt, or gives one to an agent without modes.
        tokenizer: Hugging Face folder that counts an endpoint's prompt tokens; empty estimates them at 4 characters
            each. A checkpoint counts with its own.
        temperature: 0 takes the most likely token.
        top_p: nucleus of the sampling distribution; 1 samples from all of it. For an endpoint that refuses the field,
            ``extra_body.top_p: null`` leaves it out.
        mode_bias: mode to a number added to the logit of its digit where the mode is chosen: the mode dial. Only the
            embedded server can do that. Null for none.
    """

    section: ClassVar[str] = "agent"

    base_url: str = ""
    model: str = ""
    timeout_s: float = seconds(600)
    checkpoint: str = ""
    modes: bool = False
    system_prompt: str | None = None
    tokenizer: str = ""
    temperature: float = number(0.7, least=SMALLEST_DRAW, most=2, or_else=(0,))
    top_p: float = number(1.0, least=SMALLEST_DRAW, most=1)
    mode_bias: dict[int, float] | None = number(None, least=-1e6, most=1e6, whole=False)

    def __post_init__(self) -> None:
        if self.base_url:
            super().__post_init__()
        check_numbers(self.section, self)
        problem = bias_problem(self.mode_bias or {})
        self._check("mode_bias", problem is None, problem or "")
        self._check("mode_bias", self.modes or not self.mode_bias, f"needs {self.section}.modes=true")

    @property
    def given(self) -> bool:
        """The section names an agent."""
        return bool(self.base_url or self.checkpoint)


@dataclass(frozen=True)
class PolicyConfig(AgentConfig):
    """The agent under evaluation."""

    section: ClassVar[str] = "policy"

    modes: bool = True


@dataclass(frozen=True)
class PartnerConfig(AgentConfig):
    """The agent on the other seat, where there is another one."""

    section: ClassVar[str] = "partner"


def check_agent(config: AgentConfig) -> None:
    """An agent that can be reached, once its files are there.

    Raises:
        ConfigError: naming the key.
    """
    section = config.section
    if bool(config.base_url) == bool(config.checkpoint):
        given = "both" if config.base_url else "neither"
        raise ConfigError(f"{section}.checkpoint, {section}.base_url: give exactly one of the two, not {given}")
    if config.checkpoint and not is_file(Path(config.checkpoint) / "config.json"):
        raise ConfigError(f"{section}.checkpoint: {no_model_folder(config.checkpoint)}")
    if config.tokenizer and not is_folder(config.tokenizer):
        raise ConfigError(f"{section}.tokenizer: no folder at {config.tokenizer}{look_alike(config.tokenizer)}")
    if config.system_prompt is not None and not is_file(config.system_prompt):
        raise ConfigError(f"{section}.system_prompt: {missing(config.system_prompt)}")
