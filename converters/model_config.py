"""A Hugging Face config as the config of NeMo's MegatronGPTModel, complete enough to train from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.mapping import VOCAB_MULTIPLE, Family, ModelShape
from nemo_ampo.checkpoint.nemo_file import tokenizer_config
from nemo_ampo.errors import UserError

ARCHITECTURE_KEYS: tuple[str, ...] = (
    "mcore_gpt",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "override_vocab_size",
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


def model_shape(config: Any) -> ModelShape:
    """Sizes of a ``transformers`` config.

    Raises:
        UserError: if query heads cannot be shared evenly among key/value heads.
    """
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise UserError(f"config.json: num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}")
    return ModelShape(
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        num_heads=heads,
        num_groups=groups,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
    )


def rope_config(config: Any) -> dict[str, Any]:
    """Rotary embedding keys. NeMo 2.2.1 scales by the Llama 3 formula with the four numbers given here.

    Raises:
        UserError: for a scaling type other than ``default`` and ``llama3``, an incomplete one, or partial
            rotation.
    """
    if getattr(config, "partial_rotary_factor", None) not in (None, 1, 1.0):
        raise UserError(f"config.json: partial_rotary_factor={config.partial_rotary_factor} is not supported")
    theta = float(config.rope_theta)
    keys: dict[str, Any] = {
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": int(theta) if theta.is_integer() else theta,
        "rotary_interleaved": False,
        "seq_len_interpolation_factor": None,
        "scale_positional_embedding": False,
    }
    scaling = config.rope_scaling
    kind = (scaling.get("rope_type") or scaling.get("type")) if scaling else "default"
    if kind == "default":
        return keys
    if kind != "llama3":
        raise UserError(f"config.json: rope_scaling type {kind!r} is not supported; NeMo 2.2.1 knows only llama3")
    names = {
        "factor": "scale_factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "old_context_len",
    }
    missing = [name for name in names if scaling.get(name) is None]
    if missing:
        raise UserError(f"config.json: rope_scaling of type llama3 lacks {', '.join(missing)}")
    return keys | {"scale_positional_embedding": True} | {nemo: scaling[hf] for hf, nemo in names.items()}


def nemo_config(config: Any, family: Family, tokenizer_dir: Path) -> dict[str, Any]:
    """Everything MegatronGPTModel, GPTSFTModel and the REINFORCE actor read from ``model``.

    Transformer Engine layers are the stored choice, since that is what a GPU wants; loading on a CPU
    overrides it (:func:`nemo_ampo.checkpoint.nemo_file.load_overrides`). Fusions that need compiled extensions are off;
    a GPU recipe may turn them on, they do not change the checkpoint.

    Raises:
        UserError: for a setting that NeMo cannot express, naming its key in config.json.
    """
    family.check(config)
    if config.hidden_act != "silu":
        raise UserError(f"config.json: hidden_act={config.hidden_act!r} is not supported; expected 'silu'")
    shape = model_shape(config)
    return {
        "mcore_gpt": True,
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
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_groups,
        "kv_channels": shape.head_dim,
        "encoder_seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        # Rows of the embedding, fixed here and not derived from the tokenizer: Qwen's model has more rows
        # than its tokenizer has tokens, and a padding that depends on the tensor-parallel size would tie the
        # file to that size.
        "override_vocab_size": shape.padded_vocab,
        "make_vocab_size_divisible_by": VOCAB_MULTIPLE,
        "hf_vocab_size": shape.vocab,
        "share_embeddings_and_output_weights": shape.tied,
        "normalization": "rmsnorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "activation": "fast-swiglu",
        "bias": False,
        "qkv_bias": family.qkv_bias,
        "transformer_block_type": "pre_ln",
        "init_method_std": config.initializer_range,
        "use_scaled_init_method": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        **rope_config(config),
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
    }
