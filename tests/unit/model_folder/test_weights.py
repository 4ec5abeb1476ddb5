"""Which file a tensor is read from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hf import edit_weights, split_in_two

from nemo_ampo.errors import UserError
from nemo_ampo.model_folder.loading import load_model
from nemo_ampo.model_folder.weights import SafetensorsFolder

NORM = "model.norm.weight"


def read(folder: Path, name: str = NORM) -> torch.Tensor:
    return SafetensorsFolder(folder).load(name)


def test_an_index_decides_against_an_older_single_file(folder_of) -> None:
    folder = folder_of("qwen2")
    before, older = read(folder), folder / "older.safetensors"
    shutil.copy(folder / "model.safetensors", older)
    split_in_two(folder)
    older.rename(folder / "model.safetensors")
    edit_weights(folder, lambda t: t[NORM].add_(1))
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"of an upload that was broken off")
    assert torch.equal(read(folder), before)
    assert torch.equal(load_model(folder).state_dict()[NORM], before)


def test_an_index_decides_which_of_two_copies_counts(folder_of) -> None:
    folder = folder_of("qwen2")
    before, places = read(folder), split_in_two(folder)
    [other] = {file for file in places.values() if file != places[NORM]}
    save_file(load_file(folder / other) | {NORM: before + 1, "left.over": before.clone()}, folder / other)
    weights = SafetensorsFolder(folder)
    assert torch.equal(weights.load(NORM), before)
    assert weights.names() == set(places)


def test_without_an_index_the_single_file_is_the_model(folder_of) -> None:
    folder = folder_of("qwen2")
    before = read(folder)
    save_file({"lora": torch.ones(1), NORM: before + 1}, folder / "adapter_model.safetensors")
    assert torch.equal(read(folder), before)


def test_an_adapter_that_would_be_left_out_is_refused(folder_of) -> None:
    folder = folder_of("qwen2")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge it into them first"):
        SafetensorsFolder(folder)


def test_shards_without_an_index_are_all_read_and_must_not_overlap(folder_of) -> None:
    folder = folder_of("qwen2")
    places = split_in_two(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert SafetensorsFolder(folder).names() == set(places)
    save_file({NORM: torch.ones(1)}, folder / "z.safetensors")
    with pytest.raises(UserError, match=r"z\.safetensors: tensor model\.norm\.weight is also in another file"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "has no weight_map"),
        ({}, "has no weight_map"),
        ([NORM], "has no weight_map"),
        ({NORM: "absent.safetensors"}, "names absent weight files: absent.safetensors"),
        ({NORM: "../m/model.safetensors"}, "is no file name"),
        ({NORM: "/etc/passwd"}, "is no file name"),
        ({NORM: 3}, "is no file name"),
        ({NORM: ".."}, "absent|is no file name"),
        ({NORM: "x" * 5000}, r"absent weight files: x{70,80}\.\.\.$"),
        ({"no.such": "model.safetensors"}, "tensor no.such is not in model.safetensors, which it names"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(folder_of, weight_map: object, message: str) -> None:
    folder = folder_of("qwen2")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        SafetensorsFolder(folder)


def test_a_pipe_with_the_name_of_weights_is_not_waited_for(folder_of) -> None:
    folder = folder_of("qwen2")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"no \*\.safetensors weights"):
        SafetensorsFolder(folder)


def test_quantised_tensors_are_refused(folder_of) -> None:
    folder = folder_of("qwen2")
    edit_weights(folder, lambda t: t.update({NORM: t[NORM].to(torch.int8)}))
    with pytest.raises(UserError, match=r"model\.norm\.weight is stored as int8; only plain weights"):
        load_model(folder)


def test_a_pointer_in_place_of_a_file_is_named_with_the_cure(folder_of) -> None:
    folder = folder_of("qwen2")
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"model\.safetensors: a pointer of Git LFS .*git lfs pull"):
        read(folder)
