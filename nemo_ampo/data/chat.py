"""From messages to prompt tokens: the one place where a chat template is applied.

Cloning, reinforcement learning and evaluation all call :func:`encode_prompt`, so the model is trained and
used on the same tokens. (The authors' two frameworks disagreed here for Llama: cloning wrote a template of
its own, while RL used the tokenizer's, which adds date lines.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_ampo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_DATE = "26 Jul 2024"
"""The ``date_string`` of every prompt. Llama 3 templates write the current date into the system message, some
from the clock; a fixed one (their own default) keeps the prompts of a resumed or repeated run the same."""


def build_messages(system: str | None, user: str) -> list[dict[str, str]]:
    """One user message, behind a system message if there is one."""
    messages = [{"role": "user", "content": user}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def encode_prompt(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Prompt tokens of a conversation, ending where the reply begins.

    Args:
        messages: with keys ``role`` and ``content``.
        tokenizer: its own chat template is used; special tokens come from the template only.

    Returns:
        Token ids, unpadded.
    """
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, date_string=PROMPT_DATE)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot carry a system prompt, a user message and an end of reply.

    Raises:
        UserError: no end-of-sequence token, no chat template, or a template that fails on or drops a message.
    """
    from jinja2 import TemplateError

    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name}: no eos_token, so a reply could never end; set it in tokenizer_config.json")
    if not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {name}: no chat_template; use an instruction-tuned checkpoint, or add one to tokenizer_config.json"
        )
    probes = {"system": "probe of the system message", "user": "probe of the user message"}
    messages = build_messages(probes["system"], probes["user"])
    try:
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, date_string=PROMPT_DATE))
    except TemplateError as error:
        raise UserError(f"tokenizer {name}: its chat_template fails on system + user: {error}") from error
    for role, probe in probes.items():
        if probe not in prompt:
            raise UserError(f"tokenizer {name}: its chat_template drops the {role} message")
