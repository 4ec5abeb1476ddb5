"""[nemo] Building MegatronGPTModel on a CPU: to write a checkpoint, and to compute logits from one.

Call :func:`nemo_ampo.compat.setup` before importing this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy, NLPSaveRestoreConnector
from omegaconf import OmegaConf, open_dict

from converters.mapping import Binding, check_dims, check_names
from converters.nemo_weights import EXTRA_STATE, PREFIX
from nemo_ampo.checkpoint.nemo_writing import temporary_files_in
from nemo_ampo.model_folder.facts import ModelFacts
from nemo_ampo.model_folder.weights import SafetensorsFolder

PRECISION: dict[torch.dtype, int | str] = {torch.float32: 32, torch.bfloat16: "bf16", torch.float16: 16}
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def _trainer(precision: int | str) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=1,
        precision=precision,
        strategy=NLPDDPStrategy(find_unused_parameters=False),
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )


def _cpu_config(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """``config`` for one CPU process, with parameters of type ``dtype`` (NeMo: half precision means O2)."""
    return OmegaConf.create(
        config
        | {
            "transformer_engine": False,
            "use_cpu_initialization": True,
            "perform_initialization": False,
            "precision": PRECISION[dtype],
            "megatron_amp_O2": dtype != torch.float32,
        }
    )


def build(config: dict[str, Any], dtype: torch.dtype) -> MegatronGPTModel:
    """A model whose weights are allocated and not initialised.

    Args:
        config: as :func:`converters.model_config.nemo_config` makes it.
        dtype: type of the parameters.
    """
    # Lightning needs a precision it can run on a CPU; it plays no part in a model that is only saved.
    return MegatronGPTModel(_cpu_config(config, dtype), _trainer(32))


def fill(model: MegatronGPTModel, weights: SafetensorsFolder, bindings: Iterable[Binding], shape: ModelFacts) -> None:
    """Copy the mapped Hugging Face weights into the model's parameters, one at a time.

    Raises:
        UserError: a parameter is not mapped, a mapped weight has no parameter, or a shape differs.
    """
    by_place = {(binding.key, binding.layer): binding for binding in bindings}
    parameters = _parameters_by_place(model)
    check_names(map(_spell, parameters), map(_spell, by_place), "NeMo model")
    with torch.no_grad():
        for place, parameter in parameters.items():
            tensor = by_place[place].to_nemo(weights.load, shape)
            check_dims(_spell(place), tuple(tensor.shape), tuple(parameter.shape))
            parameter.copy_(tensor)


def _spell(place: tuple[str, int | None]) -> str:
    key, layer = place
    return key if layer is None else f"{key} (layer {layer})"


def _parameters_by_place(model: MegatronGPTModel) -> dict[tuple[str, int | None], torch.Tensor]:
    """Checkpoint key and layer to the live parameter; the same for local and Transformer Engine layers."""
    found: dict[tuple[str, int | None], torch.Tensor] = {}
    for name, entry in model.sharded_state_dict().items():
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and EXTRA_STATE not in name:
            layer = _LAYER.search(name)
            place = (entry.key.removeprefix(PREFIX), int(layer.group(1)) if layer else None)
            found[place] = entry.data
    live = {p.data_ptr() for module in model.get_model_module_list() for p in module.parameters()}
    assert live == {t.data_ptr() for t in found.values()}, "the sharded state is not the model's own parameters"
    return found


def set_saved_config(model: MegatronGPTModel, config: dict[str, Any]) -> None:
    """Make ``config`` what the checkpoint will hold, instead of the settings this process was built with."""
    saved = OmegaConf.create(config)
    with open_dict(saved):
        saved.target = model.cfg.target
        saved.nemo_version = model.cfg.nemo_version
    model.cfg = saved


def restore_fp32(unpacked: Path, config: dict[str, Any]) -> MegatronGPTModel:
    """Load an unpacked ``.nemo`` through NeMo's own connector, in fp32, ready for a forward pass."""
    connector = NLPSaveRestoreConnector()
    connector.model_extracted_dir = str(unpacked)
    with temporary_files_in(unpacked):
        model = MegatronGPTModel.restore_from(
            restore_path=str(unpacked),
            trainer=_trainer(32),
            override_config_path=_cpu_config(config, torch.float32),
            save_restore_connector=connector,
            strict=True,
        )
    model.eval()
    return model
