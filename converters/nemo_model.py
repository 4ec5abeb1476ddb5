"""[nemo] MegatronGPTModel on a CPU, restored from a checkpoint to compute logits.

Call :func:`nemo_ampo.compat.setup` before importing this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy, NLPSaveRestoreConnector
from omegaconf import OmegaConf

from nemo_ampo.checkpoint.nemo_writing import temporary_files_in


def restore_fp32(unpacked: Path, config: dict[str, Any]) -> MegatronGPTModel:
    """Load an unpacked ``.nemo`` through NeMo's own connector, in fp32, ready for a forward pass."""
    on_a_cpu = {
        "transformer_engine": False,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "precision": 32,
        "megatron_amp_O2": False,
    }
    connector = NLPSaveRestoreConnector()
    connector.model_extracted_dir = str(unpacked)
    with temporary_files_in(unpacked):
        model = MegatronGPTModel.restore_from(
            restore_path=str(unpacked),
            trainer=Trainer(
                accelerator="cpu",
                devices=1,
                num_nodes=1,
                precision=32,
                strategy=NLPDDPStrategy(find_unused_parameters=False),
                logger=False,
                enable_checkpointing=False,
                use_distributed_sampler=False,
            ),
            override_config_path=OmegaConf.create(config | on_a_cpu),
            save_restore_connector=connector,
            strict=True,
        )
    model.eval()
    return model
