"""From messages to prompt tokens: the one place where a chat template is applied.

Cloning, reinforcement learning, evaluation and the embedded server all call :func:`encode_prompt`, so the model is trained
and used on the same tokens. (The authors' two frameworks disagreed here for Llama: cloning wrote a template of its own,
while RL used the tokenizer's, which adds date lines.)

Only the template speaks to the model in control tokens. Whatever a message holds that reads like one (``<|im_end|>``) is
encoded as the ordinary text it is, so that no speaker can end its turn or begin another's. A message without such text has
the tokens that ``apply_chat_template`` gives.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from itertools import chain
from typing import TYPE_CHECKING, Any

from nemo_ampo.errors import UserError
from nemo_ampo.reply.grammar import BEGIN_ANSWER, BEGIN_THINKING, END_ANSWER, END_THINKING
from nemo_ampo.text import one_line

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.compiler import CodeGenerator
    from transformers import PreTrainedTokenizerBase

PROMPT_DATE = "26 Jul 2024"
"""The ``date_string`` of every prompt. Llama 3 templates write the current date into the system message, some
from the clock; a fixed one (their own default) keeps the prompts of a resumed or repeated run the same."""
_PROMPT_DAY = datetime(2024, 7, 26)
"""The same day, for templates that ask the clock."""
RENDER_S = 5.0
"""Processor time a template may take; real ones need a thousandth of it."""
_RENDERED = 2**20
_RENDERED_PER_CHARACTER = 16
"""Characters a template may write: some, and a multiple of what it is given."""
_most: ContextVar[int] = ContextVar("_most", default=_RENDERED)
"""Of characters or items that any value of the template at work may have."""
_LOOKS_LIKE_CONTROL = re.compile(
    r"<[|\uff5c][^<>\s]{1,60}[|\uff5c]>|</?s>|<</?SYS>>|<(?:bos|eos|start_of_turn|end_of_turn)>|\[/?[A-Z_]{4,30}\]"
)
_WORDS_IN_TAGS = re.compile(r"</?[a-z_]{2,40}>")
_GRAMMAR = frozenset((BEGIN_THINKING, END_THINKING, BEGIN_ANSWER, END_ANSWER))
"""Tags of the reply format, which instructions spell out; text also for a tokenizer that has tokens for them."""


def build_messages(system: str | None, user: str) -> list[dict[str, str]]:
    """One user message, behind a system message if there is one."""
    messages = [{"role": "user", "content": user}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def encode_prompt(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Prompt tokens of a conversation, ending where the reply begins. May be called from any thread.

    Args:
        messages: with keys ``role`` and ``content``.
        tokenizer: its own chat template is used; special tokens come from the template only.

    Returns:
        Token ids, unpadded.

    Raises:
        UserError: the template refuses the messages, or does not come to an end.
    """
    plain, mark = _harmless(messages, tokenizer)
    text = render_prompt(plain, tokenizer)
    # What stands on either side of a mark is encoded by itself, so that the two never become one control token.
    pieces = text.split(mark) if mark else [text]
    return list(chain.from_iterable(tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces if piece))


def render_prompt(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, reply: bool = True) -> str:
    """The text of a conversation by the tokenizer's template, in bounded time.

    Args:
        messages: with keys ``role`` and ``content``.
        tokenizer: whose template.
        reply: begin the reply.

    Raises:
        UserError: the template refuses the messages, or does not come to an end.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    values: dict[str, Any] = {**tokenizer.special_tokens_map, "date_string": PROMPT_DATE, "tools": None, "documents": None}
    most = _RENDERED + _RENDERED_PER_CHARACTER * sum(len(message["content"]) for message in messages)
    pieces, size = [], 0
    allowed = _most.set(most)
    try:
        source = tokenizer.get_chat_template(None, None)
        with _processor_time(RENDER_S):
            template = _compiled(source)
            for piece in template.generate(messages=list(messages), add_generation_prompt=reply, **values):
                pieces.append(piece)
                size += len(piece)
                if size > most:
                    raise _EndlessError(f"writes more than {most:,} characters")
    except _EndlessError as error:
        raise UserError(f"tokenizer {name}: its chat_template {error} for {len(messages)} messages; mend it") from None
    except Exception as error:  # a template is a program of somebody else and may raise anything
        said = one_line(str(error)) or type(error).__name__
        roles = " + ".join(message["role"] for message in messages[:4])
        raise UserError(f"tokenizer {name}: its chat_template fails on {roles}: {said}") from None
    finally:
        _most.reset(allowed)
    return "".join(pieces)


class _EndlessError(Exception):
    """A template takes more than it may."""


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    """The template in transformers' own environment, without a clock or chance, and with values that cannot grow without
    bound."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    usual: Any = _compile_jinja_template("").environment
    bounded: Any = usual.overlay(optimized=False)  # what is worked out while compiling is not bounded
    bounded.intercepted_binops = frozenset(("+", "*", "**", "%"))
    bounded.binop_table = usual.binop_table | {"+": _sum, "*": _product, "**": _power, "%": _remainder}
    bounded.concat, bounded.code_generator_class = _joined, _joining_generator()
    bounded.call = _bounded(bounded.call)
    bounded.filters = {name: _bounded(use) for name, use in usual.filters.items() if name != "random"}
    bounded.filters["format"] = _bounded(_formatted)
    bounded.globals = {name: value for name, value in usual.globals.items() if name != "lipsum"}
    bounded.globals["strftime_now"] = _PROMPT_DAY.strftime
    return bounded.from_string(source)


