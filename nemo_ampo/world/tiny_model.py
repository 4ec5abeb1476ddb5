"""A Hugging Face checkpoint small enough to train on a laptop: a tokenizer of the world's words, random weights.

The tokenizer is a byte-level BPE, so any text survives it unchanged; it is trained on the pack's texts with one merge
list long enough that every word, number, tag and heading of the world is a single plain token. The model is a Qwen2 or
Llama of a few hundred thousand random parameters. Nothing is pretrained: what the model can do later, it learned from
the pack.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nemo_ampo.errors import DataError, UserError
from nemo_ampo.files import full_or_read_only
from nemo_ampo.output.staging import publish, staged
from nemo_ampo.output.terminal import printable_output
from nemo_ampo.overrides import typed_path

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_PIECES = r"\n*<\|\w+\|>\n?|\n*[A-Z][a-z]+:\n| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"
"""A token never crosses these borders: a tag or a heading with its line breaks, a word, a number, signs, blanks."""

_MAX_VOCAB = 4096
_PACK_FILES = ("bc_train.jsonl", "rl_train.jsonl")


@dataclass(frozen=True)
class TinyModel:
    """Sizes of the model.

    Attributes:
        family: ``qwen2`` (biases on query, key, value) or ``llama`` (none; Llama 3 scaling of the rotary embedding).
        hidden, layers, heads, kv_heads, ffn: width, depth, query heads, key/value heads, MLP width.
        tied: whether the output head is the embedding.
        init_std: standard deviation of the random weights.
    """

    family: Literal["qwen2", "llama"] = "qwen2"
    hidden: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 288
    tied: bool = True
    init_std: float = 0.05


def make_tiny_checkpoint(out_dir: str | Path, pack_dir: str | Path, seed: int, model: TinyModel | None = None) -> Path:
    """Write tokenizer, configuration and random fp32 weights.

    Args:
        out_dir: folder, made if missing.
        pack_dir: what :func:`nemo_ampo.world.pack.make_pack` wrote; its training files train the tokenizer.
        seed: of the weights.
        model: sizes; the defaults are those the shipped ``tiny`` configurations were tuned with.

    Returns:
        ``out_dir``.

    Raises:
        DataError: the pack's files are missing.
        UserError: the sizes do not fit together, or another process writes there.
    """
    model = model or TinyModel()
    if model.hidden % model.heads or model.heads % model.kv_heads:
        raise UserError(
            f"hidden {model.hidden} must be a multiple of heads {model.heads}, "
            f"and heads a multiple of kv_heads {model.kv_heads}"
        )
    out = Path(out_dir)
    tokenizer = make_tokenizer(_pack_texts(Path(pack_dir)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(model, tokenizer)
    network.generation_config = GenerationConfig(
        do_sample=True,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    with staged(out, "--out") as built:
        tokenizer.save_pretrained(built)
        network.save_pretrained(built, safe_serialization=True)
        if not out.exists():
            publish(built, out)
        else:  # whatever else stands there stays
            for file in built.iterdir():
                publish(file, out / file.name)
    return out


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges go on until every piece of ``texts`` that occurs twice is one token."""
    tokenizer = _train(texts, _MAX_VOCAB)
    if tokenizer.get_vocab_size() % 128 == 0:
        # A vocabulary that needs no padding would let a wrong padding go unnoticed.
        tokenizer = _train(texts, tokenizer.get_vocab_size() - 1)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _train(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PAD, TURN_START, TURN_END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _pack_texts(pack: Path) -> list[str]:
    return [text for name in _PACK_FILES for text in _texts_of(pack / name)]


def _texts_of(path: Path) -> Iterator[str]:
    """Every text of a row as it stands in the chat template, role and line break included."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; write the pack first with python -m nemo_ampo.world --out {path.parent}")
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row: dict[str, Any] = json.loads(line)
            yield f"system\n{row['system']}"
            yield f"user\n{row['instruction']}"
            yield "assistant\n"
            yield row.get("output", "")


def _network(model: TinyModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": model.tied,
        "initializer_range": model.init_std,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": torch.float32,
    }
    if model.family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(rope_theta=1e6, rms_norm_eps=1e-6, **common))
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    return LlamaForCausalLM(LlamaConfig(rope_theta=5e5, rms_norm_eps=1e-5, rope_scaling=scaling, **common))


@printable_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Write a tiny checkpoint with random weights and a tokenizer trained on a pack."""
    defaults = TinyModel()
    parser = argparse.ArgumentParser(prog="python -m nemo_ampo.world.tiny_model", description=main.__doc__)
    parser.add_argument("--pack", required=True, help="folder written by python -m nemo_ampo.world")
    parser.add_argument("--out", type=typed_path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="of the weights (default %(default)s)")
    parser.add_argument("--family", choices=("qwen2", "llama"), default=defaults.family)
    parser.add_argument("--untied", action="store_true", help="an output head of its own")
    for name in ("hidden", "layers", "heads", "kv_heads", "ffn"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    args = parser.parse_args(argv)
    sizes = {name: getattr(args, name) for name in ("hidden", "layers", "heads", "kv_heads", "ffn")}
    model = TinyModel(family=args.family, tied=not args.untied, **sizes)
    try:
        with full_or_read_only():
            make_tiny_checkpoint(args.out, args.pack, args.seed, model)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
