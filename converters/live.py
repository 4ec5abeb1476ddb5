"""The weights of a running NeMo model as a Hugging Face folder, for an engine in another container. [nemo]

Megatron's own distributed save gathers tensor- and pipeline-parallel shards and the export table of the converters does the
rest, so that a folder published in training holds exactly what ``converters.nemo_to_hf`` would write from a checkpoint.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from converters.families import FAMILIES
from converters.hf_writing import save_shards
from converters.mapping import bind, hf_dims
from converters.nemo_weights import open_weights
from nemo_ampo.checkpoint.nemo_file import WEIGHTS_FOLDER
from nemo_ampo.model_folder.facts import read_facts
from nemo_ampo.model_folder.portable import make_portable


def publish_weights(model: Any, assets: Path, folder: Path) -> None:
    """Write the model's current weights and the policy's other files. Every rank of the job must call it.

    Args:
        model: a NeMo ``MegatronGPTModel``.
        assets: config.json, tokenizer and the like of the policy.
        folder: exists, is empty, and is seen by every rank.
    """
    shards = folder / WEIGHTS_FOLDER
    main = torch.distributed.get_rank() == 0
    if main:
        shards.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), str(shards))
    torch.distributed.barrier()
    if main:
        for file in assets.iterdir():
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        make_portable(folder)
        facts = read_facts(folder)
        bindings = bind(FAMILIES[facts.family].rows, facts)
        with open_weights(folder) as stored:
            stored.check(bindings, facts)
            save_shards(stored.hf_tensors(bindings, facts), hf_dims(bindings, facts), stored.dtype(), folder)
        shutil.rmtree(shards)
    torch.distributed.barrier()
