"""``nemo-ampo estimate`` and ``nemo-ampo check-judge``: the judge of a stage's configuration, before the stage runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nemo_ampo.errors import ConfigError
from nemo_ampo.judge.background import JudgeThread
from nemo_ampo.judge.client import Judge
from nemo_ampo.judge.estimate import REPLY_TOKENS, JudgeEstimate, estimate_calls, estimate_training, notes_on
from nemo_ampo.judge.injection import InjectionResult, measure_injections
from nemo_ampo.types import DialogueTurn

if TYPE_CHECKING:
    from rich.table import Table

STAGES = ("ampo", "evaluate")


def read_stage(stage: str, config_name: str, overrides: Sequence[str], folder: Path | None) -> tuple[Any, Any]:
    """Our typed configuration of a judged stage, and the whole composed one.

    Raises:
        ConfigError: another stage, or a bad configuration.
    """
    from nemo_ampo.config import stages
    from nemo_ampo.config.compose import compose
    from nemo_ampo.config.reading import read_config

    if stage not in STAGES:
        hint = (
            "; sotopia estimates itself: python -m recipes.sotopia ... run.estimate_only=true" if stage == "sotopia" else ""
        )
        raise ConfigError(f"STAGE: expected one of {', '.join(STAGES)}, got {stage!r}{hint}")
    raw = compose(stage, config_name, overrides, folder)
    return read_config(raw, stages.STAGES[stage].schema), raw


def read_stage_turns(stage: str, config: Any) -> list[DialogueTurn]:
    """The turns a stage's judge will be asked about.

    Raises:
        ConfigError, DataError: there are none.
    """
    from nemo_ampo.data.episodes import read_turns
    from nemo_ampo.dialogue.opening import write_opening_rows

    if stage == "evaluate":
        turns = read_turns(_existing("data.turns", config.data.turns))
        return turns[: config.data.limit] if config.data.limit >= 0 else turns
    if config.data.train is not None:
        return read_turns(_existing("data.train", config.data.train))
    if config.data.sotopia_dir is None:
        raise ConfigError("data.train, data.sotopia_dir: give exactly one of the two")
    with TemporaryDirectory() as folder:
        rows = Path(folder) / "opening_rows.json"
        write_opening_rows(config.data.sotopia_dir, rows)
        return read_turns(rows)


def estimate(
    stage: str,
    config_name: str,
    overrides: Sequence[str],
    folder: Path | None,
    tokenizer: Path | None,
    reply_tokens: int = REPLY_TOKENS,
) -> tuple[list[JudgeEstimate], list[str]]:
    """Estimates and notes for a stage; see :mod:`nemo_ampo.judge.estimate`."""
    config, raw = read_stage(stage, config_name, overrides, folder)
    turns, count = read_stage_turns(stage, config), _counter(tokenizer)
    if stage == "evaluate":
        calls = len(turns) * config.data.samples
        estimates, steps = [estimate_calls(config.judge, turns, calls, count, reply_tokens)], 1
    else:
        steps, rollout = int(raw.trainer.reinforce.max_steps), config.rollout
        samples = rollout.prompts_per_step * rollout.group_size
        estimates = estimate_training(config.judge, turns, steps, samples, count, reply_tokens)
    return estimates, notes_on(config.judge, estimates, steps)


def check_judge(
    stage: str, config_name: str, overrides: Sequence[str], folder: Path | None, num_turns: int
) -> list[InjectionResult]:
    """Attack the judge of a stage on some of its turns, spread over the data; see :mod:`nemo_ampo.judge.injection`.

    Raises:
        UserError: the judge cannot be reached, or has its budget spent.
    """
    config, _ = read_stage(stage, config_name, overrides, folder)
    turns = read_stage_turns(stage, config)
    chosen = [turns[i * len(turns) // num_turns] for i in range(num_turns)] if num_turns < len(turns) else turns
    with JudgeThread(Judge(config.judge)) as judge:
        judge.check()
        return measure_injections(judge, chosen)


def injection_table(results: Sequence[InjectionResult]) -> Table:
    """For the terminal."""
    from rich.table import Table

    table = Table(title="what an attack on the judge gains the speaker, points of 10", title_justify="left")
    for name in ("attack", "mean gain", "largest", "dialogues", "no verdict"):
        table.add_column(name, justify="left" if name == "attack" else "right")
    for row in results:
        gains = ["-" if gain is None else f"{gain:+.2f}" for gain in (row.gain, row.worst)]
        table.add_row(row.attack, *gains, str(row.dialogues), str(row.failed))
    return table


def _counter(folder: Path | None) -> Callable[[str], int] | None:
    if folder is None:
        return None
    from nemo_ampo.model_folder.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return lambda text: len(tokenizer.tokenize(text))


def _existing(key: str, path: str) -> str:
    if not Path(path).is_file():
        raise ConfigError(f"{key}: no such file: {path}")
    return path
