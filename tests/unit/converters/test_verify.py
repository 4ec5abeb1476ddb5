"""Checks that need no NeMo, and the commands' bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_disk import small_disk
from tiny_hf import edit_json, edit_nemo_config, edit_weights

from converters import hf_to_nemo, hf_writing, nemo_stream, nemo_to_hf, verify
from converters.hf_folder import open_hf_folder
from converters.verify import shared_type
from nemo_ampo.errors import DiskError, UserError
from nemo_ampo.output.lock import hold_output
from nemo_ampo.output.staging import scratch_folder

ROOT = Path(__file__).parents[3]


def failures(hf: Path, nemo: Path) -> dict[str, str]:
    """First word of the check's name to what is wrong."""
    checks = verify.verify(hf, nemo, logits=False)
    return {c.name.split()[0]: c.worst for c in checks if not c.passed}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama-False", "qwen2-True"])
def test_an_untouched_folder_passes(jobs, hf_folder, case: str) -> None:
    family, tied = case.split("-")
    nemo = jobs.folder / f"{family}-{'tied' if tied == 'True' else 'untied'}.nemo"
    assert failures(hf_folder(family, tied == "True"), nemo) == {}


def swap_key_and_value(t: dict[str, torch.Tensor]) -> None:
    k, v = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"
    t[k], t[v] = t[v], t[k]


def zero_bias(t: dict[str, torch.Tensor]) -> None:
    t["model.layers.0.self_attn.q_proj.bias"].zero_()


def flip_last_row(t: dict[str, torch.Tensor]) -> None:
    t["model.embed_tokens.weight"][514, 63] += 2.0**-20


def put_nan(t: dict[str, torch.Tensor]) -> None:
    t["model.norm.weight"][0] = torch.nan


def swap_gate_and_up(t: dict[str, torch.Tensor]) -> None:
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    t[gate], t[up] = t[up], t[gate]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (
            swap_key_and_value,
            {"model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"},
        ),
        (zero_bias, {"model.layers.0.self_attn.q_proj.bias"}),
        (flip_last_row, {"model.embed_tokens.weight"}),
        (put_nan, {"model.norm.weight"}),
        (swap_gate_and_up, {"model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"}),
    ],
)
def test_a_changed_weight_is_named(jobs, hf_folder, capsys, edit, names: set[str]) -> None:
    folder = hf_folder("qwen2")
    edit_weights(folder, edit)
    nemo = jobs.folder / "qwen2-untied.nemo"
    assert failures(folder, nemo)["weights"] in names
    assert verify.main(["--hf", str(folder), "--nemo", str(nemo), "--no-logits"]) == 1
    out = capsys.readouterr().out
    assert any(f"parity failed: {name}: max " in out for name in names)


@pytest.mark.slow
def test_a_changed_or_absent_file_is_named(jobs, hf_folder) -> None:
    folder, nemo = hf_folder("llama"), jobs.folder / "llama-untied.nemo"
    (folder / "LICENSE").write_bytes(b"tiny licence\nwith odd line ends\n")
    assert failures(folder, nemo) == {"files": "LICENSE"}
    (folder / "LICENSE").unlink()
    assert failures(folder, nemo) == {}, "the .nemo may hold more than the folder"
    (folder / "README.md").write_text("new")
    assert failures(folder, nemo) == {"files": "README.md"}


@pytest.mark.slow
def test_torch_dtype_is_the_only_key_of_config_json_that_may_differ(jobs, hf_folder) -> None:
    folder, nemo = hf_folder("llama"), jobs.folder / "llama-untied.nemo"
    edit_json(folder / "config.json", torch_dtype="bfloat16")
    assert failures(folder, nemo) == {}
    edit_json(folder / "config.json", initializer_range=0.03)
    assert failures(folder, nemo) == {"files": "config.json"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [("rotary_base", 10000), ("layernorm_epsilon", 1e-5), ("qkv_bias", False), ("old_context_len", 8192)],
)
def test_a_changed_architecture_key_is_named(jobs, hf_folder, tmp_path: Path, key: str, value: object) -> None:
    case = "llama" if key == "old_context_len" else "qwen2"
    nemo = edit_nemo_config(jobs.folder / f"{case}-untied.nemo", tmp_path / "edited.nemo", **{key: value})
    assert failures(hf_folder(case), nemo) == {"config": key}


@pytest.mark.slow
def test_a_model_of_another_size_is_refused(jobs, hf_folder) -> None:
    with pytest.raises(UserError, match=r"missing: .*linear_qkv\.bias"):
        verify.verify(hf_folder("qwen2"), jobs.folder / "llama-untied.nemo", logits=False)
    with pytest.raises(UserError, match=r"word_embeddings\.weight: shape \[512, 64\].*\[640, 64\]"):
        verify.verify(hf_folder("llama"), jobs.folder / "llama-wide.nemo", logits=False)


def test_shared_type_is_hugging_faces_unless_nemo_is_narrower() -> None:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    assert shared_type(fp32, fp32) == fp32
    assert shared_type(fp32, bf16) == bf16
    assert shared_type(bf16, fp32) == bf16
    assert shared_type(fp16, bf16) == fp16


# --- bad input: one line, status 2, nothing written --------------------------------------------------------


