"""What config.json says about the arithmetic of a model, in either spelling. No torch, no transformers.

transformers 4 writes ``rope_theta``, ``rope_scaling`` and ``torch_dtype``; transformers 5 writes ``rope_parameters`` and
``dtype``. A file may have both if they agree. A key that is absent takes the default of the file format, which every reader
shares: ``num_key_value_heads`` the number of heads (Llama only), ``head_dim`` the quotient, ``hidden_act`` silu,
``rms_norm_eps`` 1e-6, a rotary base of 10,000, ``tie_word_embeddings`` false, ``initializer_range`` 0.02. A key nobody here
knows may change the arithmetic, so it is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ampo.errors import UserError
from nemo_ampo.files import look_alike, read_text, strict_json
from nemo_ampo.text import one_line

CONFIG_NAME = "config.json"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""Supported ``model_type`` -> the architecture that may stand beside it."""
DTYPES = ("float32", "bfloat16", "float16")
TRANSFORMERS_4_ONLY = ("rope_theta", "rope_scaling", "torch_dtype")
TRANSFORMERS_5_ONLY = ("rope_parameters", "dtype")

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_FACTS = frozenset(  # names as text: a column of seventy strings would be harder to read
    """model_type architectures num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads
    head_dim vocab_size max_position_embeddings rms_norm_eps hidden_act tie_word_embeddings
    initializer_range""".split()  # noqa: SIM905
)
_NULLABLE = {"architectures", "head_dim", "num_key_value_heads", "tie_word_embeddings"}
"""Facts that every reader takes the default for when they are null."""
_OFF: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "use_bfloat16": (False,),
    "pruned_heads": ({},),
    "is_llama_config": (True,),
    "use_mrope": (False,),
}
"""Keys that change the arithmetic unless they hold one of these values or null."""
_CURES = {
    "use_sliding_window": "; set it to false for prompts that fit",
    "attention_bias": "; Llama 3.x has no biases",
    "mlp_bias": "; Llama 3.x has no biases",
    "quantization_config": "; only unquantised weights can be trained or converted",
    "auto_map": "; code that comes with a model is never run",
}
_HARMLESS = frozenset(
    """_attn_implementation _attn_implementation_autoset _commit_hash _from_model_config _name_or_path attention_dropout
    attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label label2id length_penalty
    max_length max_new_tokens max_window_layers min_length name_or_path no_repeat_ngram_size num_beam_groups num_beams
    max_sequence_length
    num_labels num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torchscript transformers.js_config
    transformers_version typical_p unsloth_fixed unsloth_version use_cache""".split()  # noqa: SIM905
)
"""Known keys without influence on what the weights compute: special tokens, drawing, labels, training, bookkeeping."""


VOCAB_MULTIPLE = 128
"""Embedding rows in NeMo are a multiple of this: one file serves every tensor-parallel size dividing it."""


@dataclass(frozen=True)
class Llama3Scaling:
    """Scaling of the rotary frequencies by the Llama 3 formula: the four numbers of config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def as_json(self) -> dict[str, Any]:
        """As both spellings write it."""
        return {"rope_type": "llama3"} | {name: getattr(self, name) for name in _LLAMA3}


@dataclass(frozen=True)
class ModelFacts:
    """Everything in config.json that decides what the weights compute.

    Attributes:
        family: ``model_type``.
        num_layers: transformer layers.
        hidden: model width.
        ffn: width of the gated MLP, whose activation is silu.
        num_heads: query heads.
        num_groups: key/value heads.
        head_dim: width of a head; not always ``hidden / num_heads``.
        vocab: rows of the embedding.
        max_positions: tokens a sequence may have.
        norm_eps: of every RMS norm.
        rope_base: of the rotary frequencies, which turn whole heads.
        rope_scaling: None for none.
        tied: the output head is the embedding.
        qkv_bias: query, key and value projections have biases; no other layer has.
        dtype: one of :data:`DTYPES`, or None if the file does not say.
        init_std: standard deviation of new weights; for training code that asks, no part of the arithmetic.
    """

    family: str
    num_layers: int
    hidden: int
    ffn: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab: int
    max_positions: int
    norm_eps: float
    rope_base: float
    rope_scaling: Llama3Scaling | None
    tied: bool
    qkv_bias: bool
    dtype: str | None
    init_std: float

    @property
    def padded_vocab(self) -> int:
        """Embedding rows in NeMo: ``vocab`` rounded up to :data:`VOCAB_MULTIPLE`."""
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def q_width(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_groups * self.head_dim

    def inverse_frequencies(self) -> list[float]:
        """Turn of each pair of a head's dimensions per position, in radians, after scaling."""
        plain = [self.rope_base ** -(i / self.head_dim) for i in range(0, self.head_dim, 2)]
        scaling = self.rope_scaling
        if scaling is None:
            return plain
        turns = [scaling.original_max_position_embeddings * f / (2 * math.pi) for f in plain]
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = [min(1.0, max(0.0, (t - low) / (high - low))) for t in turns]
        return [f * (k + (1 - k) / scaling.factor) for f, k in zip(plain, kept, strict=True)]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object, no key twice.

    Raises:
        UserError: it is absent, not UTF-8, not JSON or no object.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a Hugging Face model folder{look_alike(path)}")
    text = read_text(path)
    try:
        content = strict_json(text, finite=False)
    except ValueError as error:
        raise UserError(f"{path}: {one_line(str(error))}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not valid JSON for a model folder (expected an object)")
    return content


