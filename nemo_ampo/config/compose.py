"""From a name and overrides to one config: Hydra's composition of ``configs/<stage>/<name>.yaml``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from nemo_ampo.config.nemo_keys import OPTIONAL
from nemo_ampo.config.reading import NEMO_SECTIONS, default_keys, fill_preset
from nemo_ampo.config.stages import STAGES
from nemo_ampo.config.typed import meant
from nemo_ampo.errors import ConfigError
from nemo_ampo.files import shipped
from nemo_ampo.overrides import as_typed, override

CONFIGS = shipped("configs")


_NO_SUCH_KEY = re.compile(r"Could not override '([^']+)'")


def compose(stage: str, name: str, overrides: Sequence[str], folder: Path | None = None) -> DictConfig:
    """Hydra's composition of ``configs/<stage>/<name>.yaml`` and the command line.

    Raises:
        ConfigError: unknown file or key, or a ``${...}`` that stands for nothing.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    ConfigStore.instance().store(f"{stage}_keys", default_keys(STAGES[stage].schema))

    where = (folder or CONFIGS / stage).resolve()
    if not (where / f"{name}.yaml").is_file():
        known = ", ".join(sorted(p.stem for p in where.glob("*.yaml") if p.stem != "base"))
        raise ConfigError(f"--config-name {name}: no {where / name}.yaml; {stage} has {known}")
    overrides = [as_typed(given, lambda key: _is_text(stage, key)) for given in overrides]
    with initialize_config_dir(str(where), version_base=None):
        try:
            cfg = hydra_compose(name, list(overrides))
        except HydraException as error:
            said = " ".join(str(error).split())
            unknown = _NO_SUCH_KEY.match(said)
            # Hydra's own advice, to add the key, ends at a key that nothing reads.
            raise ConfigError(_unknown_key(hydra_compose(name), unknown[1]) if unknown else said) from None
    _refuse_unknown_keys(cfg, OmegaConf.load(CONFIGS / stage / "base.yaml"))
    fill_preset(cfg)
    _refuse_dangling(cfg)
    return cfg


def _is_text(stage: str, key: str) -> bool:
    """Whether a key of our own sections holds text."""
    section, _, rest = key.partition(".")
    hint = get_type_hints(STAGES[stage].schema).get(section)
    for name in rest.split("."):
        hint = get_type_hints(hint).get(name) if is_dataclass(hint) else None
    return hint is str or hint == str | None


def _refuse_dangling(node: Any) -> None:
    """Find what names a key or a resolver that is not there, which is often a path that only looks as if it did.

    Raises:
        ConfigError: naming the key, with the form in which the text means itself.
    """
    for key in node if OmegaConf.is_dict(node) else range(len(node)):
        inner = node._get_node(key)
        if OmegaConf.is_config(inner) and not (inner._is_none() or inner._is_missing() or inner._is_interpolation()):
            _refuse_dangling(inner)
        elif inner._is_interpolation():
            try:
                node[key]
            except InterpolationToMissingValueError:
                pass  # said where the missing value is asked for
            except OmegaConfBaseException as error:
                meant = shlex.quote(override(node._get_full_key(key), inner._value()))
                raise ConfigError(f"{node._get_full_key(key)}: {_first_line(error)}; to mean it as it is: {meant}") from None


def _unknown_key(cfg: DictConfig, key: str) -> str:
    """In words, the first part of a dotted key that a config has not."""
    node: Any = cfg
    path = list[str]()
    for part in key.split("."):
        path.append(part)
        if part not in node.keys():  # noqa: SIM118 - a key without a value yet is not "in" it
            if not len(node):
                return f"{key}: nothing is there yet; +{key}=... adds it"
            return f"{'.'.join(path)}: no such key; {meant(part, [str(name) for name in node])}"
        node = node._get_node(part)
        if not isinstance(node, DictConfig):
            break
    if isinstance(node, DictConfig):
        return f"{key}: +{key}.NAME=... adds to it"
    return f"{key}: no such key; {'.'.join(path)} holds none"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _refuse_unknown_keys(cfg: DictConfig, base: Any) -> None:
    """Hold NeMo's sections to the keys of ``base.yaml`` and those that may be added.

    What else NeMo's ``model`` may hold, the checkpoint decides.

    Raises:
        ConfigError: naming the key and the one that may be meant.
    """
    pending = [section for section in NEMO_SECTIONS if section in base]
    for section in pending:
        added = [key.removeprefix(f"{section}.").partition(".")[0] for key in OPTIONAL if key.startswith(f"{section}.")]
        ours = OmegaConf.select(base, section)
        known = list(dict.fromkeys([*ours, *added]))
        for key in OmegaConf.select(cfg, section) or {}:
            if key not in known:
                whose = "; what the model is, its checkpoint says" if section == "model" else ""
                raise ConfigError(f"{section}.{key}: no such key; {meant(str(key), known)}{whose}")
        pending += [f"{section}.{key}" for key in ours if isinstance(ours._get_node(key), DictConfig) and len(ours[key])]
