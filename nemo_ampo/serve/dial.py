"""The mode dial: a bias on the choice of the mode while a reply is decoded.

Every reply starts with ``Thinking Level: K``. The tokens of the four openings share a prefix and then differ; where a
reply so far is that prefix, the logits of the tokens that decide get the bias. One checkpoint then gives a whole
frontier of score against tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nemo_ampo.errors import UserError
from nemo_ampo.reply.grammar import BEGIN_ANSWER, BEGIN_THINKING
from nemo_ampo.reply.modes import MODES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ModeDial:
    """Where a tokenizer's replies choose their mode, and by which tokens.

    Raises:
        UserError: the tokenizer does not tell the four modes apart by one token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        openings = {k: _opening(tokenizer, k, bool(mode.sections)) for k, mode in MODES.items()}
        shared = 0
        while all(len(ids) > shared + 1 and ids[shared] == openings[1][shared] for ids in openings.values()):
            shared += 1
        self.choices: dict[int, int] = {k: ids[shared] for k, ids in openings.items()}
        """Mode to the token that chooses it."""
        if shared == 0 or len(set(self.choices.values())) != len(MODES):
            raise UserError("mode_bias: this tokenizer does not give the four 'Thinking Level: K' openings a token each")
        self._prefix = openings[1][:shared]
        self._prefix_text = tokenizer.decode(self._prefix)

    def chooses_next(self, generated: Sequence[int]) -> bool:
        """Whether the next token after these decides the mode."""
        if len(generated) > 2 * len(self._prefix_text):
            return False
        return list(generated) == self._prefix or self._tokenizer.decode(list(generated)) == self._prefix_text

    def biases(self, mode_bias: Mapping[int, float]) -> dict[int, float]:
        """Token to the number added to its logit."""
        return {self.choices[mode]: bias for mode, bias in mode_bias.items()}


def _opening(tokenizer: PreTrainedTokenizerBase, mode: int, thinks: bool) -> list[int]:
    text = f"Thinking Level: {mode}\n{BEGIN_THINKING if thinks else BEGIN_ANSWER}\n"
    return list(tokenizer.encode(text, add_special_tokens=False))
