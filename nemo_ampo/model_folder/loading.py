"""Objects of transformers 4 made from a folder's files as they are written, and checked against them.

Whatever a library raises on the way becomes one line that names the folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ampo.errors import Stopped, UserError
from nemo_ampo.files import read_text
from nemo_ampo.model_folder.facts import ARCHITECTURES, CONFIG_NAME, ModelFacts, read_facts, read_object
from nemo_ampo.model_folder.portable import TOKENIZER_CONFIG_NAME, is_of_transformers_5, portable_tokenizer_config
from nemo_ampo.model_folder.weights import SafetensorsFolder
from nemo_ampo.text import one_line

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_CHAT_TEMPLATE_NAME = "chat_template.jinja"
_PROBE = "Grüße, 你好! It's 12,345.67 o'clock;  two  spaces\n\n\tdef f(x): return x**2 # don't <b>\r\n🙂 "
"""Text on which tokenizers differ: scripts, digits, runs of white space, contractions."""


@contextlib.contextmanager
def third_party(doing: str, cure: str = "") -> Iterator[None]:
    """Turn whatever a library raises into one line.

    Args:
        doing: such as ``DIR: the tokenizer cannot be loaded``.
        cure: what to do about it.

    Raises:
        UserError: the block raised anything that is not already one, an interrupt or a request to stop.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, Stopped):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        said = one_line(str(error)) or type(error).__name__
        raise UserError(f"{doing} ({type(error).__name__}: {said}){'; ' + cure if cure else ''}") from None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' warnings about what is checked here anyway."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# --- tokenizer ------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; where there is a tokenizer.json, it gives that file's ids.

    Raises:
        UserError: there is none, it cannot be loaded, its ids would not be those of tokenizer.json, or the model of the
            folder has no embedding for one of them.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    path = folder / TOKENIZER_CONFIG_NAME
    config = read_object(path) if path.is_file() else {}
    given: dict[str, Any] = {"local_files_only": True}
    if (folder / _CHAT_TEMPLATE_NAME).is_file():
        given["chat_template"] = read_text(folder / _CHAT_TEMPLATE_NAME)
    loader: Any = AutoTokenizer
    if is_of_transformers_5(config):
        if not (folder / "tokenizer.json").is_file():
            raise UserError(
                f"{folder}: {TOKENIZER_CONFIG_NAME} is of transformers 5, which needs a tokenizer.json; there is none"
            )
        portable = portable_tokenizer_config(config)
        names = ("additional_special_tokens", "clean_up_tokenization_spaces")
        given |= {name: portable[name] for name in names if name in portable}
        if isinstance(config.get("extra_special_tokens"), list):
            given["extra_special_tokens"] = {}
        loader = PreTrainedTokenizerFast
    else:
        given["trust_remote_code"] = False
    cure = "save it again with tokenizer.save_pretrained() of transformers 4.48"
    with _quietly(), third_party(f"{folder}: the tokenizer cannot be loaded", cure):
        tokenizer = loader.from_pretrained(str(folder), **given)
        if tokenizer is False:
            raise ValueError("unreadable vocabulary")
        if (folder / "tokenizer.json").is_file():
            _check_ids(folder, tokenizer)
        _check_rows(folder, tokenizer)
    # Who asks for the length of a text decides what to make of it; the library's remark would stand beside our one line.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _check_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    written = Tokenizer.from_file(str(path))
    written.no_truncation()
    written.no_padding()
    theirs, ours = written.get_vocab(with_added_tokens=True), tokenizer.get_vocab()
    differing = sorted(str(t) for t in theirs.keys() | ours.keys() if theirs.get(t) != ours.get(t))
    if differing:
        raise UserError(
            f"{path}: lacks or numbers otherwise what {TOKENIZER_CONFIG_NAME} and its neighbours say of "
            f"{one_line(', '.join(map(repr, differing[:4])))}; save the tokenizer again with save_pretrained()"
        )
    if tokenizer.encode(_PROBE, add_special_tokens=False) != written.encode(_PROBE, add_special_tokens=False).ids:
        raise UserError(
            f"{path}: transformers splits text otherwise than this file says; set tokenizer_class in its config "
            'to "PreTrainedTokenizerFast"'
        )


