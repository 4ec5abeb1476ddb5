"""A Hugging Face config as the config of NeMo's MegatronGPTModel, complete enough to train from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_ampo.checkpoint.nemo_file import ASSETS_FOLDER, read_model_config, tokenizer_config
from nemo_ampo.errors import UserError
from nemo_ampo.model_folder.facts import CONFIG_NAME, VOCAB_MULTIPLE, ModelFacts, facts_of, read_object

MODEL_CLASS = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
"""What NeMo builds from a converted checkpoint; a stage names its own class."""
NEMO_VERSION = "2.2.1"
"""Whose ``.nemo`` files ours are made like."""
ARCHITECTURE_KEYS: tuple[str, ...] = (
    "mcore_gpt",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "override_vocab_size",
    "hf_vocab_size",
    "share_embeddings_and_output_weights",
    "normalization",
    "layernorm_epsilon",
    "activation",
    "bias",
    "qkv_bias",
    "position_embedding_type",
    "rotary_percentage",
    "rotary_base",
    "rotary_interleaved",
    "seq_len_interpolation_factor",
    "scale_positional_embedding",
    "scale_factor",
    "low_freq_factor",
    "high_freq_factor",
    "old_context_len",
)
"""Keys that change what the weights compute: training must not touch them, and verification compares them."""


def rope_config(facts: ModelFacts) -> dict[str, Any]:
    """Rotary embedding keys. NeMo 2.2.1 scales by the Llama 3 formula with the four numbers given here."""
    base, scaling = facts.rope_base, facts.rope_scaling
    keys: dict[str, Any] = {
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": int(base) if base.is_integer() else base,
        "rotary_interleaved": False,
        "seq_len_interpolation_factor": None,
        "scale_positional_embedding": scaling is not None,
    }
    if scaling is None:
        return keys
    return keys | {
        "scale_factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "old_context_len": scaling.original_max_position_embeddings,
    }


def architecture(facts: ModelFacts) -> dict[str, Any]:
    """The values of :data:`ARCHITECTURE_KEYS`; those of a scaling only where there is one."""
    return {
        "mcore_gpt": True,
        "num_layers": facts.num_layers,
        "hidden_size": facts.hidden,
        "ffn_hidden_size": facts.ffn,
        "num_attention_heads": facts.num_heads,
        "num_query_groups": facts.num_groups,
        "kv_channels": facts.head_dim,
        # Rows of the embedding, fixed here and not derived from the tokenizer: Qwen's model has more rows
        # than its tokenizer has tokens, and a padding that depends on the tensor-parallel size would tie the
        # file to that size.
        "override_vocab_size": facts.padded_vocab,
        "hf_vocab_size": facts.vocab,
        "share_embeddings_and_output_weights": facts.tied,
        "normalization": "rmsnorm",
        "layernorm_epsilon": facts.norm_eps,
        "activation": "fast-swiglu",
        "bias": False,
        "qkv_bias": facts.qkv_bias,
        **rope_config(facts),
    }


def nemo_config(facts: ModelFacts, tokenizer_dir: Path) -> dict[str, Any]:
    """Everything MegatronGPTModel, GPTSFTModel and the REINFORCE actor read from ``model``.

    Transformer Engine layers are the stored choice, since that is what a GPU wants; loading on a CPU
    overrides it (:func:`nemo_ampo.checkpoint.nemo_file.load_overrides`). Fusions that need compiled extensions are off;
    a GPU recipe may turn them on, they do not change the checkpoint.
    """
    return architecture(facts) | {
        "name": "",
        "transformer_engine": True,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "sequence_parallel": False,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "megatron_amp_O2": False,
        "use_cpu_initialization": False,
        "seed": 1234,
        "encoder_seq_length": facts.max_positions,
        "max_position_embeddings": facts.max_positions,
        "make_vocab_size_divisible_by": VOCAB_MULTIPLE,
        "transformer_block_type": "pre_ln",
        "init_method_std": facts.init_std,
        "use_scaled_init_method": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "apply_query_key_layer_scaling": False,
        "normalize_attention_scores": True,
        "attention_type": "multihead",
        "headscale": False,
        "openai_gelu": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_add_fusion": False,
        "masked_softmax_fusion": False,
        "get_attention_mask_from_fusion": False,
        "gradient_accumulation_fusion": False,
        "gradient_as_bucket_view": True,
        "grad_allreduce_chunk_size_mb": 125,
        "activations_checkpoint_granularity": None,
        "activations_checkpoint_method": None,
        "activations_checkpoint_num_layers": None,
        "activations_checkpoint_layers_per_pipeline": None,
        "fp8": False,
        "fp16_lm_cross_entropy": False,
        "fp32_residual_connection": False,
        "native_amp_init_scale": 4294967296,
        "native_amp_growth_interval": 1000,
        "hysteresis": 2,
        "dist_ckpt_format": "torch_dist",
        "dist_ckpt_load_on_device": True,
        "dist_ckpt_parallel_save": False,
        "tokenizer": tokenizer_config(tokenizer_dir),
        "data": {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False},
        "optim": {"name": "mcore_distributed_optim", "lr": 1.0e-6, "weight_decay": 0.1, "betas": [0.9, 0.98]},
        "target": MODEL_CLASS,
        "nemo_version": NEMO_VERSION,
    }


def first_difference(stored: Mapping[str, Any], facts: ModelFacts) -> tuple[str, Any, Any] | None:
    """The first architecture key that is not what config.json asks for: its name, what is stored, what is expected."""
    expected = architecture(facts)
    for key in ARCHITECTURE_KEYS:
        if stored.get(key) != expected.get(key):
            return key, stored.get(key), expected.get(key)
    return None


def check_architecture(nemo_path: Path | str, assets: Path) -> None:
    """NeMo would compute what the config.json in the file says, which is what an export is computed by.

    Args:
        nemo_path: checkpoint.
        assets: its unpacked Hugging Face files.

    Raises:
        UserError: naming the key, and what to do about it.
    """
    stored = read_model_config(nemo_path)
    facts = facts_of(read_object(assets / CONFIG_NAME), f"{nemo_path}: {ASSETS_FOLDER}/{CONFIG_NAME}")
    if wrong := first_difference(stored, facts):
        key, found, expected = wrong
        raise UserError(
            f"{nemo_path}: model_config.yaml has {key}={found}, the config.json packed with it asks for {expected}; convert "
            "the Hugging Face folder again and start from that"
        )
