"""What a policy's Hugging Face files say about prompting it: system prompt, stop tokens, vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_ampo.errors import UserError

SYSTEM_PROMPT_FILE = "system_prompt.txt"


def system_prompt(assets: Path, override: str | None) -> str:
    """The system prompt for turns that bring none of their own.

    Args:
        assets: the policy's Hugging Face files; behaviour cloning leaves its rows' system prompt there.
        override: a text file that wins over it.

    Returns:
        the override's text, else the cloned one, else the project's own description of the modes.
    """
    from nemo_ampo.prompts import load_prompt

    for path in (Path(override) if override else None, assets / SYSTEM_PROMPT_FILE):
        if path is not None and path.is_file():
            return path.read_text()
    return load_prompt("modes_system").text


def stop_token_ids(assets: Path, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a reply: those of ``generation_config.json`` and the tokenizer's own."""
    ids = {int(tokenizer.eos_token_id)}
    path = assets / "generation_config.json"
    if path.is_file():
        listed = json.loads(path.read_text()).get("eos_token_id")
        if listed is not None:
            ids |= {int(i) for i in (listed if isinstance(listed, list) else [listed])}
    return tuple(sorted(ids))


def check_vocabulary(tokenizer: Any, model: Mapping[str, Any]) -> None:
    """The checkpoint must have a row for every token.

    Raises:
        UserError: with both sizes.
    """
    rows = model.get("hf_vocab_size")
    if rows is not None and len(tokenizer) > int(rows):
        raise UserError(
            f"tokenizer has {len(tokenizer)} tokens, the checkpoint's embedding only {rows} rows (run.init_from)"
        )
