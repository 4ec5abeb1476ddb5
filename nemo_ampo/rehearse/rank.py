"""One rank of a stage, built and carried out without its machine, in a process of its own. [nemo]"""

from __future__ import annotations

import resource
import tempfile
import time
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_ampo.rehearse.collectives import Recorder
from nemo_ampo.rehearse.report import RankReport
from nemo_ampo.rehearse.world import be_alone, make_gpu, set_rank, without_values

recorder = Recorder()


@dataclass(frozen=True)
class Rehearsal:
    """What is to be carried out.

    Attributes:
        stage: ``bc`` or ``ampo``.
        cfg: composed config.
        model: config of NeMo's model, as a converted checkpoint holds it.
        nodes, gpus: of the job, per node.
        tokens: of the longest row.
        rows: in a micro-batch of rows of that length.
        micro_batches: of an update, on each replica.
        shares: lengths of the rows that are tried, as parts of the longest.
    """

    stage: str
    cfg: DictConfig
    model: Mapping[str, Any]
    nodes: int
    gpus: int
    tokens: int
    rows: int
    micro_batches: int
    shares: tuple[float, ...] = (0.5, 1.0)

    @property
    def on_gpu(self) -> bool:
        """Whether the stage would run on GPUs."""
        return str(self.cfg.run.device) != "cpu"


def prepare(on_gpu: bool) -> None:
    """Import the frameworks as a rehearsal needs them; once, before :func:`rehearse_rank` in forked processes."""
    from nemo_ampo import compat
    from nemo_ampo.compat import cpu

    if on_gpu:
        cpu.device = make_gpu()
    be_alone(cpu.device.type)
    recorder.install()
    compat.setup("cpu")

    from nemo_ampo.rehearse import gpu_layers, stage

    assert stage  # imported for the forks
    if on_gpu:
        gpu_layers.install()


def rehearse_rank(plan: Rehearsal, rank: int) -> RankReport:
    """Carry out the stage as this rank; once per process."""
    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="rehearse-") as folder, without_values():
        set_rank(rank, plan.nodes * plan.gpus, plan.gpus)
        recorder.device = device = "gpu" if plan.on_gpu else "cpu"
        return carried_out(plan, rank, device, Path(folder), began)


def carried_out(plan: Rehearsal, rank: int, device: str, folder: Path, began: float) -> RankReport:
    """The passes of this rank, with the frameworks imported.

    Args:
        plan: what to carry out.
        rank: of the job.
        device: type of the device whose memory is counted.
        folder: for what the frameworks write.
        began: seconds of a core at the beginning.
    """
    from nemo.collections.nlp.models.language_modeling.megatron_base_model import MegatronBaseModel

    from nemo_ampo.config.reading import read_config
    from nemo_ampo.config.stages import STAGES
    from nemo_ampo.megatron import forward
    from nemo_ampo.rehearse import stage
    from nemo_ampo.rehearse.ledger import MemoryLedger
    from nemo_ampo.training.actor import AmpoActor
    from nemo_ampo.training.bc_model import BcModel
    from nemo_ampo.training.session import fill_config, open_session

    cfg, is_ampo = OmegaConf.create(plan.cfg), plan.stage == "ampo"
    config: Any = read_config(cfg, STAGES[plan.stage].schema)
    fill_config(cfg, folder, OmegaConf.create(dict(plan.model)), {"transformer_engine": False}, "cpu")
    size = plan.nodes * plan.gpus // (cfg.model.tensor_model_parallel_size * cfg.model.pipeline_model_parallel_size)
    rows = plan.micro_batches * plan.rows
    with open_dict(cfg):
        cfg.model.global_batch_size = rows * size

    def no_tokenizer(model: Any) -> None:
        model.tokenizer = types.SimpleNamespace(vocab_size=plan.model["hf_vocab_size"], eos_id=0, pad_id=0)

    MegatronBaseModel._build_tokenizer = no_tokenizer
    ledger = MemoryLedger(device)
    watch = stage.Watch(ledger.take_peak, recorder.take, ledger)
    with ledger:
        session = open_session(
            *(cfg, "reinforce" if is_ampo else "sft", AmpoActor if is_ampo else BcModel, None, rows * size),
            is_ampo and config.algorithm.uses_reference,
        )
        model = session.model
        stage.tell_parts_apart(model, session.optimizer, ledger)
        passes = {}
        trainer: Any = stage.ampo_trainer(session, cfg, config) if is_ampo else None
        for share in plan.shares:
            tokens = int(plan.tokens * share)
            # What it would find out from a mask, which has no values here: of each row all tokens count.
            forward.needed_tokens = partial(_all_tokens, tokens)
            if plan.cfg.model.tokens_per_micro_batch:
                with open_dict(model.cfg):
                    model.cfg.tokens_per_micro_batch = plan.rows * tokens
            if is_ampo:
                passes[share] = stage.ampo_passes(trainer, rows, tokens, watch)
            else:
                passes[share] = stage.bc_passes(stage.bc_trainer(session, cfg, config, tokens), watch)
        decoding = None
        if is_ampo and str(config.rollout.engine) == "megatron":
            limits = config.rollout
            decoding = stage.decoding(model, limits.batch_size, limits.max_prompt_tokens, limits.max_new_tokens, watch)
    parameters = sum(p.numel() for module in model.get_model_module_list() for p in module.parameters())
    own_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return RankReport(rank, parameters, passes, decoding, time.process_time() - began, own_bytes)


def _all_tokens(tokens: int, mask_BT: Any) -> list[int]:
    return [tokens] * len(mask_BT)
