"""The three commands on whole models; what they printed comes from one process (see ``converter_jobs.py``)."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
from converter_jobs import CASES

from converters import hf_to_nemo
from converters.nemo_weights import PREFIX, open_weights
from nemo_ampo.checkpoint.nemo_file import read_model_config, unpack_assets, unpack_weights

pytestmark = pytest.mark.slow


def non_weights(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.suffix != ".safetensors"}


@pytest.mark.parametrize("direction", ["convert", "export"])
@pytest.mark.parametrize("case", CASES)
def test_parity_is_checked_by_default_and_holds(jobs, direction: str, case: str) -> None:
    outcome = jobs.outcomes[f"{direction} {case}"]
    assert outcome.status == 0, outcome
    lines = outcome.out.splitlines()
    assert [re.split(r"\s{2,}", line)[1].strip() for line in lines[:5]] == ["ok"] * 5, outcome.out
    assert lines[3].startswith("logits, 32 tokens") and lines[4].startswith("logits, 512 tokens")


@pytest.mark.parametrize("case", CASES)
def test_round_trip_gives_the_same_weight_file_and_the_same_other_files(jobs, case: str) -> None:
    there, back = jobs.folder / case, jobs.folder / f"{case}-back"
    # save_pretrained sorts and names as we do, so that equal tensors make an equal file.
    assert (there / "model.safetensors").read_bytes() == (back / "model.safetensors").read_bytes()
    assert non_weights(there) == non_weights(back)
    assert {"LICENSE", "tokenizer.json", "generation_config.json"} <= set(non_weights(back))
    assert len({path.stat().st_mode for path in back.iterdir()}) == 1, "who may read one file may read all"


def test_packed_files_are_those_of_the_folder(jobs, tmp_path: Path) -> None:
    unpacked = unpack_assets(jobs.folder / "qwen2-tied.nemo", tmp_path)
    assert non_weights(unpacked) == non_weights(jobs.folder / "qwen2-tied")


@pytest.mark.parametrize("case", ["llama-untied", "qwen2-tied"])
def test_the_export_loads_untouched_in_transformers(jobs, case: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = jobs.folder / f"{case}-back"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    prompt = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model(prompt).logits.shape == (1, prompt.shape[1], 515)


def test_stored_type_follows_the_folder(jobs) -> None:
    # 2 bytes a weight and not 4: the tied bf16 model against its fp32 twin.
    half, full = (jobs.folder / f"{case}.nemo" for case in ("qwen2-bf16", "qwen2-tied"))
    assert half.stat().st_size < 0.65 * full.stat().st_size


def test_stored_config_is_neutral_about_precision_and_layout(jobs) -> None:
    config = read_model_config(jobs.folder / "qwen2-bf16.nemo")
    assert "precision" not in config and config["megatron_amp_O2"] is False
    assert config["tensor_model_parallel_size"] == config["pipeline_model_parallel_size"] == 1
    assert config["target"].endswith("MegatronGPTModel")


def test_a_mapping_wrong_in_both_directions_fails_on_the_logits_alone(jobs) -> None:
    outcome = jobs.outcomes["swapped"]
    assert outcome.status == 1
    assert "bitwise equal" in outcome.out.splitlines()[0]
    assert "parity failed: model.layers.0 (output)" in outcome.out
    assert "swapped.nemo was not written" in outcome.err
    assert not (jobs.folder / "swapped.nemo").exists()


@pytest.mark.parametrize(("job", "key"), [("rope base", "rotary_base"), ("rope scaling", "scale_positional_embedding")])
def test_wrong_rotary_settings_fail_by_name_and_in_the_logits(jobs, job: str, key: str) -> None:
    outcome = jobs.outcomes[job]
    assert outcome.status == 1
    assert f"parity failed: {key}: " in outcome.out
    assert "parity failed: model.layers.0 (output)" in outcome.out


def test_a_folder_of_transformers_5_is_converted_as_written_and_exported_for_every_reader(jobs) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for job in ("convert newer", "export newer", "original newer"):
        assert jobs.outcomes[job].status == 0, jobs.outcomes[job]
    config = read_model_config(jobs.folder / "newer.nemo")
    assert (config["rotary_base"], config["scale_factor"], config["old_context_len"]) == (500000, 8.0, 256)
    back = jobs.folder / "newer-back"
    written = json.loads((back / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 500000.0
    assert written["torch_dtype"] == written["dtype"] == "float32"
    # The same seed, written by transformers 4: what a reader that knows only the older spelling must compute.
    ids = torch.arange(500)[None]
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (jobs.folder / "llama-untied", back)]
    assert torch.equal(*[model(ids).logits for model in models])
    tokenizer = AutoTokenizer.from_pretrained(back)
    assert tokenizer.chat_template and tokenizer.additional_special_tokens == ["<|im_start|>"]
    packed = unpack_assets(jobs.folder / "newer.nemo", back.with_name("newer-assets"))
    assert non_weights(packed).items() <= non_weights(jobs.folder / "newer").items()


def test_other_llama3_factors_are_passed_on(jobs) -> None:
    assert jobs.outcomes["other factors"].status == 0, jobs.outcomes["other factors"]
    config = read_model_config(jobs.folder / "llama-factors.nemo")
    assert (config["scale_factor"], config["low_freq_factor"], config["old_context_len"]) == (32.0, 2.0, 512)


def test_narrowing_on_request_is_compared_after_rounding_and_said(jobs) -> None:
    for job in ("narrow", "export narrow"):
        outcome = jobs.outcomes[job]
        assert outcome.status == 0, outcome
        assert "compared in bfloat16" in outcome.out.splitlines()[0]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(jobs.folder / "narrow-back", torch_dtype="auto")
    assert model.dtype == torch.bfloat16


def test_nothing_is_left_beside_the_outputs(jobs) -> None:
    assert [p.name for p in jobs.folder.iterdir() if p.name.startswith(".")] == []


def test_torch_s_own_reader_reads_what_the_stream_wrote(hf_folder, tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader, load_state_dict

    folder = hf_folder("qwen2")
    hf_to_nemo.write_nemo(folder, tmp_path / "m.nemo")
    unpacked = unpack_weights(tmp_path / "m.nemo", tmp_path / "unpacked") / "model_weights"
    stored = FileSystemReader(unpacked).read_metadata().state_dict_metadata
    sizes = {key: meta.size for key, meta in stored.items() if "_extra_state" not in key}
    read = {key: torch.full(size, torch.nan) for key, size in sizes.items()}
    load_state_dict(read, storage_reader=FileSystemReader(unpacked), no_dist=True)
    with open_weights(tmp_path / "m.nemo") as ours:
        for key, tensor in read.items():
            assert torch.equal(ours.load(key.removeprefix(PREFIX)), tensor), key
    for key in stored.keys() - read.keys():
        state = {key: io.BytesIO()}
        load_state_dict(state, storage_reader=FileSystemReader(unpacked), no_dist=True)
        assert state[key] == [None], "as Megatron's local layers leave it"
