"""The tiny checkpoint: Transformers loads it untouched, and its tokenizer keeps every text and stays brief."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from nemo_ampo.data.bc import check_tokenizer, encode_bc_rows, read_bc_rows
from nemo_ampo.errors import DataError, UserError
from nemo_ampo.reply.grammar import BEGIN_ANSWER, BEGIN_THINKING, END_ANSWER, END_THINKING
from nemo_ampo.reply.modes import MODES
from nemo_ampo.world.pack import make_pack
from nemo_ampo.world.tiny_model import TinyModel, make_tiny_checkpoint


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    make_pack(out, 1, 2000, 200, 50)
    return out


@pytest.fixture(scope="module")
def checkpoint(pack: Path) -> Path:
    return make_tiny_checkpoint(pack / "qwen2", pack, 1)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(checkpoint)


def test_the_vocabulary_is_small_and_needs_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    assert 500 <= len(tokenizer) <= 1000 and len(tokenizer) % 128


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    @given(st.text(st.characters(exclude_categories=("Cs",))))
    def round_trip(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text

    round_trip()


def test_gold_replies_survive_without_special_tokens(pack: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for row in read_bc_rows(pack / "bc_heldout.jsonl"):
        ids = tokenizer.encode(row.output, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == row.output


def test_tags_headings_and_numbers_are_single_plain_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = [f"\n{BEGIN_THINKING}\n", f"\n{END_THINKING}\n", f"{BEGIN_ANSWER}\n", f"\n{END_ANSWER}"]
    pieces += [f"\n\n{section}:\n" for section in MODES[4].sections[1:]] + [f" {n}" for n in range(5, 18)]
    for piece in pieces:
        (token_id,) = tokenizer.encode(piece, add_special_tokens=False)
        assert token_id not in tokenizer.all_special_ids


def test_the_chat_template_writes_chatml(tokenizer: PreTrainedTokenizerFast) -> None:
    check_tokenizer(tokenizer)
    messages = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant")]
    assert tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nSYSTEM<|im_end|>\n<|im_start|>user\nUSER<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False).endswith("assistant\nASSISTANT<|im_end|>\n")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_prompts_are_short_and_deeper_modes_are_longer(pack: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = read_bc_rows(pack / "bc_train.jsonl")
    examples = encode_bc_rows(rows, tokenizer, 256).examples
    assert max(e.prompt_len for e in examples) <= 110
    lengths = {mode: [len(e.tokens) - e.prompt_len for e in examples if e.mode == mode] for mode in MODES}
    means = [sum(lengths[mode]) / len(lengths[mode]) for mode in MODES]
    assert means == sorted(means) and means[3] > means[2] + 5
    assert max(lengths[1]) <= 20 and max(lengths[4]) <= 110


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_every_shape_and_it_runs(pack: Path, tmp_path: Path, family: str, tied: bool) -> None:
    make_tiny_checkpoint(tmp_path, pack, 1, TinyModel(family=family, tied=tied))  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.model_type == family and model.dtype == torch.float32
    assert model.config.max_position_embeddings >= 2048
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) == tied
    names = [name for name, _ in model.named_parameters()]
    assert any(name.endswith("q_proj.bias") for name in names) == (family == "qwen2")
    assert (model.config.rope_scaling is not None) == (family == "llama")
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(40)[None]).logits).all()


def test_generation_stops_at_the_end_of_turn(checkpoint: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = GenerationConfig.from_pretrained(checkpoint)
    assert config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]


def test_equal_seeds_give_equal_files_and_leave_the_callers_randomness_alone(pack: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        make_tiny_checkpoint(tmp_path / name, pack, seed)
    assert torch.equal(torch.rand(3), expected)
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "c")]
    assert weights[0] != weights[1]


def test_sizes_that_do_not_fit_are_refused(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of heads 5"):
        make_tiny_checkpoint(tmp_path, pack, 1, TinyModel(heads=5))


def test_a_missing_pack_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bc_train\.jsonl: no such file.*python -m nemo_ampo\.world"):
        make_tiny_checkpoint(tmp_path, tmp_path, 1)