def _joining_generator() -> type[CodeGenerator]:
    """Compiles ``a ~ b`` to a call of the environment's ``concat``."""
    from jinja2.compiler import CodeGenerator

    class Joining(CodeGenerator):
        def visit_Concat(self, node: Any, frame: Any) -> None:  # noqa: N802 - jinja2's name
            self.write("environment.concat(map(str, (")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write(")))")

    return Joining


def _bounded(use: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is neither asked for too much nor gives too much."""

    @wraps(use)
    def within_bounds(*given: Any, **named: Any) -> Any:
        if any(isinstance(value, int) and abs(value) > _most.get() for value in (*given, *named.values())):
            raise _EndlessError("asks for text without bound")
        for value in given:
            if callable(value):  # jinja2 wraps a text's own ``format``
                _check_widths(getattr(getattr(value, "__wrapped__", value), "__self__", None))
        result = use(*given, **named)
        _check_size(_length(result))
        return result

    return within_bounds


def _joined(parts: Iterable[str]) -> str:
    texts = list(parts)
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _length(value: Any) -> int:
    """Of text or a collection; 0 of anything else."""
    return len(value) if isinstance(value, Sized) else 0


def _check_size(size: int) -> None:
    if size > _most.get():
        raise _EndlessError("makes text without bound")


def _check_widths(form: Any) -> None:
    """Text that says how wide what is put into it shall be."""
    if isinstance(form, str) and re.search(r"[0-9]{8}", form):
        raise _EndlessError("asks for text without bound")


def _formatted(form: str, *given: Any, **named: Any) -> str:
    return str(_remainder(str(form), named or given))


def _remainder(left: Any, right: Any) -> Any:
    _check_widths(left)
    return left % right


def _sum(left: Any, right: Any) -> Any:
    _check_size(_length(left) + _length(right))
    return left + right


def _product(left: Any, right: Any) -> Any:
    sized = any(isinstance(factor, Sized) for factor in (left, right))
    sizes = [len(factor) if isinstance(factor, Sized) else abs(factor) for factor in (left, right)]
    if sizes[0] * sizes[1] > (_most.get() if sized else 2**53):
        raise _EndlessError("multiplies without bound")
    return left * right


def _power(left: Any, right: Any) -> Any:
    if abs(left) > 2**16 or abs(right) > 64:
        raise _EndlessError("multiplies without bound")
    return left**right


@contextmanager
def _processor_time(limit_s: float) -> Iterator[None]:
    """Ends Python code of this thread that takes longer, on any thread: a signal would reach the main thread only."""
    end = time.thread_time() + limit_s

    def trace(frame: object, event: str, argument: object) -> Callable[..., Any]:
        if time.thread_time() > end:
            raise _EndlessError(f"takes more than {limit_s:g} s")
        return trace

    usual = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(usual)


def _harmless(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, str]], str]:
    """The messages with a mark inside each text that the tokenizer would take for a control token; the mark.

    Markers of the template that are ordinary text (``[INST]`` of some) cannot be told from the message's by tokens; they get
    a blank instead. Without any such text, the messages as they are and no mark.
    """
    tokens, markers = _control_texts(tokenizer)
    contents = [message["content"] for message in messages]
    if not any(text in content for text in (*tokens, *markers) for content in contents):
        return list(messages), ""
    used = set(chain.from_iterable(contents)) | set(tokenizer.get_chat_template(None, None))
    mark = next(sign for sign in map(chr, range(0xE000, 0xF8FF)) if sign not in used)

    def harmless(content: str) -> str:
        for text in markers:
            content = content.replace(text, f"{text[0]} {text[1:]}")
        while True:
            before = content
            for text in tokens:
                content = content.replace(text, f"{text[0]}{mark}{text[1:]}")
            if content == before:
                return content

    return [{**message, "content": harmless(message["content"])} for message in messages], mark


def _control_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts that are control tokens, the longest first; and those the template uses like some, though they are words."""
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    # A vocabulary may have added tokens for blanks or words; those are text in anybody's mouth.
    tokens = {str(token.content) for token in added.values() if token.special or _is_like_control(str(token.content))}
    tokens = {text for text in tokens | set(tokenizer.all_special_tokens) if len(text) > 1} - _GRAMMAR
    markers = {match.group() for match in _LOOKS_LIKE_CONTROL.finditer(tokenizer.get_chat_template(None, None))}
    markers -= tokens | _GRAMMAR
    return tuple(sorted(tokens, key=len, reverse=True)), tuple(sorted(markers, key=len, reverse=True))


def _is_like_control(text: str) -> bool:
    return bool(_LOOKS_LIKE_CONTROL.fullmatch(text) or _WORDS_IN_TAGS.fullmatch(text))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot carry a system prompt, a user message and an end of reply.

    Raises:
        UserError: no end-of-sequence token, no chat template, or a template that fails on or drops a message.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name}: no eos_token, so a reply could never end; set it in tokenizer_config.json")
    if not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {name}: no chat_template; use an instruction-tuned checkpoint, or add one to tokenizer_config.json"
        )
    probes = {"system": "probe of the system message", "user": "probe of the user message"}
    messages = build_messages(probes["system"], probes["user"])
    prompt = render_prompt(messages, tokenizer, reply=False)
    for role, probe in probes.items():
        if probe not in prompt:
            raise UserError(f"tokenizer {name}: its chat_template drops the {role} message")
