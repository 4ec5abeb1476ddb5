"""All rules of a stage at once, for those who want to know before the stage runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig

from nemo_ampo.config.reading import read_config
from nemo_ampo.config.stages import STAGES, AmpoConfig, BcConfig, check_model


def check_stage(stage: str, cfg: DictConfig, world_size: int, *, files: bool = True) -> None:
    """What the stage itself would ask of its configuration before it loads anything.

    Args:
        stage: a key of :data:`STAGES`.
        cfg: composed config.
        world_size: number of ranks.
        files: ask also whether the files it names exist, and whether the model it starts from fits.

    Raises:
        ConfigError: naming the key.
    """
    from nemo_ampo.checkpoint.nemo_file import read_model_config

    keys = STAGES[stage]
    config: Any = read_config(cfg, keys.schema)
    with nullcontext(config) if files else _with_existing_files(config) as checked:
        keys.check(checked, cfg, world_size)
    if files and isinstance(config, BcConfig | AmpoConfig):
        check_model(config, cfg, read_model_config(config.run.init_from))


@contextmanager
def _with_existing_files(config: Any) -> Iterator[Any]:
    """The same config with paths that exist, so that all other rules still apply."""
    stand_ins = ("init_from", "train", "heldout", "turns", "system_prompt", "replay", "ca_file")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text("{}")

        def section(values: Any) -> Any:
            given = {f.name for f in fields(values) if getattr(values, f.name)}
            files = {name: str(file) for name in stand_ins if name in given}
            folders = {name: folder for name in ("checkpoint", "sotopia_dir", "tokenizer") if name in given}
            return replace(values, **files, **folders)

        named = [f.name for f in fields(config) if f.name in ("run", "data", "policy", "partner", "judge")]
        yield replace(config, **{name: section(getattr(config, name)) for name in named})
