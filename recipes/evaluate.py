"""Evaluation of an exported checkpoint: ``python -m recipes.evaluate run.name=... run.checkpoint=... data.turns=...``."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from nemo_ampo.config import EvaluateConfig, check_evaluate, read_config
from nemo_ampo.terminal import show
from recipes.launch import main


def run(cfg: DictConfig) -> bool:
    """Answer held-out turns with an exported checkpoint, judge the answers, print a table."""
    config = read_config(cfg, EvaluateConfig)
    check_evaluate(config, cfg)

    from nemo_ampo.compat import resolve_device
    from nemo_ampo.evaluation import evaluate
    from nemo_ampo.report import evaluation_table, read_evaluation

    evaluate(config, resolve_device(config.run.device))
    result = read_evaluation(Path(config.run.dir) / f"{config.run.name}.json")
    show(evaluation_table([result]), columns=80)
    return True


if __name__ == "__main__":
    sys.exit(main("evaluate", run))
