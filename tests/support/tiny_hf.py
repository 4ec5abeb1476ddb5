"""Tiny random Hugging Face models with everything a real instruct folder has beside its weights."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
SIZES: dict[str, Any] = {
    "vocab_size": 515,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def write_tokenizer(folder: Path, merges: Sequence[tuple[str, str]] = ()) -> None:
    """A byte-level tokenizer (256 bytes, what ``merges`` makes of them, three special tokens) with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def split_as_qwen(folder: Path) -> None:
    """Let the tokenizer split text as Qwen's does, each digit by itself: the only way transformers 5 knows for qwen2."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.save(str(folder / "tokenizer.json"))


def make_config(family: str, tied: bool, **changes: Any) -> Any:
    """A ``transformers`` config of the tiny sizes; Llama's with a llama3 rope scaling that bites early."""
    from transformers import LlamaConfig, Qwen2Config

    sizes = SIZES | {"tie_word_embeddings": tied} | changes
    if family == "llama":
        return LlamaConfig(**({"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE} | sizes))
    return Qwen2Config(**({"rope_theta": 1000000.0} | sizes))


def write_model(
    folder: Path, family: str, tied: bool, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Save a random model, its tokenizer, generation config and a licence into ``folder``.

    Weights are larger than at the usual initialisation, biases and norms are random too, so that a weight in
    the wrong place changes the logits.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = make_config(family, tied, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.15 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, eos_token_id=[256]).save_pretrained(folder)
    (folder / "LICENSE").write_bytes(b"tiny licence\r\nwith odd line ends\n")
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a value of None removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_nemo_config(source: Path, target: Path, **changes: Any) -> Path:
    """Copy a ``.nemo`` file with other values in its ``model_config.yaml``, as if others had written it: without hashes."""
    with tarfile.open(source) as old, tarfile.open(target, "w:") as new:
        for member in old.getmembers():
            if member.name == "./hashes.json":
                continue
            content = old.extractfile(member).read() if member.isfile() else b""
            if member.name == "./model_config.yaml":
                content = yaml.safe_dump(yaml.safe_load(content) | changes).encode()
                member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return target


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Load the folder's only safetensors file, let ``edit`` change the dict, save it."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})


def as_written_by_5(folder: Path) -> Path:
    """Rewrite the configs of a folder as transformers 5 writes them: the same model, other words in other files."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = {"rope_theta": config.pop("rope_theta"), **(config.pop("rope_scaling", None) or {"rope_type": "default"})}
    config |= {"rope_parameters": rope, "dtype": config.pop("torch_dtype"), "transformers_version": "5.2.0"}
    path.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    (folder / "chat_template.jinja").write_text(tokenizer.pop("chat_template"))
    (folder / "special_tokens_map.json").unlink()
    del tokenizer["added_tokens_decoder"], tokenizer["clean_up_tokenization_spaces"]
    extra = tokenizer.pop("additional_special_tokens")
    tokenizer |= {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": extra}
    path.write_text(json.dumps(tokenizer, indent=2) + "\n")
    return folder


def split_in_two(folder: Path) -> dict[str, str]:
    """Replace ``model.safetensors`` by two files and an index; returns tensor name -> file."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {n: f"model-0000{1 + (i >= 10)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({n: tensors[n] for n in names if places[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places