def test_conversion_stops_before_nemo_is_imported(hf_folder, tmp_path: Path) -> None:
    folder, out = hf_folder("llama"), tmp_path / "out.nemo"
    edit_weights(folder, lambda t: t.update({"extra.weight": torch.ones(1)}))
    code = (
        "import sys; from converters.hf_to_nemo import main; "
        f"status = main(['--input', {str(folder)!r}, '--output', {str(out)!r}]); "
        "sys.exit(status if 'nemo' not in sys.modules else 99)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 2, process.stderr
    [line] = process.stderr.splitlines()
    assert line.startswith("error: ") and "left over: extra.weight" in line
    assert not out.exists()


def test_existing_outputs_are_not_replaced_unasked(tmp_path: Path, capsys) -> None:
    nemo, folder = tmp_path / "m.nemo", tmp_path / "out"
    nemo.write_text("precious")
    assert hf_to_nemo.main(["--input", str(tmp_path), "--output", str(nemo)]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    folder.mkdir()
    (folder / "precious").touch()
    assert nemo_to_hf.main(["--input", str(nemo), "--output", str(folder)]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert nemo.read_text() == "precious" and (folder / "precious").exists()


def test_output_name_and_absent_input(tmp_path: Path, capsys) -> None:
    assert hf_to_nemo.main(["--input", str(tmp_path), "--output", str(tmp_path / "m.ckpt")]) == 2
    assert "must end in .nemo" in capsys.readouterr().err
    assert hf_to_nemo.main(["--input", str(tmp_path / "no"), "--output", str(tmp_path / "m.nemo")]) == 2
    assert "config.json: no such file" in capsys.readouterr().err
    assert nemo_to_hf.main(["--input", str(tmp_path / "no.nemo"), "--output", str(tmp_path / "hf")]) == 2
    assert "no such .nemo file" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_output_that_another_process_makes_is_left_alone(jobs, hf_folder, tmp_path: Path, capsys) -> None:
    """Both would stage under one name, and the published file would hold tensors of two models."""
    places = {
        hf_to_nemo: (hf_folder("llama", tied=True), tmp_path / "m.nemo"),
        nemo_to_hf: (jobs.folder / "llama-tied.nemo", tmp_path / "hf"),
    }
    for converter, (source, output) in places.items():
        with hold_output(output, "--output"):
            assert converter.main(["--input", str(source), "--output", str(output), "--no-verify"]) == 2
            assert "--output: " in (said := capsys.readouterr().err) and "is in use by another job (process " in said
    assert not any(output.exists() for _, output in places.values())


@pytest.mark.slow
def test_export_replaces_a_folder_on_request(jobs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").touch()
    argv = ["--input", str(jobs.folder / "llama-tied.nemo"), "--output", str(out), "--no-verify"]
    assert nemo_to_hf.main(argv) == 2
    assert nemo_to_hf.main([*argv, "--overwrite"]) == 0
    assert (out / "model.safetensors").exists() and not (out / "old.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_large_models_are_written_in_shards(jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_writing, "MAX_SHARD_SIZE", "100KB")
    nemo_to_hf.write_hf(jobs.folder / "llama-untied.nemo", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-0*.safetensors"))) > 2
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert failures(tmp_path / "out", jobs.folder / "llama-untied.nemo") == {}


@pytest.mark.parametrize("command", ["hf_to_nemo", "nemo_to_hf", "verify"])
def test_help_imports_no_framework(command: str) -> None:
    code = (
        f"import sys; from converters import {command}\n"
        f"try: {command}.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(m in sys.modules for m in ('nemo', 'megatron', 'lightning', 'transformers')))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert "--output" in process.stdout or "--nemo" in process.stdout


def test_a_parameter_is_in_memory_only_while_its_module_computes() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 4) for _ in range(3)]
    weights = {
        f"{i}.{name}": value.detach().clone() for i, layer in enumerate(layers) for name, value in layer.named_parameters()
    }
    model = torch.nn.Sequential(*layers)
    rows = torch.randn(2, 4)
    with torch.no_grad():
        expected = model(rows)
        held = []

        def load(name: str) -> torch.Tensor:
            held.append([n for n, p in model.named_parameters() if p.numel()])
            return weights[name].clone()

        verify.fill_on_demand(model, load, kept=["0.bias"])
        assert torch.equal(model(rows), expected)
    assert [sorted({n.split(".")[0] for n in names} - {"0"}) for names in held] == [[], [], [], ["1"], [], ["2"]]
    assert [n for n, p in model.named_parameters() if p.numel()] == ["0.bias"]


def test_a_disk_that_fills_up_is_named_by_what_is_written(hf_folder, tmp_path: Path) -> None:
    """Larger than what was asked for beforehand, as when others write there too."""
    source = hf_folder("llama", tied=True)
    hf_to_nemo.write_nemo(source, tmp_path / "m.nemo")
    with small_disk(tmp_path / "disk", 128) as disk:
        with pytest.raises(DiskError, match=r"cannot write .*/disk/out: No space left"):
            nemo_to_hf.write_hf(tmp_path / "m.nemo", disk.path / "out")
        (disk.path / "out" / "model.safetensors").unlink()
        hf = open_hf_folder(source)
        tensors = ((binding, binding.to_nemo(hf.weights.load, hf.facts)) for binding in hf.bindings())
        with pytest.raises(DiskError, match="/disk: No space left"), scratch_folder(disk.path, "m.nemo") as folder:
            nemo_stream.write_tar(folder / "m.nemo", {}, tensors, hf.facts)
