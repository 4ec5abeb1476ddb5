"""Who speaks: a chat endpoint behind one character, and what of its reply may be heard.

An agent is any OpenAI-compatible endpoint: a remote API, a reasoning model, or a local checkpoint that
:mod:`nemo_ampo.serve` serves. Told to use the thinking modes it gets the modes' system prompt and its replies are
read by their grammar; otherwise its replies are plain speech. Hidden reasoning (``reasoning_content``, ``<think>``) is
recorded and never spoken.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from nemo_ampo.chat import Completion, EndpointConfig
from nemo_ampo.data.chat import build_messages, encode_prompt
from nemo_ampo.errors import ConfigError, FormatError
from nemo_ampo.files import is_file, is_folder, look_alike, missing, no_model_folder, read_text
from nemo_ampo.model_folder.policy_files import policy_hash, system_prompt
from nemo_ampo.ranges import check_numbers, number, seconds
from nemo_ampo.reply.grammar import QUOTE, mode_of, one_line, spoken_text
from nemo_ampo.reply.modes import NO_MODE, bias_problem

SILENT = "silent"
"""Why a reply could not be heard: nothing in it may be spoken."""
CHARACTERS_PER_TOKEN = 4
"""For an endpoint whose tokenizer is not at hand."""

_LEVEL_LINE = "Thinking Level"
_TRACE_OF_GRAMMAR = re.compile(rf"<\|(?:begin|end)(?:_|$)|{_LEVEL_LINE}")


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
    temperature: float = number(0.7, least=0, most=2)
    top_p: float = number(1.0, least=0, most=1, above=True)
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


def system_text(config: AgentConfig) -> str | None:
    """The agent's system prompt; None without one."""
    if config.modes:
        return system_prompt(Path(config.checkpoint or "."), config.system_prompt)
    return read_text(Path(config.system_prompt)) if config.system_prompt else None


def model_hash(config: AgentConfig) -> str:
    """12 hex digits that tell models apart: of a checkpoint's files, or of an endpoint's model name."""
    if not config.checkpoint:
        return hashlib.sha256(config.model.encode()).hexdigest()[:12]
    return policy_hash(Path(config.checkpoint))


class Chat(Protocol):
    """The part of :class:`nemo_ampo.chat.ChatClient` that an agent needs."""

    async def complete(
        self,
        messages: Sequence[dict[str, str]],
        *,
        temperature: float,
        seed: int | None = None,
        max_tokens: int | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> Completion:
        """One reply; raises ChatError when there is none after bounded retries."""
        ...

    @property
    def refused(self) -> str | None:
        """Why nothing could be had so far, where asking again would end the same; None otherwise."""
        ...


@dataclass(frozen=True)
class Heard:
    """What came of one reply.

    Attributes:
        text: the words without the quotation marks around them, on one line; None when nothing may be spoken.
        mode: as in :class:`nemo_ampo.dialogue.records.Turn`.
        failed: as there.
    """

    text: str | None
    mode: int | None
    failed: str | None


def hear(reply: str, modes: bool) -> Heard:
    """Read a reply: the answer of a valid one, what can be saved of a broken one, never any grammar.

    Line breaks inside the words become blanks, so that nobody can forge another speaker's line.
    """
    mode, failed = None, None
    if modes:
        try:
            mode = mode_of(reply)
        except FormatError as error:
            mode, failed = NO_MODE, error.rule
    quoted = spoken_text(reply, thinking=modes)
    words = one_line(quoted.strip(QUOTE)) if quoted is not None else ""
    # A reply of a few tokens may be cut off in its first word, which reads like speech.
    cut_at_once = modes and _LEVEL_LINE.startswith(reply.strip())
    if not words or cut_at_once or _TRACE_OF_GRAMMAR.search(words):
        return Heard(None, mode, SILENT)
    return Heard(words, mode, failed)


@dataclass(frozen=True)
class Said:
    """One reply of an agent.

    Attributes:
        heard: what of it may be spoken.
        completion: as the endpoint sent it.
        seed: of the call.
    """

    heard: Heard
    completion: Completion
    seed: int


class Agent:
    """One endpoint in one role.

    Args:
        config: how it is asked.
        chat: the client of its endpoint; shared where two agents share an endpoint.
        count_tokens: prompt tokens of messages.
    """

    def __init__(self, config: AgentConfig, chat: Chat, count_tokens: Callable[[list[dict[str, str]]], int]) -> None:
        self.config = config
        self._chat = chat
        self._count = count_tokens
        self._system = system_text(config)
        # Sent also when it is 1: servers take what a request leaves out from the checkpoint's generation_config.json.
        self._extra: dict[str, Any] = {} if "top_p" in config.extra_body else {"top_p": config.top_p}
        if config.mode_bias:
            self._extra["mode_bias"] = {str(mode): bias for mode, bias in config.mode_bias.items()}

    def prompt_tokens(self, prompt: str) -> int:
        """Of the whole chat-templated prompt, system prompt included."""
        return self._count(build_messages(self._system, prompt))

    @property
    def refused(self) -> str | None:
        """See :attr:`nemo_ampo.chat.ChatClient.refused`."""
        return self._chat.refused

    async def speak(self, prompt: str, seed: int) -> Said:
        """One reply to ``prompt``.

        Raises:
            ChatError: the endpoint gave none, after its bounded retries.
        """
        completion = await self._chat.complete(
            build_messages(self._system, prompt),
            temperature=self.config.temperature,
            seed=seed,
            max_tokens=self.config.max_tokens,
            extra_body=self._extra,
        )
        return Said(hear(completion.text, self.config.modes), completion, seed)


def token_counter(config: AgentConfig) -> Callable[[list[dict[str, str]]], int]:
    """How an agent's prompts are measured: by its tokenizer, or estimated for an endpoint without one.

    Raises:
        UserError: the folder's tokenizer has no usable chat template.
    """
    folder = config.checkpoint or config.tokenizer
    if not folder:
        return lambda messages: math.ceil(sum(len(m["content"]) for m in messages) / CHARACTERS_PER_TOKEN)

    from nemo_ampo.data.chat import check_tokenizer
    from nemo_ampo.model_folder.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer)
    return lambda messages: len(encode_prompt(messages, tokenizer))
