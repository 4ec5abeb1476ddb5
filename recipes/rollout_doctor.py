"""Examine a rollout engine: ``python -m recipes.rollout_doctor --config-name NAME run.init_from=FILE.nemo ...``.

Takes the AMPO stage's configuration and reads its ``run``, ``rollout`` and NeMo sections; needs neither data nor judge.
Start it as the stage will be started: under srun with MPI for ``rollout.engine=trtllm``, on as many ranks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_ampo.config.compose import compose
from nemo_ampo.config.reading import NEMO_SECTIONS, read_config
from nemo_ampo.config.stages import check_parallel_layout, check_start
from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.output.lock import hold_run_with_all_ranks
from nemo_ampo.output.outcome import EXIT_USER_ERROR
from nemo_ampo.output.terminal import printable_output, show
from nemo_ampo.overrides import override
from nemo_ampo.ranks import settle_ranks
from nemo_ampo.rollout.config import RolloutConfig
from nemo_ampo.run.config import RunConfig
from recipes.launch import is_main_process, world_size
from recipes.start import read_start

QUESTIONS = (
    "Good morning.",
    "You want to sell your old bicycle for 80 and the buyer offers 50. What do you say?",
    "Your friend forgot your birthday and now asks for a favour. You like the friend, but you are hurt. Answer.",
    "Two colleagues both want the one free week in August. You are one of them. Begin the conversation.",
)
"""Prompts of unequal length; what is answered does not matter."""


@dataclass
class DoctorConfig:
    """The sections of the AMPO stage that an engine sees."""

    run: RunConfig
    rollout: RolloutConfig


def run(cfg: DictConfig) -> bool:
    """Examine the engine; True when nothing failed. Its files are its own, whatever else lies in ``run.dir``."""
    cfg.run.dir = str(Path(cfg.run.dir) / "rollout-doctor")
    kept = {name: cfg[name] for name in ("run", "rollout", *NEMO_SECTIONS)}
    config = read_config(OmegaConf.create(kept), DoctorConfig)  # type: ignore[type-var]
    from nemo_ampo.rollout import require_engine
    from nemo_ampo.rollout.config import check_rollout

    check_rollout(config.rollout)
    require_engine(config.rollout.engine)
    check_start(config.run.init_from)
    with hold_run_with_all_ranks(Path(config.run.dir)):
        return _examine(cfg, config)


def _examine(cfg: DictConfig, config: DoctorConfig) -> bool:
    from nemo_ampo.data.chat import encode_prompt
    from nemo_ampo.rollout import EngineSetup, make_engine

    split = cfg.model.tensor_model_parallel_size, cfg.model.pipeline_model_parallel_size
    start = read_start(config.run, lambda model: check_parallel_layout(model, *split))
    prompts = tuple(tuple(encode_prompt([{"role": "user", "content": q}], start.tokenizer)) for q in QUESTIONS)
    start.load_frameworks(cfg)

    from converters.live import publish_weights
    from nemo_ampo.ranks import MegatronRanks
    from nemo_ampo.rollout.doctor import Patient, examine, findings_table, parameters_of, verdict
    from nemo_ampo.rollout.probe import Probe
    from nemo_ampo.training.actor import AmpoActor
    from nemo_ampo.training.session import open_session

    session = open_session(cfg, "reinforce", AmpoActor, config.run.init_from, len(prompts), False)
    engine = make_engine(
        EngineSetup(
            model=session.model,
            rollout=config.rollout,
            decode=start.tokenizer.decode,
            ranks=MegatronRanks(),
            run_dir=Path(config.run.dir),
            publish=lambda model, folder: publish_weights(model, start.assets, folder),
        )
    )
    limits = config.rollout.probe
    patient = Patient(
        engine=engine,
        logprobs=lambda tokens_BT, mask_BT: session.model.get_inference_log_probs(tokens_BT.cuda(), mask_BT),
        parameters=lambda: parameters_of(session.model),
        probe=Probe(prompts, limits.new_tokens, limits.max_gap, start.stop_token_ids, start.pad_id),
        decode=start.tokenizer.decode,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    findings = list(examine(patient))
    engine.close()
    if is_main_process():
        show(findings_table(findings), columns=140)
        print(verdict(config.rollout.engine, findings))
    return all(finding.ok is not False for finding in findings)


@printable_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when nothing failed, 1 when something did, 2 for what the user can fix."""
    parser = argparse.ArgumentParser(prog="nemo-ampo rollout-doctor", description=run.__doc__)
    parser.add_argument("--config-name", default="tiny", help="a file of configs/ampo (default: tiny)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides; run.init_from is required")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="rollout-doctor-") as folder:
        try:
            settle_ranks()
            if world_size() > 1 and not any(o.startswith("run.dir=") for o in args.overrides):
                raise ConfigError("run.dir: several ranks need one folder that all of them see")
            return 0 if run(compose("ampo", args.config_name, [override("run.dir", folder), *args.overrides])) else 1
        except UserError as error:
            if is_main_process():
                print(f"error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
