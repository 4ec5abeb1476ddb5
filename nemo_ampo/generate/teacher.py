"""The teacher: a chat model that writes replies in a given mode, held to the grammar.

A reply that breaks the strict grammar, or keeps it in another mode than the one asked for, is refused and counted
by rule; the teacher is told what was wrong and asked again a bounded number of times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from nemo_ampo.errors import FormatError
from nemo_ampo.files import derived_seed
from nemo_ampo.prompts import load_prompt
from nemo_ampo.reply.grammar import BEGIN_ANSWER, BEGIN_THINKING, END_ANSWER, END_THINKING, parse_reply, spoken_text
from nemo_ampo.reply.modes import MODES
from nemo_ampo.types import Reply

if TYPE_CHECKING:
    from nemo_ampo.chat.client import ChatClient

OTHER_MODE, UNSPEAKABLE = "other_mode", "unspeakable"
"""Rules beside those of the grammar: the reply is in another mode; it holds nothing to be said on one line."""


@dataclass
class Teacher:
    """Asks for replies and utterances.

    Attributes:
        chat: client of the model.
        temperatures: of each try; their number bounds the tries.
        seed: of the job; every question derives its own.
        rejected: rule to replies refused for it.
    """

    chat: ChatClient
    temperatures: Sequence[float]
    seed: int
    rejected: Counter[str] = field(default_factory=Counter)

    async def reply(self, instruction: str, mode: int, question_id: str) -> str:
        """A reply to ``instruction`` in ``mode``, exactly in the grammar, its answer on one line.

        Raises:
            ChatError: none could be had.
        """
        messages = [{"role": "system", "content": teacher_prompt(mode)}, {"role": "user", "content": instruction}]

        def read(text: str) -> str:
            text = text.strip()
            reply = self._checked(text)
            if reply.mode != mode:
                self.rejected[OTHER_MODE] += 1
                raise FormatError(OTHER_MODE, f"the reply is of level {reply.mode}, not {mode}")
            if not _on_one_line(reply.answer):
                self._refuse("the answer between the quotation marks must stand on one line")
            return text

        return await self._ask(messages, read, f"{question_id}/{mode}")

    async def utterance(self, instruction: str, question_id: str) -> str:
        """Words to be said, in one pair of quotation marks.

        Raises:
            ChatError: none could be had.
        """

        def read(text: str) -> str:
            words = spoken_text(text, thinking=False)
            if words is None or not words.strip('"').strip() or not _on_one_line(words):
                self._refuse("the reply holds no utterance between quotation marks on one line")
            return words

        return await self._ask([{"role": "user", "content": instruction}], read, question_id)

    def _refuse(self, message: str) -> NoReturn:
        self.rejected[UNSPEAKABLE] += 1
        raise FormatError(UNSPEAKABLE, message)

    def _checked(self, text: str) -> Reply:
        try:
            return parse_reply(text, strict=True)
        except FormatError as error:
            self.rejected[error.rule] += 1
            raise

    async def _ask(self, messages: list[dict[str, str]], read: Callable[[str], str], question_id: str) -> str:
        seed = question_seed(self.seed, question_id)
        asked = await self.chat.ask(messages, read, temperatures=self.temperatures, seed=seed, parse_errors=(FormatError,))
        return asked.value


def _on_one_line(words: str) -> bool:
    """No line break of any kind, with which an utterance could forge the line of another speaker."""
    return words.splitlines() == [words]


def teacher_prompt(mode: int) -> str:
    """The system message that asks for a reply in a mode."""
    template = load_prompt("teacher")
    return template.render(mode=str(mode), mode_name=MODES[mode].name, skeleton=skeleton(mode))


def skeleton(mode: int) -> str:
    """What a reply of the mode looks like."""
    answer = f'{BEGIN_ANSWER}\n"..."\n{END_ANSWER}'
    sections = "\n\n".join(f"{name}:\n..." for name in MODES[mode].sections)
    thinking = f"{BEGIN_THINKING}\n{sections}\n{END_THINKING}\n" if sections else ""
    return f"Thinking Level: {mode}\n{thinking}{answer}"


def question_seed(seed: int, question_id: str) -> int:
    """Sampling seed of one question, 0..2^31-1: from its name, not from the order of the calls."""
    return derived_seed(f"{seed}/{question_id}")
