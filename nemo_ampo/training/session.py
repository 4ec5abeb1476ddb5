"""Opening the NeMo side of a stage: trainer, model from a ``.nemo``, optimizer, checkpoints, resume. [nemo]

The order of calls is NeMo-Aligner's own (its example scripts); each recipe differs only in model class and data.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from nemo.utils.exp_manager import exp_manager
from nemo_aligner.utils.distributed import Timer
from nemo_aligner.utils.train_script_utils import (
    CustomLoggerWrapper,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_using_ptl,
    resolve_and_create_trainer,
)
from nemo_aligner.utils.utils import (
    load_from_nemo,
    remove_overwritten_fields,
    retrieve_model_state_dict_in_cpu,
)
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_ampo.checkpoint.config import CheckpointConfig
from nemo_ampo.checkpoint.nemo_file import (
    WEIGHTS_FOLDER,
    check_unpacked,
    load_overrides,
    plain_name,
    read_model_config,
    unpack_weights,
)
from nemo_ampo.checkpoint.nemo_writing import temporary_files_in
from nemo_ampo.checkpoint.pickles import check_pickles, check_precision
from nemo_ampo.checkpoint.saving import Resumed, Saver
from nemo_ampo.checkpoint.store import Store
from nemo_ampo.megatron.padding import mask_padded_vocab
from nemo_ampo.output.lock import Lock
from nemo_ampo.output.staging import place_with_room
from nemo_ampo.ranks import COLLECTIVE_TIMEOUT_S

UNPACK_PATIENCE_S = 3600.0
_UNPACKED = ".init-"


@dataclass(frozen=True)
class Keep:
    """Where a run's state is kept and what it may be continued by.

    Attributes:
        run_dir: run folder.
        config: where training checkpoints go and which stay.
        settings: what must not change over a resume, see :func:`nemo_ampo.checkpoint.run_identity.identity`.
    """

    run_dir: Path
    config: CheckpointConfig
    settings: Mapping[str, Any]


@dataclass
class Session:
    """Everything Aligner's trainers take.

    Attributes:
        model: built, restored, distributed.
        optimizer, scheduler: of the model.
        logger: NeMo's experiment loggers behind one call.
        ckpt_callback: saves in Megatron's distributed format; None for a session that only looks.
        run_timer: ends the run before ``exp_manager.max_time_per_run``.
        resumed: counters and log positions of the checkpoint the run continues from, or None.
    """

    model: Any
    optimizer: Any
    scheduler: Any
    logger: CustomLoggerWrapper
    ckpt_callback: Saver | None
    run_timer: Timer
    resumed: Resumed | None

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """What every Aligner trainer takes by these names."""
        names = ("model", "optimizer", "scheduler", "logger", "ckpt_callback", "run_timer")
        return {name: getattr(self, name) for name in names}


class _SizedRows(torch.utils.data.Dataset[int]):
    """NeMo counts the rows of a data set to place the learning-rate schedule; it never reads one."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> int:
        return index


def prepare_config(cfg: DictConfig, run_dir: Path, nemo_file: str, assets: Path, device: str) -> None:
    """Fill in what follows from the machine, the checkpoint and the run folder.

    Args:
        cfg: composed config, changed in place; ``model`` becomes the checkpoint's config under the recipe's.
        run_dir: run folder.
        nemo_file: checkpoint the stage starts from.
        assets: unpacked tokenizer files.
        device: ``cpu`` or ``gpu``.
    """
    # Read by us and not by NeMo, so that what was looked through is what counts.
    stored = OmegaConf.create(read_model_config(nemo_file))
    for name in ("target", "nemo_version"):
        stored.pop(name, None)
    fill_config(cfg, run_dir, stored, load_overrides(nemo_file, assets, device), device)


def fill_config(cfg: DictConfig, run_dir: Path, stored: DictConfig, overrides: Mapping[str, Any], device: str) -> None:
    """:func:`prepare_config` with the checkpoint's config, and what this machine wants other of it, at hand."""
    with open_dict(cfg):
        cfg.trainer.accelerator = device
        cfg.trainer.devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cfg.trainer.num_nodes = int(os.environ.get("WORLD_SIZE", "1")) // cfg.trainer.devices
        # A folder of its own: on a resume NeMo moves every file it finds there out of the way, our logs included.
        cfg.exp_manager.explicit_log_dir = f"{plain_name(run_dir)}/nemo"
        remove_overwritten_fields(stored, cfg.model.pop("overwrite_base_config", {}))
        cfg.model = OmegaConf.merge(stored, cfg.model, overrides)


