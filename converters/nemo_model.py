"""[nemo] Megatron's GPT model on a CPU, as NeMo builds it from a checkpoint's config, to compute logits.

Call :func:`nemo_ampo.compat.setup` before importing this module.
"""

from __future__ import annotations

import re
from typing import Any

from lightning.pytorch import Trainer
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
from omegaconf import OmegaConf

_LAYER = re.compile(r"layers\.(\d+)\.")
_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Norms that are modules of their own in Megatron's local layers, whose checkpoints are like Transformer Engine's."""


def build(config: dict[str, Any]) -> Any:
    """Megatron's module in fp32, ready for a forward pass but for its parameters, whose memory nobody has touched."""
    on_a_cpu = {
        "transformer_engine": False,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "precision": 32,
        "megatron_amp_O2": False,
    }
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=1,
        precision=32,
        strategy=NLPDDPStrategy(find_unused_parameters=False),
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    [module] = MegatronGPTModel(OmegaConf.create(config | on_a_cpu), trainer).get_model_module_list()
    return module.eval()


def checkpoint_place(parameter: str) -> tuple[str, int | None]:
    """Key and layer of a parameter in a checkpoint."""
    found = _LAYER.search(parameter)
    if found is None:
        return parameter, None
    key = _LAYER.sub("layers.", parameter)
    prefix = key[: key.index("layers.") + len("layers.")]
    return prefix + _NORMS.get(key.removeprefix(prefix), key.removeprefix(prefix)), int(found[1])
