"""Behaviour cloning of the four modes: ``python -m recipes.bc --config-name tiny run.dir=... run.init_from=...``.

Starts from a converted checkpoint, ends with ``policy.nemo`` in the run folder, which carries the tokenizer files of the
start and the system prompt of the rows, so that later stages show the policy the same text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from nemo_ampo.config.compose import compose
from nemo_ampo.config.reading import read_config
from nemo_ampo.config.stages import BcConfig, check_bc, check_model, check_steps
from nemo_ampo.errors import ConfigError
from nemo_ampo.output.lock import hold_run_with_all_ranks
from nemo_ampo.run.trackers import check_trackers
from nemo_ampo.run.watchdog import watch_ranks
from recipes.launch import main, world_size
from recipes.start import read_start

if TYPE_CHECKING:
    from nemo_ampo.data.bc import BcExample


def run(cfg: DictConfig) -> bool:
    """Clone the four thinking modes from examples."""
    config = read_config(cfg, BcConfig)
    check_bc(config, cfg, world_size())
    check_trackers(config.run)
    with hold_run_with_all_ranks(Path(config.run.dir), config.checkpoint.dir):
        return _clone(cfg, config)


def _clone(cfg: DictConfig, config: BcConfig) -> bool:
    from nemo_ampo.checkpoint.run_identity import check_resume, identity, inputs
    from nemo_ampo.data.bc import encode_bc_rows, read_bc_rows, system_prompt_of
    from nemo_ampo.files import sha256_of
    from nemo_ampo.generate.overlap import check_no_overlap

    run_dir, data = Path(config.run.dir), config.data
    start = read_start(config.run, lambda model: check_model(config, cfg, model))
    rows = read_bc_rows(data.train)
    if not data.allow_evaluation_scenarios:
        check_no_overlap(data.train)
    train = encode_bc_rows(rows, start.tokenizer, data.max_tokens, data.on_too_long.value)
    heldout = encode_bc_rows(read_bc_rows(data.heldout), start.tokenizer, data.max_tokens, data.on_too_long.value)
    check_lengths(config, cfg, int(start.model["max_position_embeddings"]), train.examples, heldout.examples)
    check_steps(cfg, len(train.examples) // cfg.model.global_batch_size)

    hashes = {path: sha256_of(path) for path in (data.train, data.heldout)}
    settings = identity(cfg, inputs(hashes, config.run.init_from, [e.tokens for e in train.examples]))
    check_resume(run_dir, config.checkpoint, settings, config.run.allow_changed, identity(compose("bc", "base", []), {}))

    device, resolved = start.load_frameworks(cfg)
    watch_ranks(config.run.rank_timeout_s)

    from nemo_ampo.checkpoint.nemo_writing import save_nemo
    from nemo_ampo.ranks import MegatronRanks
    from nemo_ampo.rollout.megatron import MegatronEngine
    from nemo_ampo.training.bc_model import BcModel
    from nemo_ampo.training.bc_trainer import BcParts, BcTrainer
    from nemo_ampo.training.session import Keep, open_session

    session = open_session(
        *(cfg, "sft", BcModel, config.run.init_from, len(train.examples), False),
        Keep(run_dir, config.checkpoint, settings),
    )
    ranks, resumed = MegatronRanks(), session.resumed
    start.record(system_prompt_of(rows), resolved, hashes)
    for name, encoded in (("train", train), ("heldout", heldout)):
        if encoded.dropped and ranks.is_main:
            dropped, longer = len(encoded.dropped), f"longer than data.max_tokens={data.max_tokens}"
            print(f"dropped {dropped} of {dropped + len(encoded.examples)} rows of data.{name}, {longer}", file=sys.stderr)
    trainer = BcTrainer(
        parts=BcParts(
            train=train.examples,
            heldout=heldout.examples,
            tokenizer=start.tokenizer,
            engine=MegatronEngine(session.model, int(cfg.model.data.validation_ds.global_batch_size)),
            ranks=ranks,
            run_log=start.open_log("bc", resumed, ranks.is_main, resolved),
            data=data,
            stop_token_ids=start.stop_token_ids,
            pad_id=start.pad_id,
            seed=config.run.seed,
            gpus=start.gpus(device),
        ),
        cfg=cfg.trainer.sft,
        **session.trainer_arguments,
    )
    if ranks.is_main and trainer.max_steps < cfg.trainer.sft.max_steps:
        sft, ends = cfg.trainer.sft, f"ends this after {trainer.max_steps} steps of {len(train.examples)} rows"
        print(f"trainer.sft.max_epochs={sft.max_epochs} {ends}, before max_steps={sft.max_steps}", file=sys.stderr)
    if resumed:
        trainer.load_state_dict(resumed.counters)
    if not trainer.fit():
        return False
    save_nemo(session.model, run_dir / "policy.nemo", start.assets)
    return True


def check_lengths(
    config: BcConfig, cfg: DictConfig, most: int, train: Sequence[BcExample], heldout: Sequence[BcExample]
) -> None:
    """Do the rows fit the model's positions, and are there enough for a batch?

    Raises:
        ConfigError: naming the key and the value that fits.
    """
    data = config.data
    longest = max(len(example.tokens) for example in (*train, *heldout))
    if longest > most:
        raise ConfigError(
            f"data.max_tokens: {data.max_tokens} lets rows of up to {longest} tokens through, the model has {most} "
            f"positions; set it to {most}"
        )
    prompt = max((example.prompt_len for example in heldout[: data.heldout_replies]), default=0)
    if prompt and prompt + data.max_new_tokens > most:
        raise ConfigError(
            f"data.max_new_tokens: {data.max_new_tokens} after a held-out prompt of {prompt} tokens exceed the model's "
            f"{most} positions; set it to {most - prompt}"
        )
    if len(train) < cfg.model.global_batch_size:
        raise ConfigError(
            f"model.global_batch_size: {cfg.model.global_batch_size} exceeds the {len(train)} rows of data.train"
        )


if __name__ == "__main__":
    sys.exit(main("bc", run))
