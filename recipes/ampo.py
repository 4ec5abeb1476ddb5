"""Adaptive mode policy optimisation: ``python -m recipes.ampo --config-name tiny run.dir=... run.init_from=...``.

Starts from the cloned policy, which is also the reference; ends with ``policy.nemo`` in the run folder. One step reads in
:mod:`nemo_ampo.step`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_ampo.config.reading import read_config
from nemo_ampo.config.stages import AmpoConfig, check_ampo, check_device, check_model
from nemo_ampo.errors import ConfigError, DataError
from nemo_ampo.output.lock import hold_run_with_all_ranks
from nemo_ampo.run.trackers import check_trackers, open_trackers
from nemo_ampo.run.watchdog import watch_ranks
from nemo_ampo.step import Parts
from nemo_ampo.types import DialogueTurn, Prompt
from recipes.launch import is_main_process, main, world_size


def read_training_turns(config: AmpoConfig) -> tuple[list[DialogueTurn], dict[str, str]]:
    """The turns to train on, from rows or from a SOTOPIA folder's opening scenes, and the sha256 of what was read."""
    from nemo_ampo.data.episodes import read_turns
    from nemo_ampo.dialogue.opening import write_opening_rows
    from nemo_ampo.files import sha256_of
    from nemo_ampo.generate.overlap import check_no_overlap

    if config.data.train is not None:
        if not config.data.allow_evaluation_scenarios:
            check_no_overlap(config.data.train)
        return read_turns(config.data.train), {config.data.train: sha256_of(config.data.train)}
    assert config.data.sotopia_dir is not None
    rows = Path(config.run.dir) / "opening_rows.json"
    meta = write_opening_rows(config.data.sotopia_dir, rows)
    if is_main_process():
        print(meta["note"], file=sys.stderr)
    return read_turns(rows), meta["sha256"]


def encode_turns(turns: list[DialogueTurn], tokenizer: Any, system: str, config: AmpoConfig) -> list[Prompt]:
    """Prompts as the policy sees them.

    Raises:
        DataError: a prompt is longer than ``rollout.max_prompt_tokens``.
    """
    from nemo_ampo.data.chat import encode_prompt
    from nemo_ampo.data.episodes import chat_messages

    prompts = []
    for turn in turns:
        ids = encode_prompt(chat_messages(turn, system), tokenizer)
        if len(ids) > config.rollout.max_prompt_tokens:
            raise DataError(
                f"{config.data.train or config.data.sotopia_dir}: row {turn.row_id}: prompt of {len(ids)} tokens exceeds "
                f"rollout.max_prompt_tokens={config.rollout.max_prompt_tokens}"
            )
        prompts.append(Prompt(turn, tuple(ids)))
    return prompts


def run(cfg: DictConfig) -> bool:
    """Teach a cloned policy when to think."""
    config = read_config(cfg, AmpoConfig)
    check_ampo(config, cfg, world_size())
    check_trackers(config.run)

    from nemo_ampo.rollout import require_engine

    require_engine(config.rollout.engine)
    with hold_run_with_all_ranks(Path(config.run.dir)):
        return _train(cfg, config)


