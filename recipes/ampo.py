"""Adaptive mode policy optimisation: ``python -m recipes.ampo --config-name tiny run.dir=... run.init_from=...``.

Starts from the cloned policy, which is also the reference; ends with ``policy.nemo`` in the run folder. One step reads in
:mod:`nemo_ampo.step`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from nemo_ampo.config.compose import compose
from nemo_ampo.config.reading import read_config
from nemo_ampo.config.stages import AmpoConfig, check_ampo, check_model
from nemo_ampo.errors import ConfigError, DataError
from nemo_ampo.output.lock import hold_run_with_all_ranks
from nemo_ampo.run.trackers import check_trackers
from nemo_ampo.run.watchdog import watch_ranks
from nemo_ampo.types import DialogueTurn, Prompt
from recipes.launch import is_main_process, main, world_size
from recipes.start import Start, read_start

if TYPE_CHECKING:
    from nemo_ampo.judge.background import JudgeThread
    from nemo_ampo.run.clock import Gpus
    from nemo_ampo.training.session import Session
    from nemo_ampo.training.trainer import AmpoTrainer


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
    with hold_run_with_all_ranks(Path(config.run.dir), config.checkpoint.dir):
        return _train(cfg, config)


def _train(cfg: DictConfig, config: AmpoConfig) -> bool:
    from nemo_ampo.checkpoint.run_identity import check_resume, identity, inputs, verdict_identity
    from nemo_ampo.judge.job import open_judge
    from nemo_ampo.model_folder.policy_files import system_prompt
    from nemo_ampo.rehearse.sizes import parameters_of
    from nemo_ampo.rollout import require_engine_room

    run_dir = Path(config.run.dir)
    start = read_start(config.run, lambda model: check_model(config, cfg, model))
    if config.rollout.engine == "trtllm":
        require_engine_room(config.rollout.trtllm, parameters_of(start.facts), cfg.model.tensor_model_parallel_size)
    system = system_prompt(start.assets, config.data.system_prompt)
    turns, data_hashes = read_training_turns(config)
    prompts = encode_turns(turns, start.tokenizer, system, config)
    read = inputs(data_hashes, config.run.init_from, [p.token_ids for p in prompts])
    settings = identity(cfg, read | verdict_identity(config.judge))
    check_resume(run_dir, config.checkpoint, settings, config.run.allow_changed, identity(compose("ampo", "base", []), {}))
    if len(prompts) < config.rollout.prompts_per_step:
        raise ConfigError(
            f"rollout.prompts_per_step: {config.rollout.prompts_per_step} exceeds the {len(prompts)} rows of the data"
        )

    # Before the first thing that the other ranks wait for.
    watch_ranks(config.run.rank_timeout_s)
    with open_judge(config.judge, run_dir) as judge:
        judge.check()
        device, resolved = start.load_frameworks(cfg)

        from nemo_ampo.checkpoint.nemo_writing import save_nemo
        from nemo_ampo.training.actor import AmpoActor
        from nemo_ampo.training.session import Keep, open_session

        session = open_session(
            *(cfg, "reinforce", AmpoActor, config.run.init_from, len(prompts), config.algorithm.uses_reference),
            Keep(run_dir, config.checkpoint, settings),
        )
        session.model.algorithm = config.algorithm
        start.record(system, resolved, data_hashes)
        if not make_trainer(config, cfg, start, session, prompts, judge, start.gpus(device), resolved).fit():
            return False
        save_nemo(session.model, run_dir / "policy.nemo", start.assets)
    return True


def make_trainer(
    config: AmpoConfig,
    cfg: DictConfig,
    start: Start,
    session: Session,
    prompts: Sequence[Prompt],
    judge: JudgeThread,
    gpus: Gpus | None,
    resolved: Any,
) -> AmpoTrainer:
    """The loop and all that a step needs, where the run begins or goes on."""
    from converters.live import publish_weights
    from nemo_ampo.judge.second import SecondJudge
    from nemo_ampo.ranks import MegatronRanks
    from nemo_ampo.rollout import EngineSetup, make_engine
    from nemo_ampo.rollout.probe import Probe
    from nemo_ampo.step import Parts
    from nemo_ampo.training.trainer import AmpoTrainer

    run_dir, ranks, resumed, probe = Path(config.run.dir), MegatronRanks(), session.resumed, config.rollout.probe
    engine = make_engine(
        EngineSetup(
            model=session.model,
            rollout=config.rollout,
            decode=start.tokenizer.decode,
            ranks=ranks,
            run_dir=run_dir,
            publish=lambda model, folder: publish_weights(model, start.assets, folder),
        )
    )
    fixed = tuple(p.token_ids for p in prompts[: probe.prompts])
    trainer = AmpoTrainer(
        prompts=prompts,
        parts=Parts(
            engine=engine,
            judge=judge,
            tokenizer=start.tokenizer,
            ranks=ranks,
            rollout=config.rollout,
            reward=config.reward,
            algorithm=config.algorithm,
            guard=config.guard,
            stop_token_ids=start.stop_token_ids,
            pad_id=start.pad_id,
            seed=config.run.seed,
            gpus=gpus,
            probe=Probe(fixed, probe.new_tokens, probe.max_gap, start.stop_token_ids, start.pad_id),
        ),
        run_log=start.open_log("ampo", resumed, ranks.is_main, resolved),
        log_rollouts=config.run.log_rollouts,
        second=SecondJudge(judge, config.judge.second, config.run.seed) if config.judge.second else None,
        cfg=cfg.trainer.reinforce,
        **session.trainer_arguments,
    )
    if resumed:
        trainer.load_state_dict(resumed.counters)
    return trainer


if __name__ == "__main__":
    sys.exit(main("ampo", run))
