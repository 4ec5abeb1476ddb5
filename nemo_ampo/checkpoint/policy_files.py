"""What a policy's Hugging Face files say about prompting it: system prompt, stop tokens, vocabulary."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_ampo.errors import UserError
from nemo_ampo.files import sha256_of

SYSTEM_PROMPT_FILE = "system_prompt.txt"
_DECIDING_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "*/*.jinja")
"""Weights, configuration, vocabulary, chat templates, system prompt: what a checkpoint's replies depend on."""


def system_prompt(assets: Path, override: str | None) -> str:
    """The system prompt for turns that bring none of their own.

    Args:
        assets: the policy's Hugging Face files; behaviour cloning leaves its rows' system prompt there.
        override: a text file that wins over it.

    Returns:
        the override's text, else the cloned one, else the project's own description of the modes.

    Raises:
        UserError: the override is not there.
    """
    from nemo_ampo.prompts import load_prompt

    if override and not Path(override).is_file():
        raise UserError(f"system_prompt: no such file: {override}")
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


def policy_hash(folder: Path) -> str:
    """12 hex digits that tell policies apart by what their files hold, wherever they lie."""
    folder = folder.resolve()
    files = sorted({path for pattern in _DECIDING_FILES for path in folder.glob(pattern) if path.is_file()})
    digests = "".join(f"{path.relative_to(folder).as_posix()} {_file_digest(path)}\n" for path in files)
    return hashlib.sha256(digests.encode()).hexdigest()[:12]


def _file_digest(path: Path) -> str:
    """SHA-256 of a file, read once per process unless it changes."""
    status = path.stat()
    return _digest_of_version(path, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))


@functools.cache
def _digest_of_version(path: Path, version: tuple[int, ...]) -> str:
    return sha256_of(path)
