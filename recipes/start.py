"""The policy that a stage starts from: what its files say, and NeMo and Megatron made ready to build it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from nemo_ampo.config.stages import check_device
from nemo_ampo.model_folder.facts import ModelFacts
from nemo_ampo.run.clock import Gpus
from nemo_ampo.run.config import RunConfig
from recipes.launch import world_size

if TYPE_CHECKING:
    from nemo_ampo.checkpoint.saving import Resumed
    from nemo_ampo.run.runlog import RunLog


@dataclass(frozen=True)
class Start:
    """A policy's files, looked through.

    Attributes:
        run: the stage's section.
        model: NeMo's config of it.
        assets: folder of its Hugging Face files, a copy in the run folder that the stage may add to.
        facts: of the model.
        tokenizer: fit to prompt it with.
        stop_token_ids: every id that ends a reply.
        pad_id: written behind replies.
    """

    run: RunConfig
    model: dict[str, Any]
    assets: Path
    facts: ModelFacts
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    pad_id: int

    def load_frameworks(self, cfg: DictConfig) -> tuple[str, Any]:
        """Get NeMo and Megatron ready to build the model.

        Returns:
            The device, ``cpu`` or ``gpu``, and the configuration with all that follows from the machine and the policy; a
            copy: NeMo resolves ``cfg`` in place, which a path may not survive.
        """
        from nemo_ampo import compat

        device = compat.setup(self.run.device, self.run.verbose)
        check_device(cfg, device)

        from nemo_ampo.training.session import prepare_config

        prepare_config(cfg, Path(self.run.dir), self.run.init_from, self.assets, device)
        return device, OmegaConf.to_container(cfg, resolve=True)

    def gpus(self, device: str) -> Gpus | None:
        """What the job's use of its cards is measured against; None on a CPU."""
        if device != "gpu":
            return None

        import torch

        from nemo_ampo.job.plan import gpus_of_job

        return gpus_of_job(torch.cuda.get_device_name(), world_size(), self.facts)

    def open_log(self, stage: str, resumed: Resumed | None, is_main: bool, resolved: Any) -> RunLog:
        """The run's log and its copies, where the run begins or goes on; of the main rank alone."""
        from nemo_ampo.run.runlog import RunLog
        from nemo_ampo.run.trackers import open_trackers

        first_step = resumed.counters["step"] if resumed else 0
        trackers = open_trackers(self.run, stage, first_step, resolved) if is_main else []
        positions, hashes = (resumed.logs, resumed.log_hashes) if resumed else (None, None)
        return RunLog(Path(self.run.dir), is_main, positions, hashes, trackers)

    def record(self, system: str | None, resolved: Any, data_hashes: Mapping[str, str]) -> None:
        """Leave in the run folder, from one rank, how the policy is prompted and what the run was started with.

        To be called before the first step, so that a checkpoint packed on the way carries it too.
        """
        from nemo_ampo.checkpoint.nemo_writing import on_rank_zero
        from nemo_ampo.model_folder.policy_files import record_stop_tokens, record_system_prompt
        from nemo_ampo.run.runlog import write_provenance

        run_dir = Path(self.run.dir)

        def write() -> None:
            record_stop_tokens(self.assets, self.tokenizer)
            if system is not None:
                record_system_prompt(self.assets, system)
            write_provenance(run_dir, resolved, data_hashes)

        on_rank_zero(write, run_dir)


def read_start(run: RunConfig, check: Callable[[dict[str, Any]], None]) -> Start:
    """Look through ``run.init_from``.

    Args:
        run: the stage's section.
        check: raises ConfigError when the stage cannot work with a model of this config of NeMo's.

    Raises:
        UserError: what is wrong with the file, the stage's keys for it, or its tokenizer.
    """
    from converters.model_config import check_architecture
    from nemo_ampo.checkpoint.nemo_file import read_model_config, unpack_assets
    from nemo_ampo.data.chat import check_tokenizer
    from nemo_ampo.model_folder.facts import read_facts
    from nemo_ampo.model_folder.loading import load_tokenizer
    from nemo_ampo.model_folder.policy_files import stop_token_ids

    model = read_model_config(run.init_from)
    check(model)
    assets = unpack_assets(run.init_from, Path(run.dir) / "hf_assets")
    check_architecture(run.init_from, assets)
    tokenizer = load_tokenizer(assets)
    check_tokenizer(tokenizer)
    return Start(
        run=run,
        model=model,
        assets=assets,
        facts=read_facts(assets),
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids(assets, tokenizer),
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
