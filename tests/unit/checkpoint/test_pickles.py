"""Hostile and damaged checkpoints: what they name is refused before anything of it runs."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_ampo.checkpoint.pickles import check_pickles, check_precision, check_torch_file
from nemo_ampo.errors import UserError


class Evil:
    """Makes the file ``ran`` of the current folder when it is unpickled."""

    def __init__(self, call: Callable[..., Any] = os.mkdir, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments or ("ran",)

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def torch_bytes(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def write(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=folder)
    torch.save({"iteration": 3, "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "common_backend": "torch"}))
    return folder


HARMLESS = {
    "model.weight": torch.arange(6.0).reshape(2, 3),
    "model.half": torch.ones(3, dtype=torch.bfloat16),
    "model.layer._extra_state": io.BytesIO(),
    "model.scales._extra_state": io.BytesIO(torch_bytes({"scale": torch.ones(2), "recipe": None})),
    "model.old._extra_state": torch.frombuffer(bytearray(pickle.dumps({"scale": 1.0})), dtype=torch.uint8),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pristine") / "model_weights", HARMLESS)


@pytest.fixture
def weights(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(pristine, tmp_path / "model_weights"))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_pickles(folder)
    assert "\n" not in str(caught.value)
    assert not Path("ran").exists()


def test_what_megatron_and_torch_write_passes(weights: Path) -> None:
    check_pickles(weights)
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "more": collections.OrderedDict(a=np.float64(1.0), b={1, 2}, c=torch.device("cpu"), d=torch.float32),
    }
    torch.save(states, weights.parent / "rank.pt")
    check_torch_file(weights.parent / "rank.pt")


@pytest.mark.parametrize("protocol", range(6))
def test_metadata_that_calls_something_is_refused_by_name(weights: Path, protocol: int) -> None:
    path = weights / ".metadata"
    path.write_bytes(pickle.dumps([Evil(), pickle.loads(path.read_bytes())], protocol))
    refused(weights, r"model_weights/.metadata: names (posix|nt).mkdir, which is no data")


CALLS = [Evil(eval, "__import__('os').mkdir('ran')"), Evil(getattr, "", "join"), Evil(__import__, "os")]
CALLS += [Evil(torch.load, "x"), Evil(pickle.loads, b""), Evil(np.load, "x"), Evil(collections.namedtuple, "a", "b")]


@pytest.mark.parametrize("evil", [Evil(), *CALLS], ids=lambda evil: evil.call.__name__)
def test_common_state_that_calls_something_is_refused_by_name(weights: Path, evil: Evil) -> None:
    torch.save({"x": evil}, weights / "common.pt")
    refused(weights, rf"model_weights/common.pt: names [\w.]*{evil.call.__name__}")


def test_dotted_names_reach_nothing_behind_an_allowed_module(weights: Path) -> None:
    for module, name in (("torch.distributed.checkpoint.filesystem", "os.mkdir"), ("torch", "serialization.os.mkdir")):
        parts = (f"\x8c{chr(len(text))}{text}".encode("latin1") for text in (module, name))
        (weights / ".metadata").write_bytes(b"\x80\x04" + b"".join(parts) + b"\x93\x8c\x03ran\x85R.")
        refused(weights, re.escape(f"names {module}.{name}"))


@pytest.mark.parametrize(
    "state",
    [
        {"model.x._extra_state": Evil()},
        {"model.x._extra_state": io.BytesIO(torch_bytes(Evil()))},
        {"model.x._extra_state": io.BytesIO(pickle.dumps(Evil()))},
        {"model.x._extra_state": [io.BytesIO(torch_bytes({"deep": io.BytesIO(pickle.dumps(Evil(), 0))}))]},
        {"model.x._extra_state": {"a": torch.frombuffer(bytearray(pickle.dumps(Evil())), dtype=torch.uint8)}},
    ],
    ids=["object", "saved inside", "pickled inside", "deep inside", "bytes as a tensor"],
)
def test_objects_among_the_shards_are_looked_through(tmp_path: Path, monkeypatch, state: dict[str, Any]) -> None:
    monkeypatch.chdir(tmp_path)
    refused(write(tmp_path / "model_weights", state), r"__0_0.distcp, byte \d+: names posix.mkdir")


def test_other_formats_and_files_are_refused(weights: Path) -> None:
    (weights / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    refused(weights, "format .'zarr', 'torch'.; only torch_dist is read")
    (weights / "metadata.json").unlink()
    (weights / "modelopt_state").mkdir()
    refused(weights, "modelopt_state: not a file of Megatron's torch_dist format")
    (weights / "modelopt_state").rmdir()
    (weights / "common.pt").write_bytes(pickle.dumps({"x": 1}))
    refused(weights, "common.pt: not a file of torch.save")
    torch.jit.save(torch.jit.script(torch.nn.Identity()), weights / "common.pt")
    refused(weights, "common.pt: a TorchScript program")
    (weights / "common.pt").unlink()
    (weights / "common.pt").symlink_to("/etc/passwd")
    refused(weights, "common.pt: not a file of")


def test_shards_outside_of_the_checkpoint_are_refused(weights: Path) -> None:
    metadata = pickle.loads((weights / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere.distcp"
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(weights, "outside of the checkpoint")


def test_damage_anywhere_is_one_line_and_runs_nothing(weights: Path) -> None:
    """700 files with changed, cut or doubled bytes: a line, or a checkpoint that still is one."""
    draw = random.Random(3)
    files = {path: path.read_bytes() for path in sorted(weights.iterdir())}
    for _ in range(700):
        path = draw.choice(list(files))
        data = bytearray(files[path])
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(data))
            kind = draw.randrange(3)
            if kind == 0:
                data[at] = draw.randrange(256)
            elif kind == 1:
                del data[at : at + draw.randint(1, 40)]
            else:
                data[at:at] = draw.choice([b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", data[at : at + 40]])
            data = data or bytearray(b"\x80")
        path.write_bytes(data)
        try:
            check_pickles(weights)
        except UserError as error:
            assert "\n" not in str(error)
        path.write_bytes(files[path])
    check_pickles(weights)


def old_format(value: Any) -> bytes:
    """What ``torch.save`` wrote before it wrote archives: several pickles in a row."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def test_an_archive_behind_a_pickle_is_read_as_torch_reads_it(weights: Path) -> None:
    stream = io.BytesIO(old_format({"x": Evil()}))
    # The directory of an archive stands at its end, so that torch's reader of archives sees only harmless entries.
    with zipfile.ZipFile(io.BytesIO(torch_bytes({}))) as harmless, zipfile.ZipFile(stream, "a") as appended:
        for name in harmless.namelist():
            appended.writestr(name, harmless.read(name))
    (weights / "common.pt").write_bytes(stream.getvalue())
    refused(weights, r"common\.pt: not a file of torch\.save")


def test_every_pickle_of_a_stream_inside_of_an_object_is_looked_at(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"model.scales._extra_state": io.BytesIO(old_format({"scale": Evil()}))}
    refused(write(tmp_path / "model_weights", state), r"names posix\.mkdir")


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float64])
def test_weights_of_another_precision_are_named(tmp_path: Path, pristine: Path, kind: torch.dtype) -> None:
    check_precision(pristine, Path("good.nemo"))
    odd = write(tmp_path / "odd", HARMLESS | {"model.quantised": torch.ones(4).to(kind)})
    check_pickles(odd)
    name = str(kind).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"bad\.nemo: model\.quantised holds {name}; training starts from .* convert"):
        check_precision(odd, Path("bad.nemo"))