def _check_rows(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A folder of a policy's files without config.json has no model to compare with."""
    path = folder / CONFIG_NAME
    rows = read_object(path).get("vocab_size") if path.is_file() else None
    ids = max(tokenizer.get_vocab().values(), default=-1) + 1
    if isinstance(rows, int) and ids > rows:
        raise UserError(
            f"{folder}: the tokenizer has {ids} ids but the model's embedding only {rows} rows (vocab_size in {CONFIG_NAME})"
        )


# --- model ----------------------------------------------------------------------------------------------------------


def transformers_config(facts: ModelFacts) -> PretrainedConfig:
    """A config of transformers 4 that says what the facts say and nothing else."""
    from transformers import LlamaConfig, Qwen2Config

    kinds: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    return kinds[facts.family](
        architectures=[ARCHITECTURES[facts.family]],
        num_hidden_layers=facts.num_layers,
        hidden_size=facts.hidden,
        intermediate_size=facts.ffn,
        num_attention_heads=facts.num_heads,
        num_key_value_heads=facts.num_groups,
        head_dim=facts.head_dim,
        vocab_size=facts.vocab,
        max_position_embeddings=facts.max_positions,
        rms_norm_eps=facts.norm_eps,
        hidden_act="silu",
        rope_theta=facts.rope_base,
        rope_scaling=facts.rope_scaling.as_json() if facts.rope_scaling else None,
        tie_word_embeddings=facts.tied,
        initializer_range=facts.init_std,
        torch_dtype=facts.dtype,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def load_model(folder: Path | str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The causal language model of a folder on the CPU, ready for a forward pass.

    Nothing of generation_config.json comes along: what is drawn, and how, says who draws.

    Args:
        folder: config.json and safetensors.
        dtype: of the parameters: a torch type, its name, or ``auto`` for the one config.json states (else the stored one).

    Raises:
        UserError: config or weights are damaged or unsupported, do not fit together, or transformers would compute
            something else than config.json says; a weight holds a value that is no number.
    """
    folder = Path(folder)
    model, load = model_without_weights(folder, dtype)
    with _quietly(), third_party(f"{folder}: the model cannot be loaded"):
        names = [name for name in model.state_dict() if not (name == "lm_head.weight" and _is_tied(model))]
        model.load_state_dict({name: load(name) for name in names}, strict=False, assign=True)
        model.tie_weights()
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "every tensor was filled in"
    return model


def model_without_weights(
    folder: Path, dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, Callable[[str], torch.Tensor]]:
    """The model with parameters on no device, and what loads the weight behind each parameter's name.

    Args:
        folder, dtype: as :func:`load_model` has them.

    Raises:
        UserError: as there; of a weight when it is loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    facts = read_facts(folder)
    weights = SafetensorsFolder(folder)
    stored = weights.dtype()
    kind = dtype if isinstance(dtype, torch.dtype) else getattr(torch, facts.dtype or "", stored)
    if isinstance(dtype, str) and dtype != "auto":
        kind = getattr(torch, dtype)
    _check_layers(folder, facts, weights)
    before = torch.get_default_dtype()
    with _quietly(), third_party(f"{folder}: the model cannot be loaded"):
        try:
            with torch.device("meta"), no_init_weights():
                model = AutoModelForCausalLM.from_config(transformers_config(facts), torch_dtype=kind)
        finally:
            torch.set_default_dtype(before)
        _check_tensors(folder, facts, weights, model)
        model.tie_weights()
        # Its frequencies are no weights, so that no file fills them in.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    check_as_written(model, facts, folder)
    source = {"lm_head.weight": "model.embed_tokens.weight"} if facts.tied else {}
    return model.eval(), lambda name: _finite(folder, weights, source.get(name, name), kind)


def _is_tied(model: Any) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def _finite(folder: Path, weights: SafetensorsFolder, name: str, kind: torch.dtype) -> torch.Tensor:
    """One weight in the type it is computed in. A training that came apart leaves others, which compute nothing."""
    tensor = weights.load(name).to(kind, copy=True)
    if not tensor.isfinite().all():
        said = str(kind).removeprefix("torch.")
        raise UserError(f"{folder}: weight {name} holds a value that is no finite number as {said}")
    return tensor


def _check_layers(folder: Path, facts: ModelFacts, weights: SafetensorsFolder) -> None:
    """Before a model of a million layers is built because of a digit too many."""
    layers = {name.split(".")[2] for name in weights.names() if name.startswith("model.layers.")}
    if len(layers) != facts.num_layers:
        raise UserError(f"{folder}: config.json asks for {facts.num_layers} layers, the weights hold {len(layers)}")


def _check_tensors(folder: Path, facts: ModelFacts, weights: SafetensorsFolder, model: PreTrainedModel) -> None:
    import torch

    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if facts.tied:
        del expected[head]
    found = {name: weights.shape(name) for name in weights.names()}
    if facts.tied and head in found and embedding in found:
        if not torch.equal(weights.load(head), weights.load(embedding)):
            raise UserError(f"{folder}: {head} differs from the embedding although config.json has tie_word_embeddings=true")
        del found[head]
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            has, asks = (list(side[name]) if name in side else "nothing" for side in (found, expected))
            raise UserError(f"{folder}: weight {name}: the files hold {has}, config.json asks for {asks}")


def check_as_written(model: Any, facts: ModelFacts, folder: Path) -> None:
    """Has transformers made of the facts what they say? Looks at the parts that compute, not at a config.

    Raises:
        UserError: naming what differs; the installed transformers is not one this project was built for.
    """
    import torch

    layer, rotary = model.model.layers[0], model.model.rotary_emb
    expected = torch.tensor(facts.inverse_frequencies(), dtype=torch.float64)
    turns = rotary.inv_freq.to(device="cpu", dtype=torch.float64)
    norms = [module.variance_epsilon for module in model.modules() if hasattr(module, "variance_epsilon")]
    held = {
        "rotary frequencies": turns.shape == expected.shape and torch.allclose(turns, expected, rtol=1e-4, atol=0.0),
        "rotary amplitude": rotary.attention_scaling == 1.0,
        "rms_norm_eps": len(norms) == 2 * facts.num_layers + 1 and set(norms) == {facts.norm_eps},
        "hidden_act": isinstance(layer.mlp.act_fn, torch.nn.SiLU),
        "head_dim": layer.self_attn.head_dim == facts.head_dim and layer.self_attn.scaling == facts.head_dim**-0.5,
        "num_key_value_heads": layer.self_attn.num_key_value_groups == facts.num_heads // facts.num_groups,
        "tie_word_embeddings": _is_tied(model) == facts.tied,
        "attention biases": [p.bias is not None for p in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj)]
        == [facts.qkv_bias, False, False],
        "sliding window": not getattr(model.config, "use_sliding_window", False),
    }
    wrong = [what for what, is_so in held.items() if not is_so]
    if wrong:
        import transformers

        raise UserError(
            f"{folder}: transformers {transformers.__version__} computes {', '.join(wrong)} otherwise than config.json says"
            "; install the locked version (requirements.lock)"
        )
