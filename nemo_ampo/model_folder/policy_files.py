"""What a policy's Hugging Face files say about prompting it: system prompt, stop tokens, vocabulary."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from nemo_ampo.errors import UserError
from nemo_ampo.files import read_text, sha256_of, write_once
from nemo_ampo.model_folder.facts import CONFIG_NAME, read_object
from nemo_ampo.text import one_line

SYSTEM_PROMPT_FILE = "system_prompt.txt"
GENERATION_CONFIG = "generation_config.json"
_DECIDING_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "*/*.jinja")
"""Weights, configuration, vocabulary, chat templates, system prompt: what a checkpoint's replies depend on."""


def system_prompt(assets: Path, override: str | None) -> str:
    """The system prompt for turns that bring none of their own.

    Args:
        assets: the policy's Hugging Face files; training leaves its system prompt there.
        override: a text file that wins over it.

    Returns:
        the override's text, else the trained one, else the project's own description of the modes.

    Raises:
        UserError: the override is not there.
    """
    from nemo_ampo.prompts import load_prompt

    if override and not Path(override).is_file():
        raise UserError(f"system_prompt: no such file: {override}")
    for path in (Path(override) if override else None, assets / SYSTEM_PROMPT_FILE):
        if path is not None and path.is_file():
            return read_text(path)
    return load_prompt("modes_system").text


def record_system_prompt(assets: Path, text: str) -> None:
    """Leave beside the policy the system prompt it is trained on, so that later stages show it the same text."""
    if system_prompt(assets, None) != text:
        write_once(assets / SYSTEM_PROMPT_FILE, text)


def stop_token_ids(assets: Path, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a reply: the tokenizer's own, and those of ``generation_config.json`` (of ``config.json`` where
    that names none).

    Raises:
        UserError: the files name something that is no token of the model.
    """
    return tuple(sorted({int(tokenizer.eos_token_id), *_listed_ends(assets)}))


def record_stop_tokens(assets: Path, tokenizer: Any) -> None:
    """Leave in ``generation_config.json`` every id that ended a reply in training, so that whoever draws from the policy
    stops where it was taught to. A file that names them already stays as it is.
    """
    stops = stop_token_ids(assets, tokenizer)
    path = assets / GENERATION_CONFIG
    content = read_object(path) if path.is_file() else {}
    named = _ids(content.get("eos_token_id"), path)
    added = [i for i in stops if i not in named]
    if added:
        ends = [*named, *added]
        write_once(path, json.dumps(content | {"eos_token_id": ends if len(ends) > 1 else ends[0]}, indent=2) + "\n")


def _listed_ends(assets: Path) -> list[int]:
    for name in (GENERATION_CONFIG, CONFIG_NAME):
        path = assets / name
        if path.is_file():
            content = read_object(path)
            if content.get("eos_token_id") is not None:
                return _ids(content["eos_token_id"], path)
    return []


def _ids(value: Any, path: Path) -> list[int]:
    """``eos_token_id``: a whole number or a list of them, within the vocabulary that a config.json beside it states."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    beside = path.with_name(CONFIG_NAME)
    vocab = read_object(beside).get("vocab_size") if beside.is_file() else None
    limit = vocab if isinstance(vocab, int) else 2**31
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < limit:
            raise UserError(f"{path}: eos_token_id={one_line(repr(i), 60)} is no token id of the model")
    return list(dict.fromkeys(ids))


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