def _train(cfg: DictConfig, config: AmpoConfig) -> bool:
    from converters.model_config import check_architecture
    from nemo_ampo.checkpoint.nemo_file import read_model_config, unpack_assets
    from nemo_ampo.checkpoint.run_identity import check_resume, identity, inputs, verdict_identity
    from nemo_ampo.data.chat import check_tokenizer
    from nemo_ampo.job.plan import gpus_of_job
    from nemo_ampo.judge.job import open_judge
    from nemo_ampo.model_folder.facts import read_facts
    from nemo_ampo.model_folder.loading import load_tokenizer
    from nemo_ampo.model_folder.policy_files import (
        check_vocabulary,
        record_stop_tokens,
        record_system_prompt,
        stop_token_ids,
        system_prompt,
    )
    from nemo_ampo.rehearse.sizes import parameters_of
    from nemo_ampo.rollout import require_engine_room

    run_dir = Path(config.run.dir)
    model_config = read_model_config(config.run.init_from)
    check_model(config, cfg, model_config)
    assets = unpack_assets(config.run.init_from, run_dir / "hf_assets")
    check_architecture(config.run.init_from, assets, cfg.model)
    facts = read_facts(assets)
    if config.rollout.engine == "trtllm":
        require_engine_room(config.rollout.trtllm, parameters_of(facts), cfg.model.tensor_model_parallel_size)
    tokenizer = load_tokenizer(assets)
    check_tokenizer(tokenizer)
    check_vocabulary(tokenizer, model_config)
    system = system_prompt(assets, config.data.system_prompt)
    turns, data_hashes = read_training_turns(config)
    prompts = encode_turns(turns, tokenizer, system, config)
    read = inputs(data_hashes, config.run.init_from, [p.token_ids for p in prompts])
    settings = identity(cfg, read | verdict_identity(config.judge))
    check_resume(run_dir, config.checkpoint, settings, config.run.allow_changed)
    if len(prompts) < config.rollout.prompts_per_step:
        raise ConfigError(
            f"rollout.prompts_per_step: {config.rollout.prompts_per_step} exceeds the {len(prompts)} rows of the data"
        )

    # Before the first thing that the other ranks wait for.
    watch_ranks(config.run.rank_timeout_s)
    with open_judge(config.judge, run_dir) as judge:
        judge.check()

        from nemo_ampo import compat

        device = compat.setup(config.run.device, config.run.verbose)
        check_device(cfg, device)

        import torch

        from converters.live import publish_weights
        from nemo_ampo.checkpoint.nemo_file import on_rank_zero, save_nemo
        from nemo_ampo.judge.second import SecondJudge
        from nemo_ampo.ranks import MegatronRanks
        from nemo_ampo.rollout import EngineSetup, make_engine
        from nemo_ampo.rollout.probe import Probe
        from nemo_ampo.run.runlog import RunLog, write_provenance
        from nemo_ampo.training.actor import AmpoActor
        from nemo_ampo.training.session import Keep, open_session, prepare_config
        from nemo_ampo.training.trainer import AmpoTrainer

        prepare_config(cfg, run_dir, config.run.init_from, assets, device)
        resolved: Any = OmegaConf.to_container(cfg, resolve=True)  # NeMo resolves it in place, which a path may not survive
        session = open_session(
            *(cfg, "reinforce", AmpoActor, config.run.init_from, len(prompts), config.algorithm.uses_reference),
            Keep(run_dir, config.checkpoint, settings),
        )
        session.model.algorithm = config.algorithm
        ranks = MegatronRanks()
        gpus = gpus_of_job(torch.cuda.get_device_name(), world_size(), facts) if device == "gpu" else None
        first_step = session.resumed.counters["step"] if session.resumed else 0

        def describe() -> None:
            # Before the first step, so that a checkpoint packed on the way carries them too.
            record_stop_tokens(assets, tokenizer)
            record_system_prompt(assets, system)
            write_provenance(run_dir, resolved, data_hashes)

        on_rank_zero(describe, run_dir)
        trackers = open_trackers(config.run, "ampo", first_step, resolved) if ranks.is_main else []
        stops = stop_token_ids(assets, tokenizer)
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        engine = make_engine(
            EngineSetup(
                model=session.model,
                rollout=config.rollout,
                decode=tokenizer.decode,
                ranks=ranks,
                run_dir=run_dir,
                publish=lambda model, folder: publish_weights(model, assets, folder),
            )
        )
        fixed = tuple(p.token_ids for p in prompts[: config.rollout.probe.prompts])
        trainer = AmpoTrainer(
            prompts=prompts,
            parts=Parts(
                engine=engine,
                judge=judge,
                tokenizer=tokenizer,
                ranks=ranks,
                rollout=config.rollout,
                reward=config.reward,
                algorithm=config.algorithm,
                guard=config.guard,
                stop_token_ids=stops,
                pad_id=pad_id,
                seed=config.run.seed,
                gpus=gpus,
                probe=Probe(fixed, config.rollout.probe.new_tokens, config.rollout.probe.max_gap, stops, pad_id),
            ),
            run_log=RunLog(run_dir, ranks.is_main, session.resumed.logs if session.resumed else None, trackers),
            log_rollouts=config.run.log_rollouts,
            second=SecondJudge(judge, config.judge.second, config.run.seed) if config.judge.second else None,
            cfg=cfg.trainer.reinforce,
            **session.trainer_arguments,
        )
        if session.resumed:
            trainer.load_state_dict(session.resumed.counters)
        if not trainer.fit():
            return False
        save_nemo(session.model, run_dir / "policy.nemo", assets)
    return True


if __name__ == "__main__":
    sys.exit(main("ampo", run))
