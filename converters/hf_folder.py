"""Reading a Hugging Face model folder: config, weights one tensor at a time, and all other files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.families import FAMILIES
from converters.mapping import Binding, Family, bind, check_names
from nemo_ampo.errors import UserError
from nemo_ampo.model_folder.facts import ModelFacts, read_facts
from nemo_ampo.model_folder.loading import load_tokenizer
from nemo_ampo.model_folder.weights import SafetensorsFolder

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".nemo")
WEIGHT_INDEX_SUFFIX = ".index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class HfFolder:
    """A checked Hugging Face model folder.

    Attributes:
        path: the folder.
        facts: what its config.json says.
        family: mapping table and what goes with it.
        weights: the tensors.
    """

    path: Path
    facts: ModelFacts
    family: Family
    weights: SafetensorsFolder

    def bindings(self) -> list[Binding]:
        """The family's table, spelled out for this model."""
        return bind(self.family.rows, self.facts)


def open_hf_folder(folder: Path) -> HfFolder:
    """Read config and weight index, and check that every weight is mapped and none is missing.

    Raises:
        UserError: naming the file, key or tensor.
    """
    facts = read_facts(folder)
    opened = HfFolder(folder, facts, FAMILIES[facts.family], SafetensorsFolder(folder))
    found = opened.weights.names()
    if facts.tied and _HEAD in found:
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


def check_tokenizer_files(folder: Path, allow_base_tokenizer: bool) -> None:
    """The tokenizer loads and is one to hold a dialogue with.

    Raises:
        UserError: no usable tokenizer, or (unless ``allow_base_tokenizer``) no chat template or end-of-sequence token.
    """
    tokenizer = load_tokenizer(folder)
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
