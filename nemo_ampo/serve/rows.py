"""One decoding step for many replies, each of which gets the very numbers it would get alone.

A matrix product of another height, or attention over padded keys, sums in another order and so differs in the last bits,
which is enough to draw another token. Here every step has the same height, filled up with idle rows, and every row attends
to its own keys in a call of its own. Nothing a row computes depends on who else is there.

Legend: B rows, H query heads, G key-value heads, T positions of one row, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Of one row: per layer keys and values, each [1, G, T, D]."""

_ATTENTION = "nemo_ampo_rows"


class _Rows(Cache):
    """A cache for one step: hands each layer every row's own keys, and leaves what was known before as it was."""

    def __init__(self, known: Sequence[KeysValues]) -> None:
        super().__init__()
        self._known = known
        self.grown: list[KeysValues] = [[] for _ in known]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Any, Any]:
        """Per row the keys, and the values, of one layer with the new position; idle rows have none."""
        for row, (known, grown) in enumerate(zip(self._known, self.grown, strict=True)):
            old_keys, old_values = known[layer_idx]
            keys = torch.cat((old_keys, key_states[row : row + 1]), dim=2)
            grown.append((keys, torch.cat((old_values, value_states[row : row + 1]), dim=2)))
        return [grown[layer_idx][0] for grown in self.grown], [grown[layer_idx][1] for grown in self.grown]

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Nothing depends on it here: positions are given, and no mask is used."""
        return 0

    def get_max_cache_shape(self) -> int | None:
        """No bound."""
        return None


def _attention(
    module: torch.nn.Module,
    query_BH1D: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    attention_mask: object,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Each row over its own keys. The query heads that share a key-value head stand in as positions."""
    height, heads, _one, size = query_BH1D.shape
    out_B1HD = query_BH1D.new_zeros(height, 1, heads, size)
    for row, (keys_1GTD, values_1GTD) in enumerate(zip(keys, values, strict=True)):
        if sliding_window is not None:
            keys_1GTD, values_1GTD = keys_1GTD[:, :, -sliding_window:], values_1GTD[:, :, -sliding_window:]
        query = query_BH1D[row].reshape(1, keys_1GTD.shape[1], -1, size)
        said = torch.nn.functional.scaled_dot_product_attention(query, keys_1GTD, values_1GTD, scale=scaling)
        out_B1HD[row, 0] = said.reshape(heads, size)
    return out_B1HD, None


ALL_ATTENTION_FUNCTIONS[_ATTENTION] = _attention


@contextmanager
def _attending_by_row(model: Any) -> Iterator[None]:
    usual = model.config._attn_implementation
    model.config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = usual


def next_logits(
    model: Any, tokens: Sequence[int], known: Sequence[KeysValues], height: int
) -> tuple[torch.Tensor, list[KeysValues]]:
    """Logits after one more token for each row.

    Args:
        model: of transformers; only one thread may use it.
        tokens: the newest token of each row.
        known: keys and values of the tokens before it; not changed.
        height: rows of the step, idle ones included; the same in every call, at least ``len(tokens)``.

    Returns:
        [B, V] logits, and the keys and values with the new token's.
    """
    idle = height - len(tokens)
    lengths = [row[0][0].shape[2] for row in known]
    cache = _Rows(known)
    with _attending_by_row(model):
        logits_B1V = model(
            torch.tensor([[token] for token in tokens] + [[0]] * idle, device=model.device),
            position_ids=torch.tensor([[length] for length in lengths] + [[0]] * idle, device=model.device),
            cache_position=torch.tensor([0], device=model.device),
            past_key_values=cache,
            use_cache=True,
        ).logits
    return logits_B1V[: len(tokens), -1], cache.grown
