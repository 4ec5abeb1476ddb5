"""SOTOPIA evaluation: ``python -m recipes.sotopia --config-name self_play run.dir=... data.sotopia_dir=... ...``."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from nemo_ampo.config.reading import read_config
from nemo_ampo.errors import UserError
from nemo_ampo.output.terminal import show
from nemo_ampo.sotopia.config import SotopiaConfig, check_sotopia
from recipes.launch import main

PARTIAL = "not complete; the same command plays and scores what is missing (all of the subset without run.limit)"


def run(cfg: DictConfig) -> bool:
    """Play and score SOTOPIA episodes; the same command continues a folder that is not complete."""
    config = read_config(cfg, SotopiaConfig)
    check_sotopia(config)

    from nemo_ampo.commands.sotopia_report import report
    from nemo_ampo.sotopia.estimate import estimate_table
    from nemo_ampo.sotopia.plan import make_plan
    from nemo_ampo.sotopia.run import estimate, evaluate

    plan = make_plan(config)
    show(estimate_table(estimate(plan)), columns=80)
    if plan.unlike_published is not None:
        print(f"{plan.unlike_published}; the run will be PARTIAL unless data.set=own says so", file=sys.stderr)
    if config.run.estimate_only:
        return True
    outcome = evaluate(plan)
    for failure in outcome.failures:
        print(failure, file=sys.stderr)
    lines, partial = list[str](), True
    if outcome.begun:
        table, lines, partial = report([Path(config.run.dir)], judge=config.judge.name)
        show(table, columns=80)
    for line in (*lines, outcome.line()):
        print(line, flush=True)
    if outcome.stopped is not None:
        raise UserError(outcome.stopped)
    return outcome.complete and not partial


if __name__ == "__main__":
    sys.exit(main("sotopia", run, unfinished=PARTIAL))
