"""transformers' objects made from a folder: what they compute is what the files say."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_hf import edit_json, edit_weights

from nemo_ampo.errors import UserError
from nemo_ampo.model_folder.facts import read_facts
from nemo_ampo.model_folder.loading import check_as_written, load_model, load_tokenizer, third_party

IDS = torch.arange(0, 500)[None]
TEXT = "Guten Tag, <|im_start|>it's 1,234 o'clock\r\n"


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, torch.float32)(IDS).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_both_spellings_compute_what_transformers_computes_of_the_one_it_knows(folder_of, family: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    folder = folder_of(family, tied)
    expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    assert torch.equal(logits(folder), expected)
    assert torch.equal(logits(folder_of(family, tied, newer=True)), expected)


def test_the_type_is_the_files_unless_another_is_asked_for(folder_of) -> None:
    folder = folder_of("llama", newer=True)
    assert load_model(folder).dtype == torch.float32
    assert load_model(folder, "bfloat16").dtype == torch.bfloat16
    edit_json(folder / "config.json", dtype="float16")
    assert load_model(folder).dtype == torch.float16
    edit_json(folder / "config.json", dtype=None)
    assert load_model(folder).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_nothing_of_the_generation_config_comes_along(folder_of) -> None:
    folder = folder_of("qwen2")
    edit_json(folder / "generation_config.json", repetition_penalty=3.0, top_k=1)
    model = load_model(folder)
    assert model.generation_config.repetition_penalty == 1.0 and model.generation_config.top_k == 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "asks for 3 layers, the weights hold 2"),
        ({"num_hidden_layers": 10**9}, "asks for 1000000000 layers"),
        ({"vocab_size": 10**9}, r"the files hold \[515, 64\], config.json asks for \[1000000000, 64\]"),
        ({"intermediate_size": 95}, "config.json asks for .*95"),
        ({"num_key_value_heads": 4}, r"k_proj.weight: the files hold \[32, 64\], config.json asks for \[64, 64\]"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from the embedding"),
        ({"model_type": "qwen2", "architectures": None}, "k_proj.bias: the files hold nothing"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(folder_of, changes: dict, message: str) -> None:
    folder = folder_of("llama")
    edit_json(folder / "config.json", attention_bias=None, mlp_bias=None, **changes)
    with pytest.raises(UserError, match=message):
        load_model(folder)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (-float("inf"), "float32"), (1e6, "float16")])
def test_a_weight_that_is_no_number_is_named(folder_of, value: float, dtype: str) -> None:
    """A training that came apart leaves such; so does a type too narrow for a stored value."""
    folder = folder_of("qwen2")
    edit_weights(folder, lambda t: t["model.norm.weight"].__setitem__(3, value))
    edit_json(folder / "config.json", torch_dtype=dtype)
    with pytest.raises(UserError, match=rf"weight model\.norm\.weight holds .* no finite number as {dtype}"):
        load_model(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder_of) -> None:
    folder = folder_of("qwen2")
    edit_json(folder / "config.json", vocab_size=258)
    with pytest.raises(UserError, match="the tokenizer has 259 ids but the model's embedding only 258 rows"):
        load_tokenizer(folder)


def test_a_missing_weight_is_never_made_up(folder_of) -> None:
    folder = folder_of("llama")
    edit_weights(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"weight lm_head\.weight: the files hold nothing"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rope_base": 10000.0}, "rotary frequencies"),
        ({"rope_scaling": None}, "rotary frequencies"),
        ({"norm_eps": 1e-5}, "rms_norm_eps"),
        ({"tied": True}, "tie_word_embeddings"),
        ({"qkv_bias": True}, "attention biases"),
        ({"num_groups": 4}, "num_key_value_heads"),
    ],
)
def test_a_transformers_that_computes_something_else_is_caught(folder_of, change: dict, what: str) -> None:
    folder = folder_of("llama")
    model, facts = load_model(folder), read_facts(folder)
    check_as_written(model, facts, folder)
    with pytest.raises(UserError, match=f"computes {what} otherwise than config.json says"):
        check_as_written(model, replace(facts, **change), folder)


@pytest.mark.parametrize("newer", [False, True])
def test_a_tokenizer_gives_the_ids_of_its_file(folder_of, newer: bool) -> None:
    from tokenizers import Tokenizer

    folder = folder_of("llama", newer=newer)
    tokenizer = load_tokenizer(folder)
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(TEXT, add_special_tokens=False) == written.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode("a . b", add_special_tokens=False)) == "a . b"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.additional_special_tokens == ["<|im_start|>"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_file_wins_over_the_config_and_is_read_as_utf_8(folder_of) -> None:
    folder = folder_of("llama")
    (folder / "chat_template.jinja").write_text("Grüße {{ messages[0]['content'] }}", encoding="utf-8")
    assert load_tokenizer(folder).chat_template.startswith("Grüße")


def test_a_folder_of_transformers_5_without_tokenizer_json_says_so(folder_of) -> None:
    folder = folder_of("llama", newer=True)
    shutil.move(folder / "tokenizer.json", folder / "vocab.json")
    with pytest.raises(UserError, match=r"is of transformers 5, which needs a tokenizer\.json"):
        load_tokenizer(folder)


def test_a_token_the_file_does_not_have_is_refused(folder_of) -> None:
    folder = folder_of("llama", newer=True)
    edit_json(folder / "tokenizer_config.json", eos_token="<|nowhere|>")
    with pytest.raises(UserError, match=r"lacks or numbers otherwise .*<\|nowhere\|>"):
        load_tokenizer(folder)


def test_special_tokens_named_twice_must_agree(folder_of) -> None:
    folder = folder_of("llama", newer=True)
    edit_json(folder / "tokenizer_config.json", additional_special_tokens=["<|im_end|>"])
    with pytest.raises(UserError, match="contradict each other"):
        load_tokenizer(folder)


def test_damage_of_any_kind_is_one_line(folder_of) -> None:
    folder = folder_of("llama")
    for content in (b"", b"{", b"[]", b'{"model": 3}', (folder / "tokenizer.json").read_bytes()[:-40], b"\xff" * 99):
        (folder / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer") as refusal:
            load_tokenizer(folder)
        assert "\n" not in str(refusal.value)


def test_only_a_wish_to_stop_passes_unchanged() -> None:
    class PanicException(BaseException):
        """As a library in Rust raises it."""

    for error in (PanicException("index\nout of range"), RecursionError(), MemoryError(), KeyError("x")):
        with pytest.raises(UserError, match=type(error).__name__) as refusal, third_party("DIR: cannot be loaded", "try"):
            raise error
        assert "\n" not in str(refusal.value) and str(refusal.value).endswith("; try")
    with pytest.raises(KeyboardInterrupt), third_party("x"):
        raise KeyboardInterrupt
