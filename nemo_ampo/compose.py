"""From a name and overrides to one config: Hydra's composition of ``configs/<stage>/<name>.yaml``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from nemo_ampo.config import STAGES, default_keys, fill_preset
from nemo_ampo.errors import ConfigError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def compose(stage: str, name: str, overrides: Sequence[str], folder: Path | None = None) -> DictConfig:
    """Hydra's composition of ``configs/<stage>/<name>.yaml`` and the command line.

    Raises:
        ConfigError: unknown file or key.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    ConfigStore.instance().store(f"{stage}_keys", default_keys(STAGES[stage]))

    where = (folder or CONFIGS / stage).resolve()
    if not (where / f"{name}.yaml").is_file():
        known = ", ".join(sorted(p.stem for p in where.glob("*.yaml") if p.stem != "base"))
        raise ConfigError(f"--config-name {name}: no {where / name}.yaml; {stage} has {known}")
    try:
        with initialize_config_dir(str(where), version_base=None):
            cfg = hydra_compose(name, list(overrides))
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    fill_preset(cfg)
    return cfg
