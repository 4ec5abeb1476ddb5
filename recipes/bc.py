"""Behaviour cloning of the four modes: ``python -m recipes.bc --config-name tiny run.dir=... run.init_from=...``.

Starts from a converted checkpoint, ends with ``policy.nemo`` in the run folder, which carries the tokenizer files of the
start and the system prompt of the rows, so that later stages show the policy the same text.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_ampo.config.reading import read_config
from nemo_ampo.config.stages import BcConfig, check_bc, check_device, check_model, check_steps, positions
from nemo_ampo.output.lock import hold_run_with_all_ranks
from nemo_ampo.run.trackers import check_trackers, open_trackers
from nemo_ampo.run.watchdog import watch_ranks
from recipes.launch import main, world_size


def run(cfg: DictConfig) -> bool:
    """Clone the four thinking modes from examples."""
    config = read_config(cfg, BcConfig)
    check_bc(config, cfg, world_size())
    check_trackers(config.run)
    with hold_run_with_all_ranks(Path(config.run.dir)):
        return _clone(cfg, config)


def _clone(cfg: DictConfig, config: BcConfig) -> bool:
    from converters.model_config import check_architecture
    from nemo_ampo.checkpoint.nemo_file import read_model_config, unpack_assets
    from nemo_ampo.checkpoint.run_identity import check_resume, identity, inputs
    from nemo_ampo.data.bc import check_tokenizer, encode_bc_rows, read_bc_rows, system_prompt_of
    from nemo_ampo.errors import ConfigError
    from nemo_ampo.files import sha256_of
    from nemo_ampo.generate.overlap import check_no_overlap
    from nemo_ampo.model_folder.facts import read_facts
    from nemo_ampo.model_folder.loading import load_tokenizer
    from nemo_ampo.model_folder.policy_files import (
        check_vocabulary,
        record_stop_tokens,
        record_system_prompt,
        stop_token_ids,
    )
    from nemo_ampo.run.runlog import RunLog, write_provenance

    run_dir, data = Path(config.run.dir), config.data
    model_config = read_model_config(config.run.init_from)
    check_model(config, cfg, model_config)
    assets = unpack_assets(config.run.init_from, run_dir / "hf_assets")
    check_architecture(config.run.init_from, assets, cfg.model)
    tokenizer = load_tokenizer(assets)
    check_tokenizer(tokenizer)
    check_vocabulary(tokenizer, model_config)
    rows = read_bc_rows(data.train)
    if not data.allow_evaluation_scenarios:
        check_no_overlap(data.train)
    system_prompt = system_prompt_of(rows)
    train = encode_bc_rows(rows, tokenizer, data.max_tokens, data.on_too_long.value)
    heldout = encode_bc_rows(read_bc_rows(data.heldout), tokenizer, data.max_tokens, data.on_too_long.value)
    most = positions(cfg, model_config)
    longest = max(len(example.tokens) for example in (*train.examples, *heldout.examples))
    if longest > most:
        raise ConfigError(
            f"data.max_tokens: {data.max_tokens} lets rows of up to {longest} tokens through, the model has {most} "
            f"positions; set it to {most}"
        )
    prompt = max((example.prompt_len for example in heldout.examples[: data.heldout_replies]), default=0)
    if prompt and prompt + data.max_new_tokens > most:
        raise ConfigError(
            f"data.max_new_tokens: {data.max_new_tokens} after a held-out prompt of {prompt} tokens exceed the model's "
            f"{most} positions; set it to {most - prompt}"
        )
    if len(train.examples) < cfg.model.global_batch_size:
        raise ConfigError(
            f"model.global_batch_size: {cfg.model.global_batch_size} exceeds the {len(train.examples)} rows of data.train"
        )

    check_steps(cfg, len(train.examples) // cfg.model.global_batch_size)

    hashes = {path: sha256_of(path) for path in (data.train, data.heldout)}
    settings = identity(cfg, inputs(hashes, config.run.init_from, [e.tokens for e in train.examples]))
    check_resume(run_dir, config.checkpoint, settings, config.run.allow_changed)

    from nemo_ampo import compat

    device = compat.setup(config.run.device, config.run.verbose)
    check_device(cfg, device)
    watch_ranks(config.run.rank_timeout_s)

    import torch

    from nemo_ampo.checkpoint.nemo_file import on_rank_zero, save_nemo
    from nemo_ampo.job.plan import gpus_of_job
    from nemo_ampo.ranks import MegatronRanks
    from nemo_ampo.rollout.megatron import MegatronEngine
    from nemo_ampo.training.bc_model import BcModel
    from nemo_ampo.training.bc_trainer import BcParts, BcTrainer
    from nemo_ampo.training.session import Keep, open_session, prepare_config

    prepare_config(cfg, run_dir, config.run.init_from, assets, device)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)  # NeMo resolves it in place, which a path may not survive
    session = open_session(
        *(cfg, "sft", BcModel, config.run.init_from, len(train.examples), False),
        Keep(run_dir, config.checkpoint, settings),
    )
    ranks = MegatronRanks()
    gpus = gpus_of_job(torch.cuda.get_device_name(), world_size(), read_facts(assets)) if device == "gpu" else None

    def describe() -> None:
        # Before the first step, so that a checkpoint packed on the way carries them too.
        record_stop_tokens(assets, tokenizer)
        write_provenance(run_dir, resolved, hashes)
        if system_prompt is not None:
            record_system_prompt(assets, system_prompt)

    on_rank_zero(describe, run_dir)
    if train.dropped and ranks.is_main:
        print(f"dropped {len(train.dropped)} rows longer than data.max_tokens={data.max_tokens}", file=sys.stderr)
    first_step = session.resumed.counters["step"] if session.resumed else 0
    trackers = open_trackers(config.run, "bc", first_step, resolved) if ranks.is_main else []
    trainer = BcTrainer(
        parts=BcParts(
            train=train.examples,
            heldout=heldout.examples,
            tokenizer=tokenizer,
            engine=MegatronEngine(session.model, int(cfg.model.data.validation_ds.global_batch_size)),
            ranks=ranks,
            run_log=RunLog(run_dir, ranks.is_main, session.resumed.logs if session.resumed else None, trackers),
            data=data,
            stop_token_ids=stop_token_ids(assets, tokenizer),
            pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            seed=config.run.seed,
            gpus=gpus,
        ),
        cfg=cfg.trainer.sft,
        **session.trainer_arguments,
    )
    if session.resumed:
        trainer.load_state_dict(session.resumed.counters)
    if not trainer.fit():
        return False
    save_nemo(session.model, run_dir / "policy.nemo", assets)
    return True


if __name__ == "__main__":
    sys.exit(main("bc", run))