def read_facts(folder: Path) -> ModelFacts:
    """The facts of a model folder.

    Raises:
        UserError: naming the file and the key that is absent, unknown, unsupported or contradicts another.
    """
    path = folder / CONFIG_NAME
    return facts_of(read_object(path), str(path))


def facts_of(content: Mapping[str, Any], where: str = CONFIG_NAME) -> ModelFacts:
    """The facts in a decoded config.json; ``where`` names it in errors.

    Raises:
        UserError: as :func:`read_facts`.
    """
    keys = _Keys(content, where)
    family = content.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        keys.fail(f"model_type {_show(family)} is not supported; supported: {', '.join(ARCHITECTURES)}")
    assert isinstance(family, str)
    _check_known(keys, family)
    heads, hidden = keys.count("num_attention_heads"), keys.count("hidden_size")
    groups = keys.count("num_key_value_heads", heads if family == "llama" else None)
    if heads % groups:
        keys.fail(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}")
    if content.get("head_dim") is None and hidden % heads:
        keys.fail(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}, and there is no head_dim")
    head_dim = keys.count("head_dim", hidden // heads)
    if head_dim % 2:
        keys.fail(f"head_dim={head_dim}: rotary embeddings need an even one")
    activation = keys.value("hidden_act", "silu")
    if activation != "silu":
        keys.fail(f"hidden_act={_show(activation)} is not supported; expected 'silu'")
    base, scaling = _rope(keys)
    return ModelFacts(
        family=family,
        num_layers=keys.count("num_hidden_layers"),
        hidden=hidden,
        ffn=keys.count("intermediate_size"),
        num_heads=heads,
        num_groups=groups,
        head_dim=head_dim,
        vocab=keys.count("vocab_size"),
        max_positions=keys.count("max_position_embeddings"),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_base=base,
        rope_scaling=scaling,
        tied=keys.flag("tie_word_embeddings", False),
        qkv_bias=family == "qwen2",
        dtype=_dtype(keys),
        init_std=keys.number("initializer_range", 0.02, least=0.0),
    )


class _Keys:
    """Typed access to a decoded object; null counts as absent, where it is allowed."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content = content
        self.where = where

    def fail(self, problem: str) -> None:
        raise UserError(f"{self.where}: {problem}")

    def value(self, name: str, default: Any = None) -> Any:
        found = self.content.get(name)
        return default if found is None else found

    def count(self, name: str, default: int | None = None) -> int:
        found = self.value(name, default)
        if found is None:
            self.fail(f"{name} is missing")
        if isinstance(found, bool) or not isinstance(found, int) or not 0 < found < 2**31:
            self.fail(f"{name}={_show(found)}: expected a whole number above 0")
        return int(found)

    def number(self, name: str, default: float | None = None, least: float | None = None) -> float:
        found = self.value(name, default)
        if found is None:
            self.fail(f"{name} is missing")
        fits = isinstance(found, int | float) and not isinstance(found, bool) and abs(found) < 1e300
        if not fits or (found < least if least is not None else found <= 0):
            self.fail(
                f"{name}={_show(found)}: expected a number " + ("above 0" if least is None else f"of at least {least:g}")
            )
        return float(found)

    def flag(self, name: str, default: bool) -> bool:
        found = self.value(name, default)
        if not isinstance(found, bool):
            self.fail(f"{name}={_show(found)}: expected true or false")
        return bool(found)


def _check_known(keys: _Keys, family: str) -> None:
    """Every key is one that is read, one without influence, or one that is off."""
    architectures = keys.value("architectures", [])
    if architectures not in ([], [ARCHITECTURES[family]]):
        keys.fail(f"architectures={_show(architectures)} is not supported; expected [{ARCHITECTURES[family]!r}]")
    for name in (*_FACTS - _NULLABLE, *(() if keys.value("rope_parameters") else ("rope_theta",))):
        if name in keys.content and keys.content[name] is None:
            keys.fail(f"{name}=null: expected a value; readers differ in what they make of none")
    known = _FACTS | _HARMLESS | {*TRANSFORMERS_4_ONLY, *TRANSFORMERS_5_ONLY}
    for name, value in keys.content.items():
        if name in known or value is None:
            continue
        if name in _OFF:
            allowed = any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in _OFF[name])
            if not allowed:
                keys.fail(f"{name}={_show(value)} is not supported{_CURES.get(name, '')}")
        elif name == "sliding_window" and family == "qwen2":
            pass  # a width that use_sliding_window, checked above, leaves unused
        elif name == "layer_types":
            layers = keys.count("num_hidden_layers")
            if not isinstance(value, list) or len(value) != layers or set(map(str, value)) != {"full_attention"}:
                keys.fail(
                    f"layer_types={_show(value)} is not supported; expected 'full_attention' for each of {layers} layers"
                )
        else:
            cure = _CURES.get(name, "; it may change what the model computes. Remove the key if it does not")
            keys.fail(f"key {one_line(repr(name), 80)} ({_show(value)}) is not supported for {family} models{cure}")


def _dtype(keys: _Keys) -> str | None:
    found = {name: keys.value(name) for name in ("torch_dtype", "dtype") if keys.value(name) is not None}
    for name, value in found.items():
        if value not in DTYPES:
            keys.fail(f"{name}={_show(value)} is not supported; expected {', '.join(DTYPES)}")
    if len(set(found.values())) > 1:
        keys.fail(f"torch_dtype={found['torch_dtype']!r} contradicts dtype={found['dtype']!r}; keep the right one")
    return next(iter(found.values()), None)


def _rope(keys: _Keys) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling, from whichever spelling there is."""
    bases: dict[str, float] = {}
    scalings: dict[str, Llama3Scaling | None] = {}
    if keys.value("rope_theta") is not None:
        bases["rope_theta"] = keys.number("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        table = keys.value(name, {})
        if not isinstance(table, dict):
            keys.fail(f"{name}={_show(table)}: expected an object or null")
        if (name == "rope_parameters" and not table) or keys.value(name) is None:
            continue
        if name == "rope_parameters":
            table = _of_all_layers(keys, table)
        inner = _Keys(table, f"{keys.where}: {name}")
        scalings[name] = _scaling(keys, inner, name)
        if inner.value("rope_theta") is not None:
            bases[f"{name}.rope_theta"] = inner.number("rope_theta")
    if "rope_scaling" in keys.content and keys.value("rope_scaling") is None and scalings.get("rope_parameters"):
        scalings["rope_scaling"] = None  # written out as none: transformers 4 would not scale
    for found in (bases, scalings):
        if len(set(found.values())) > 1:
            keys.fail(
                "; ".join(f"{k}={_show(v)}" for k, v in found.items()) + ": these contradict each other; keep the right one"
            )
    base = next(iter(bases.values()), 10000.0)
    if base <= 1.0:
        keys.fail(f"{next(iter(bases))}={base:g}: expected a number above 1")
    return base, next(iter(scalings.values()), None)


def _of_all_layers(keys: _Keys, table: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 may write the parameters once per kind of layer; these families have one kind."""
    for name, value in table.items():
        if value is None:
            keys.fail(
                f"rope_parameters.{one_line(name, 60)}=null: expected a value; readers differ in what they make of none"
            )
    nested = {name: value for name, value in table.items() if isinstance(value, dict)}
    if not nested:
        return table
    if set(table) != {"full_attention"}:
        keys.fail(f"rope_parameters for {', '.join(map(repr, table))} are not supported; expected one set for all layers")
    return nested["full_attention"]


def _scaling(keys: _Keys, table: _Keys, name: str) -> Llama3Scaling | None:
    # transformers 4 fails on a rope_scaling without a type; transformers 5 takes rope_parameters for the default one.
    kind = table.value("rope_type", table.value("type", "default" if name == "rope_parameters" else None))
    if kind != table.value("type", kind):
        table.fail(f"rope_type={_show(kind)} contradicts type={_show(table.content['type'])}; keep the right one")
    if kind not in ("default", "llama3"):
        keys.fail(
            f"{name} type {_show(kind)} is not supported; NeMo 2.2.1 knows only llama3. For prompts that fit the unscaled "
            "positions, remove the scaling"
        )
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *(_LLAMA3 if kind == "llama3" else ())}
    for key, value in table.content.items():
        if key == "rope_theta" and value is None:
            table.fail("rope_theta=null: expected a number above 1")
        if key not in known and value is not None:
            table.fail(f"key {one_line(repr(key), 80)} ({_show(value)}) is not supported for type {kind!r}")
    part = table.value("partial_rotary_factor", 1)
    if isinstance(part, bool) or part != 1:
        table.fail(f"partial_rotary_factor={_show(part)} is not supported")
    if kind == "default":
        return None
    missing = [k for k in _LLAMA3 if table.value(k) is None]
    if missing:
        keys.fail(f"{name} of type llama3 lacks {', '.join(missing)}")
    factor, low, high = (table.number(k) for k in _LLAMA3[:3])
    if not low < high:
        table.fail(f"high_freq_factor={high:g} must be above low_freq_factor={low:g}")
    return Llama3Scaling(factor, low, high, table.count("original_max_position_embeddings"))


def _show(value: Any) -> str:
    """A value as JSON users write it, short enough for a line."""
    return one_line({True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value), 80)