def _unpack_once(nemo_file: Path, run_dir: Path) -> tuple[Path, Path]:
    """Weights of the starting policy where all ranks of this start see them. The first rank to come does it.

    Returns:
        The folder to load, which is ``nemo_file`` itself where that is one, and the folder to remove when all have loaded.

    Raises:
        UserError: the file is damaged, or would run code.
        DiskError: there is no room.
    """
    start = "".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")) or str(os.getpid())
    stat = nemo_file.stat()
    which = f"{start} {nemo_file} {stat.st_size} {stat.st_mtime_ns}"
    folder = run_dir / f"{_UNPACKED}{hashlib.sha256(which.encode()).hexdigest()[:16]}"
    source = nemo_file if nemo_file.is_dir() else folder
    with Lock(folder.with_suffix(".lock"), f"{folder}: unpacking", UNPACK_PATIENCE_S, temporary=True):
        if not (folder / "ready").exists():
            try:
                if source == nemo_file:
                    folder.mkdir(exist_ok=True)
                    check_unpacked(source)
                else:
                    place_with_room([run_dir], stat.st_size, f"{nemo_file}: unpacking it")
                    unpack_weights(nemo_file, folder)
                check_pickles(source / WEIGHTS_FOLDER, nemo_file)
                check_precision(source / WEIGHTS_FOLDER, nemo_file)
                (folder / "ready").touch()
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    return source, folder


def _remove_unpacked(folders: Iterable[Path]) -> None:
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def open_session(
    cfg: DictConfig,
    algorithm: str,
    model_class: type[Any],
    nemo_file: str | None,
    num_rows: int,
    keep_reference: bool,
    keep: Keep | None = None,
) -> Session:
    """Build the model from its checkpoint and restore the run's last state, if it has one.

    Args:
        cfg: prepared by :func:`prepare_config`.
        algorithm: ``sft`` or ``reinforce``.
        model_class: an Aligner model class.
        nemo_file: checkpoint the stage starts from; None for new weights.
        num_rows: of the training data.
        keep_reference: keep a copy of the starting weights as the reference policy.
        keep: None neither restores nor saves.
    """
    trainer = resolve_and_create_trainer(cfg, algorithm)
    # Of the default group and of Megatron's: NeMo passes it on. Lightning takes it in a constructor that NeMo calls without.
    trainer.strategy._timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    exp_manager(trainer, cfg.exp_manager)
    if nemo_file is None:
        model = model_class(cfg.model, trainer)
    else:
        # Unpacked once for all ranks, beside the run: NeMo would do it twice on each, in the system's temporary folder.
        run_dir = Path(cfg.exp_manager.explicit_log_dir).parent
        weights, unpacked = _unpack_once(Path(nemo_file), run_dir)
        with temporary_files_in(run_dir):
            model = load_from_nemo(model_class, cfg.model, trainer, strict=True, restore_path=str(weights))
        _remove_unpacked([unpacked])
    mask_padded_vocab(model)
    if keep_reference:
        # Taken before the resume: the reference is the checkpoint the stage started from, not the state it stopped in.
        model.init_policy_state_dict = retrieve_model_state_dict_in_cpu(
            model, megatron_amp_O2=cfg.model.get("megatron_amp_O2", False)
        )
    if os.environ.get("RANK", "0") == "0" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print(f"ranks: a collective that a rank does not join ends the job after {COLLECTIVE_TIMEOUT_S} s", file=sys.stderr)
    init_distributed(trainer, model, cfg.model.get("transformer_engine", False))
    rows = _SizedRows(num_rows)
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=cfg.model.global_batch_size)
    init_using_ptl(trainer, model, loader, rows)
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    saver = None
    if keep is not None:
        store = Store.of_run(keep.run_dir, keep.config)
        parts = (trainer.strategy, model, optimizer, scheduler)
        saver = Saver(store, keep.config, cfg.exp_manager.name, *parts, keep.settings, keep.run_dir)
    resumed = saver.restore() if saver else None
    if keep is not None:  # the run folder is ours now: what killed starts left there as well
        _remove_unpacked(keep.run_dir.glob(f"{_UNPACKED}*"))
    return Session(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        logger=CustomLoggerWrapper(trainer.loggers),
        ckpt_callback=saver,
        run_timer=Timer(cfg.exp_manager.get("max_time_per_run")),
        resumed=resumed,
    )
