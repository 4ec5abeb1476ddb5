from __future__ import annotations

import os
import re
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_ampo.checkpoint.nemo_file import (
    check_unpacked,
    content_hash,
    load_overrides,
    read_model_config,
    tokenizer_config,
    unpack_assets,
    unpack_weights,
)
from nemo_ampo.checkpoint.nemo_writing import add_assets, pack_nemo, save_nemo
from nemo_ampo.errors import DiskError, UserError

ODD_BYTES = b'{"model_type": "llama"}\r\n\x00\xff'


class Savable:
    """Stands for a NeMo model: ``save_to`` packs as NeMo does, in a temporary folder, or dies on the way."""

    def __init__(self, content: bytes, dies: bool = False) -> None:
        self.content, self.dies = content, dies
        self.cfg: dict[str, Any] = {}

    def parameters(self) -> list[Any]:
        return []

    def save_to(self, path: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.packed_in = Path(folder)
            (Path(folder) / "model_config.yaml").write_text(yaml.safe_dump({"mcore_gpt": True}))
            (Path(folder) / "model_weights").mkdir()
            (Path(folder) / "model_weights" / "__0_0.distcp").write_bytes(self.content)
            if self.dies:
                raise RuntimeError("the node went away")
            with tarfile.open(path, "w:") as tar:
                tar.add(folder, arcname=".")


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    (folder / "original").mkdir(parents=True)
    (folder / "config.json").write_bytes(ODD_BYTES)
    (folder / "original" / "params.json").write_text("{}")
    (folder / ".unpack-x").write_text("left by a killed process")
    return folder


def plain_nemo(path: Path) -> Path:
    Savable(b"weights").save_to(str(path))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("atomic", [True, False])
def test_assets_come_back_byte_for_byte(tmp_path: Path, assets: Path, atomic: bool) -> None:
    nemo = plain_nemo(tmp_path / "m.nemo")
    add_assets(nemo, assets, atomic=atomic)
    out = unpack_assets(nemo, tmp_path / "out")
    assert content(out) == {"config.json": ODD_BYTES, "original/params.json": b"{}"}
    assert read_model_config(nemo) == {"mcore_gpt": True}
    weights = unpack_weights(nemo, tmp_path / "weights")
    assert content(weights)["model_weights/__0_0.distcp"] == b"weights"
    assert set(content(weights)) == {"model_weights/__0_0.distcp", "model_config.yaml"}


def test_an_unpacked_file_is_read_like_the_file(tmp_path: Path, assets: Path) -> None:
    nemo, folder = plain_nemo(tmp_path / "m.nemo"), tmp_path / "unpacked"
    add_assets(nemo, assets)
    with tarfile.open(nemo) as archive:
        archive.extractall(folder, filter="data")
    before = content(folder)
    for source in (nemo, folder):
        assert read_model_config(source) == {"mcore_gpt": True}
        assert content(unpack_assets(source, tmp_path / f"assets-{source.name}")) == {
            "config.json": ODD_BYTES,
            "original/params.json": b"{}",
        }
        assert (
            content(unpack_weights(source, tmp_path / f"weights-{source.name}"))["model_weights/__0_0.distcp"] == b"weights"
        )
    check_unpacked(folder)
    assert content(folder) == before


@pytest.mark.parametrize("name", ["model_weights/__0_0.distcp", "hf_assets/config.json", "model_config.yaml"])
def test_damage_of_an_unpacked_file_is_named(tmp_path: Path, assets: Path, name: str) -> None:
    nemo, folder = plain_nemo(tmp_path / "m.nemo"), tmp_path / "unpacked"
    add_assets(nemo, assets)
    with tarfile.open(nemo) as archive:
        archive.extractall(folder, filter="data")
    whole = content_hash(folder)
    (folder / name).write_text("mcore_gpt: false")
    with pytest.raises(UserError, match=f"{re.escape(str(folder))}: {name} is damaged"):
        read_model_config(folder)
        unpack_assets(folder, tmp_path / "assets")
        check_unpacked(folder)
    assert content_hash(folder) == whole, "its list of hashes says what it should be"
    (folder / "hashes.json").unlink()
    check_unpacked(folder)  # of others, who wrote none
    assert content_hash(folder) != whole
    other = content_hash(folder)
    (folder / name).write_text("mcore_gpt: true")
    assert content_hash(folder) != other


def test_a_folder_that_is_something_else_is_refused(tmp_path: Path, assets: Path) -> None:
    with pytest.raises(UserError, match=r"hf: not a .nemo file \(no model_config.yaml in it\); a Hugging Face .*hf_to_nemo"):
        read_model_config(assets)
    with pytest.raises(UserError, match="has no model_weights/ folder"):
        check_unpacked(assets)


@pytest.mark.parametrize("atomic", [True, False])
def test_adding_again_replaces_all_of_them(tmp_path: Path, assets: Path, atomic: bool) -> None:
    nemo = plain_nemo(tmp_path / "m.nemo")
    add_assets(nemo, assets)
    (assets / "config.json").write_text("{}")
    (assets / "original" / "params.json").unlink()
    (assets / "system_prompt.txt").write_text("You are")
    add_assets(nemo, assets, atomic=atomic)
    assert content(unpack_assets(nemo, tmp_path / "out")) == {
        "config.json": b"{}",
        "system_prompt.txt": b"You are",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "m.nemo", "out"]


def test_packing_is_reproducible_and_anonymous(tmp_path: Path, assets: Path) -> None:
    nemo = plain_nemo(tmp_path / "m.nemo")
    os.utime(assets / "config.json", (1, 1))
    add_assets(nemo, assets)
    with tarfile.open(nemo) as tar:
        member = tar.getmember("./hf_assets/config.json")
    assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644)


