"""Evaluation of an exported checkpoint: ``python -m recipes.evaluate run.name=... run.checkpoint=... data.turns=...``."""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from nemo_ampo.config.reading import read_config
from nemo_ampo.config.stages import check_evaluate
from nemo_ampo.errors import UserError
from nemo_ampo.evaluate.config import EvaluateConfig
from nemo_ampo.output.terminal import show
from recipes.launch import main

PARTIAL = "not complete; the same command draws and asks for what is missing"


def run(cfg: DictConfig) -> bool:
    """Answer held-out turns with an exported checkpoint, judge the answers, print a table."""
    config = read_config(cfg, EvaluateConfig)
    check_evaluate(config, cfg)

    from nemo_ampo.compat import resolve_device
    from nemo_ampo.evaluate.held_out import evaluate
    from nemo_ampo.report.training.inputs import read_evaluation
    from nemo_ampo.report.training.tables import evaluation_table

    written, outcome = evaluate(config, resolve_device(config.run.device))
    for failure in outcome.failures:
        print(failure, file=sys.stderr)
    show(evaluation_table([read_evaluation(written)]), columns=80)
    print(outcome.line(), flush=True)
    if outcome.stopped is not None:
        raise UserError(outcome.stopped)
    return outcome.complete


if __name__ == "__main__":
    sys.exit(main("evaluate", run, unfinished=PARTIAL))
