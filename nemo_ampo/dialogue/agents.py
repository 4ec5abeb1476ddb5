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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ampo.chat.client import ChatClient
from nemo_ampo.chat.completion import Completion
from nemo_ampo.data.chat import build_messages, encode_prompt
from nemo_ampo.dialogue.config import AgentConfig
from nemo_ampo.errors import FormatError
from nemo_ampo.files import read_text
from nemo_ampo.model_folder.policy_files import policy_hash, system_prompt
from nemo_ampo.reply.grammar import QUOTE, mode_of, one_line, spoken_text
from nemo_ampo.reply.modes import NO_MODE

SILENT = "silent"
"""Why a reply could not be heard: nothing in it may be spoken."""
CHARACTERS_PER_TOKEN = 4
"""For an endpoint whose tokenizer is not at hand."""

_LEVEL_LINE = "Thinking Level"
_TRACE_OF_GRAMMAR = re.compile(rf"<\|(?:begin|end)(?:_|$)|{_LEVEL_LINE}")


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

    def __init__(self, config: AgentConfig, chat: ChatClient, count_tokens: Callable[[list[dict[str, str]]], int]) -> None:
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
        """See :attr:`nemo_ampo.chat.client.ChatClient.refused`."""
        return self._chat.refused

    async def speak(self, prompt: str, seed: int) -> Said:
        """One reply to ``prompt``.

        Raises:
            ChatError: the endpoint gave none, after its bounded retries.
        """
        question = self._chat.question(
            build_messages(self._system, prompt),
            temperature=self.config.temperature,
            seed=seed,
            max_tokens=self.config.max_tokens,
            extra_body=self._extra,
        )
        completion = await self._chat.complete(question)
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