def test_unpacking_twice_into_one_folder_is_harmless(tmp_path: Path, assets: Path) -> None:
    nemo = plain_nemo(tmp_path / "m.nemo")
    add_assets(nemo, assets)
    first = content(unpack_assets(nemo, tmp_path / "out"))
    assert content(unpack_assets(nemo, tmp_path / "out")) == first


def test_symbolic_links_of_a_download_cache_are_followed(tmp_path: Path, assets: Path) -> None:
    (tmp_path / "blob").write_text("merges")
    (assets / "merges.txt").symlink_to(tmp_path / "blob")
    nemo = plain_nemo(tmp_path / "m.nemo")
    add_assets(nemo, assets)
    assert content(unpack_assets(nemo, tmp_path / "out"))["merges.txt"] == b"merges"


def test_save_publishes_by_rename_and_packs_beside_the_target(tmp_path: Path, assets: Path) -> None:
    model = Savable(b"new")
    save_nemo(model, tmp_path / "run" / "policy.nemo", assets)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["policy.nemo"]
    assert model.packed_in.is_relative_to(tmp_path / "run")
    assert tempfile.tempdir is None or not Path(tempfile.tempdir).is_relative_to(tmp_path / "run")
    assert content(unpack_assets(tmp_path / "run" / "policy.nemo", tmp_path / "o"))["config.json"] == ODD_BYTES


def test_a_save_that_dies_leaves_the_old_file_and_does_not_block_the_next(tmp_path: Path, assets: Path) -> None:
    nemo = tmp_path / "policy.nemo"
    save_nemo(Savable(b"old"), nemo, assets)
    with pytest.raises(RuntimeError, match="went away"):
        save_nemo(Savable(b"torn", dies=True), nemo, assets)
    assert content(unpack_weights(nemo, tmp_path / "a"))["model_weights/__0_0.distcp"] == b"old"
    save_nemo(Savable(b"new"), nemo, assets)
    assert content(unpack_weights(nemo, tmp_path / "b"))["model_weights/__0_0.distcp"] == b"new"


