"""Reading a Hugging Face model folder: config, weights one tensor at a time, and all other files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.families import family_of
from converters.mapping import Binding, Family, ModelShape, bind, check_names
from converters.model_config import model_shape
from nemo_ampo.errors import UserError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
WEIGHT_INDEX_SUFFIX = ".index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class SafetensorsFolder:
    """Tensors of all ``*.safetensors`` files of a folder, by name, loaded when asked for."""

    def __init__(self, folder: Path) -> None:
        """Index the files.

        Raises:
            UserError: if there are none, one named in the index is absent or torn, or two hold the same
                tensor.
        """
        from safetensors import SafetensorError, safe_open

        files = sorted(folder.glob("*.safetensors"))
        if not files:
            other = sorted(p.name for p in folder.glob("*.bin"))
            hint = f" (found {other[0]}; save it again as safetensors)" if other else ""
            raise UserError(f"{folder}: no *.safetensors weights{hint}")
        self._check_index(folder, {f.name for f in files})
        self._handles: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a readable safetensors file ({error})") from error
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                if name in self._handles:
                    raise UserError(f"{file}: tensor {name} is also in another file of the folder")
                self._handles[name] = handle

    @staticmethod
    def _check_index(folder: Path, present: set[str]) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            listed = set(read_json(index).get("weight_map", {}).values())
            if listed - present:
                raise UserError(f"{index}: names absent weight files: {', '.join(sorted(listed - present))}")

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._handles)

    def load(self, name: str) -> Tensor:
        """One tensor, as stored."""
        return self._handles[name].get_tensor(name)

    def dtype(self) -> torch.dtype:
        """The narrowest type that holds every tensor exactly."""
        empty = (self._handles[name].get_slice(name)[:0] for name in self._handles)
        kinds = {t.dtype for t in empty}
        widest = kinds.pop()
        for kind in kinds:
            widest = torch.promote_types(widest, kind)
        return widest


@dataclass(frozen=True)
class HfFolder:
    """A checked Hugging Face model folder.

    Attributes:
        path: the folder.
        config: its ``transformers`` config, defaults filled in.
        family: mapping table and what goes with it.
        shape: sizes from the config.
        weights: the tensors.
    """

    path: Path
    config: Any
    family: Family
    shape: ModelShape
    weights: SafetensorsFolder

    def bindings(self) -> list[Binding]:
        """The family's table, spelled out for this model."""
        return bind(self.family.rows, self.shape)


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: if it is absent or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected a Hugging Face model folder") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def read_config(folder: Path) -> tuple[Any, Family]:
    """config.json of a model folder, with its family.

    Raises:
        UserError: no config.json, or a ``model_type`` that is not supported.
    """
    family = family_of(read_json(folder / "config.json").get("model_type"))
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder), family


def open_hf_folder(folder: Path) -> HfFolder:
    """Read config and weight index, and check that every weight is mapped and none is missing.

    Raises:
        UserError: naming the file, key or tensor.
    """
    config, family = read_config(folder)
    shape = model_shape(config)
    opened = HfFolder(folder, config, family, shape, SafetensorsFolder(folder))
    found = opened.weights.names()
    if shape.tied and _HEAD in found:
        # Some tools write the tied head a second time. Dropping it is safe only if it is the embedding.
        if not torch.equal(opened.weights.load(_HEAD), opened.weights.load(_EMBEDDING)):
            raise UserError(f"{_HEAD}: differs from the embedding although config.json has tie_word_embeddings=true")
        found = found - {_HEAD}
    check_names(found, {name for b in opened.bindings() for name in b.hf_names}, str(folder))
    return opened


def asset_files(folder: Path) -> Iterator[Path]:
    """Every file that is not a weight, relative to the folder: config, tokenizer, template, licence, ...

    Hidden files and folders (download caches) are left out.
    """
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        weight = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(WEIGHT_INDEX_SUFFIX)
        if path.is_file() and not hidden and not weight:
            yield relative


def check_tokenizer(folder: Path, shape: ModelShape, allow_base_tokenizer: bool) -> None:
    """The tokenizer loads, fits the embedding, and is one to hold a dialogue with.

    Raises:
        UserError: no tokenizer, ids beyond the embedding, or (unless ``allow_base_tokenizer``) no chat
            template or end-of-sequence token.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({error})") from error
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if num_ids > shape.vocab:
        raise UserError(
            f"{folder}: the tokenizer has {num_ids} ids but the model's embedding only {shape.vocab} rows "
            "(vocab_size in config.json)"
        )
    lacking = [
        what
        for what, value in (
            ("a chat template", tokenizer.chat_template),
            ("an end-of-sequence token", tokenizer.eos_token),
        )
        if not value
    ]
    if lacking and not allow_base_tokenizer:
        raise UserError(
            f"{folder}: the tokenizer lacks {' and '.join(lacking)}, so no dialogue can be formatted; use "
            "an instruct model's, or pass --allow-base-tokenizer if training will be given another one"
        )
