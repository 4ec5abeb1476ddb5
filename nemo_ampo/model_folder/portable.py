"""The two configs of a folder in words that transformers 4, transformers 5 and vllm understand alike.

A file that transformers 4 reads as it is meant is read so by the others too, and stays as it is, byte for byte. Otherwise
the older spelling is added; the newer one stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_ampo.errors import UserError
from nemo_ampo.files import write_once
from nemo_ampo.model_folder.facts import CONFIG_NAME, TRANSFORMERS_4_ONLY, TRANSFORMERS_5_ONLY, facts_of, read_object

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DTYPE_KEYS = ("torch_dtype", "dtype")


def portable_config(content: dict[str, Any]) -> dict[str, Any]:
    """A decoded config.json with what transformers 4 would misread or miss written out.

    Raises:
        UserError: as :func:`~nemo_ampo.model_folder.facts.facts_of`.
    """
    facts = facts_of(content)
    old = {key: value for key, value in content.items() if key not in TRANSFORMERS_5_ONLY}
    if isinstance(scaling := old.get("rope_scaling"), dict):
        old["rope_scaling"] = {key: value for key, value in scaling.items() if key != "rope_theta"}
    if facts_of(old) == facts:
        return content
    written = {
        "rope_theta": facts.rope_base,
        "rope_scaling": facts.rope_scaling.as_json() if facts.rope_scaling else None,
        "torch_dtype": facts.dtype,
    }
    assert set(written) == set(TRANSFORMERS_4_ONLY)
    return content | (written if facts.dtype else {key: value for key, value in written.items() if key != "torch_dtype"})


def is_of_transformers_5(content: dict[str, Any]) -> bool:
    """Does a decoded tokenizer_config.json use words that transformers 4 does not know?"""
    return (
        content.get("tokenizer_class") == "TokenizersBackend"
        or "backend" in content
        or isinstance(content.get("extra_special_tokens"), list)
    )


def portable_tokenizer_config(content: dict[str, Any]) -> dict[str, Any]:
    """A decoded tokenizer_config.json in the words of transformers 4, which transformers 5 reads the same way.

    Raises:
        UserError: it names its special tokens twice, differently.
    """
    if not is_of_transformers_5(content):
        return content
    changed = {key: value for key, value in content.items() if key != "backend"}
    changed["tokenizer_class"] = "PreTrainedTokenizerFast"  # tokenizer.json as it is; a class of its own may edit it
    if isinstance(extra := changed.get("extra_special_tokens"), list):
        if changed.get("additional_special_tokens") not in (None, extra):
            raise UserError(
                f"{TOKENIZER_CONFIG_NAME}: extra_special_tokens and additional_special_tokens contradict each other"
            )
        del changed["extra_special_tokens"]
        changed["additional_special_tokens"] = extra
    if changed.get("clean_up_tokenization_spaces") is None:
        changed["clean_up_tokenization_spaces"] = False  # the default of transformers 5; that of transformers 4 is true
    return changed


_PORTABLE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    CONFIG_NAME: portable_config,
    TOKENIZER_CONFIG_NAME: portable_tokenizer_config,
}


def make_portable(folder: Path, dtype: str | None = None) -> None:
    """Rewrite the two configs of a folder where they need it.

    Args:
        folder: changed in place.
        dtype: the type its weights were written in, where that is not the one config.json states.
    """
    for name, portable in _PORTABLE.items():
        path = folder / name
        if not path.is_file():
            continue
        content = read_object(path)
        changed = portable(content)
        if name == CONFIG_NAME and dtype is not None:
            spelt = [key for key in _DTYPE_KEYS if changed.get(key) is not None]
            changed = changed | dict.fromkeys(spelt or ["torch_dtype"], dtype)
        if changed != content:
            write_once(path, json.dumps(changed, indent=2) + "\n")


def note_for_transformers_5(folder: Path) -> str | None:
    """What cannot be written so that transformers 5 reads it: for every qwen2 model it builds Qwen's own way of splitting
    text, whatever tokenizer.json says. None if that is what it says.

    Raises:
        UserError: a file of the folder is no JSON.
    """
    path = folder / "tokenizer.json"
    if read_object(folder / CONFIG_NAME).get("model_type") != "qwen2" or not path.is_file():
        return None
    content = read_object(path)
    steps = json.dumps(content.get("pre_tokenizer"))
    if content.get("normalizer") == {"type": "NFC"} and json.dumps(_QWEN_SPLIT) in steps:
        return None
    return (
        f"{folder}: its tokenizer.json splits text otherwise than Qwen's, which transformers 5 takes for any qwen2 model's; "
        "load it there with TokenizersBackend.from_pretrained, not with AutoTokenizer"
    )


def same_when_portable(packed: Path, found: Path) -> bool:
    """Is ``found`` the file ``packed``, or what :func:`make_portable` makes of it? The type of the weights is left out."""
    portable = _PORTABLE.get(found.name)
    if portable is None:
        return False
    one, other = ({k: v for k, v in portable(read_object(p)).items() if k not in _DTYPE_KEYS} for p in (packed, found))
    return one == other