def test_overrides_point_at_the_unpacked_tokenizer_and_pick_the_layers(tmp_path: Path, assets: Path) -> None:
    nemo = plain_nemo(tmp_path / "m.nemo")
    overrides = load_overrides(nemo, assets)
    assert overrides["tokenizer"]["library"] == "huggingface" and overrides["tokenizer"]["use_fast"] is True
    assert overrides["tokenizer"]["type"] == str(assets)
    assert overrides["transformer_engine"] is False
    assert load_overrides(nemo, assets, device="gpu")["transformer_engine"] is True


def test_bad_files_are_named(tmp_path: Path, assets: Path) -> None:
    nemo = plain_nemo(tmp_path / "m.nemo")
    with pytest.raises(UserError, match=r"m\.nemo: has no hf_assets/"):
        unpack_assets(nemo, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"no\.nemo: no such \.nemo file"):
        read_model_config(tmp_path / "no.nemo")
    with pytest.raises(UserError, match=r"no config\.json"):
        add_assets(nemo, tmp_path / "empty")
    with pytest.raises(UserError, match=r"no config\.json"):
        save_nemo(Savable(b""), tmp_path / "x.nemo", tmp_path / "empty")
    with pytest.raises(UserError, match=r"no config\.json; unpack"):
        load_overrides(nemo, tmp_path / "empty")
    torn = tmp_path / "torn.nemo"
    torn.write_bytes(nemo.read_bytes()[:700])
    with pytest.raises(UserError, match=r"torn\.nemo: not a complete \.nemo file"):
        read_model_config(torn)
    (tmp_path / "text.nemo").write_text("no tar at all")
    with pytest.raises(UserError, match=r"text\.nemo: not a complete"):
        read_model_config(tmp_path / "text.nemo")


def test_members_that_would_leave_the_folder_are_refused(tmp_path: Path, assets: Path) -> None:
    evil = tmp_path / "evil.nemo"
    with tarfile.open(evil, "w:") as tar:
        tar.add(assets / "config.json", arcname="hf_assets/../../outside")
    with pytest.raises(UserError, match="unsafe member name"):
        unpack_assets(evil, tmp_path / "out")
    assert not (tmp_path / "outside").exists()


def test_an_unpacked_file_packs_to_the_same_content(tmp_path: Path, assets: Path) -> None:
    nemo = plain_nemo(tmp_path / "m.nemo")
    unpacked = unpack_weights(nemo, tmp_path / "checkpoint")
    pack_nemo(unpacked, tmp_path / "new" / "packed.nemo", assets)
    assert content(unpack_weights(tmp_path / "new" / "packed.nemo", tmp_path / "again")) == content(unpacked)
    assert content(unpack_assets(tmp_path / "new" / "packed.nemo", tmp_path / "hf_again"))["config.json"] == ODD_BYTES
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["packed.nemo"]
    with pytest.raises(UserError, match=r"hf: has no model_config\.yaml"):
        pack_nemo(assets, tmp_path / "x.nemo", assets)
    assert not (tmp_path / "x.nemo").exists()


def test_links_devices_and_members_that_occur_twice_are_refused(tmp_path: Path, assets: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        evil = plain_nemo(tmp_path / "evil.nemo")
        with tarfile.open(evil, "a:") as tar:
            member = tarfile.TarInfo("hf_assets/config.json")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        with pytest.raises(UserError, match=r"evil\.nemo: 'hf_assets/config\.json' is a link or a device"):
            unpack_assets(evil, tmp_path / "out")
    twice = plain_nemo(tmp_path / "twice.nemo")
    with tarfile.open(twice, "a:") as tar:
        tar.add(assets / "config.json", arcname="model_config.yaml")
    with pytest.raises(UserError, match=r"twice\.nemo: 'model_config\.yaml' is in it twice"):
        read_model_config(twice)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x:\n  _target_: os.system\n  _args_: [ls]\n", r"x\._target_: would be executed"),
        ("_target_: os.system\n", "_target_: would be executed"),
        ("optim:\n- name: adam\n- {cls: os.system}\n", r"optim\.1\.cls: would be executed"),
        ("target: os.system\n", r"target os\.system: expected a GPT model"),
        ("target: nemo.collections.nlp.models.language_modeling.x.Y\nparams: {}\n", "params: would be executed"),
        ("a: ${oc.env:HOME}\n", "a: reads the environment"),
        ("a: !!python/object/apply:os.system [ls]\n", "not YAML of plain values"),
        ("[" * 5000, "not YAML of plain values"),
        ("- 1\n", "expected keys and values"),
        ("a: \x00", "not YAML of plain values"),
    ],
)
def test_a_config_that_would_be_executed_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "evil.nemo"
    (tmp_path / "config").write_text(text)
    with tarfile.open(path, "w:") as tar:
        tar.add(tmp_path / "config", arcname="./model_config.yaml")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: model_config\.yaml: .*{told}") as caught:
        read_model_config(path)
    assert "\n" not in str(caught.value)


def test_a_changed_byte_of_any_member_is_found_where_it_is_read(tmp_path: Path, assets: Path) -> None:
    nemo = tmp_path / "m.nemo"
    save_nemo(Savable(b"weights"), nemo, assets)
    with tarfile.open(nemo) as tar:
        places = {m.name: (m.offset_data, m.size) for m in tar.getmembers() if m.isfile() and m.size}
    assert len(places) == 5
    for name, (offset, size) in places.items():
        data = bytearray(nemo.read_bytes())
        data[offset + size // 2] ^= 1
        (tmp_path / "bad.nemo").write_bytes(data)
        with pytest.raises(UserError, match=r"damaged|not YAML") as caught:
            for read in (unpack_weights, unpack_assets):
                read(tmp_path / "bad.nemo", tmp_path / "out")
        assert name == "./hashes.json" or Path(name).name in str(caught.value)
    with pytest.raises(UserError, match=r"model_config\.yaml is damaged"):
        data = bytearray(nemo.read_bytes())
        data[places["./model_config.yaml"][0]] ^= 1
        (tmp_path / "bad.nemo").write_bytes(data)
        read_model_config(tmp_path / "bad.nemo")


def test_a_disk_that_is_full_while_unpacking_is_one_line(tmp_path: Path, assets: Path) -> None:
    nemo = plain_nemo(tmp_path / "m.nemo")
    add_assets(nemo, assets)
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"m\.nemo: cannot unpack in .*file: "):
        unpack_assets(nemo, tmp_path / "file")


@pytest.mark.parametrize("name", ["plain", "mödel ${x} #=~'\"", "${oc.env:HOME}", "\\${x}"])
def test_any_folder_can_hold_the_tokenizer(tmp_path: Path, name: str) -> None:
    from omegaconf import OmegaConf

    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").touch()
    # NeMo resolves a config more than once.
    config: Any = {"tokenizer": tokenizer_config(folder)}
    for _ in range(3):
        config = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    assert Path(config["tokenizer"]["type"], "config.json").samefile(folder / "config.json")


@pytest.mark.parametrize(
    "target",
    [
        "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
        "nemo_aligner.models.nlp.gpt.gpt_sft_model.GPTSFTModel",
        "nemo_ampo.training.actor.AmpoActor",
        "nemo_ampo.training.bc_model.BcModel",
    ],
)
def test_what_converters_and_stages_write_is_read(tmp_path: Path, target: str) -> None:
    (tmp_path / "config").write_text(yaml.safe_dump({"target": target, "a": "${b}", "b": 1}))
    with tarfile.open(tmp_path / "ours.nemo", "w:") as tar:
        tar.add(tmp_path / "config", arcname="./model_config.yaml")
    assert read_model_config(tmp_path / "ours.nemo")["target"] == target
