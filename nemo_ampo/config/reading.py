"""From a composed config to typed sections: a misspelt key, a wrong type or a number out of range stops the run."""

from __future__ import annotations

from dataclasses import fields
from enum import StrEnum
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf

from nemo_ampo.algo.algorithm import KNOBS, AlgorithmConfig, preset_named
from nemo_ampo.config.typed import plain, typed
from nemo_ampo.errors import ConfigError
from nemo_ampo.ranges import check_numbers

NEMO_SECTIONS = ("trainer", "model", "exp_manager")


C = TypeVar("C")


def read_config(raw: DictConfig, schema: type[C]) -> C:
    """Our sections of a composed Hydra config as typed objects.

    Args:
        raw: composed config; NeMo's sections are left alone.
        schema: one of the stage classes.

    Raises:
        ConfigError: unknown section or key, wrong type, or a required key without a value.
    """
    ours = {f.name for f in fields(schema)}  # type: ignore[arg-type]
    unknown = sorted(set(map(str, raw)) - ours - set(NEMO_SECTIONS))
    if unknown:
        raise ConfigError(
            f"{unknown[0]}: unknown section; this stage has {', '.join(sorted(ours))} and NeMo's {', '.join(NEMO_SECTIONS)}"
        )
    return schema(**{name: read_section(name, section, raw.get(name)) for name, section in get_type_hints(schema).items()})


def read_section(name: str, section: type[C], given: Any) -> C:
    """One section as an object, its numbers within their ranges.

    Raises:
        ConfigError: as :func:`read_config`.
    """
    keys = plain({} if given is None else given, name)
    if section is AlgorithmConfig and isinstance(keys, dict):
        keys = vars(preset_named(keys.get("preset", AlgorithmConfig.preset))) | keys
    values = typed(name, section, keys)
    check_numbers(name, values)
    return values


def default_keys(schema: type[Any]) -> dict[str, Any]:
    """Every key of a stage with its default, ``???`` where a value is required; the YAML files build on this."""
    keys: dict[str, Any] = {
        name: OmegaConf.to_container(OmegaConf.structured(section), enum_to_str=True)
        for name, section in get_type_hints(schema).items()
    }
    if "algorithm" in keys:
        # Whatever is written over these wins over the preset, wherever the preset is named.
        keys["algorithm"] |= {knob: f"${{algorithm_preset:{knob}}}" for knob in KNOBS}
    return keys


def _knob_of_preset(knob: str, *, _root_: DictConfig) -> Any:
    value = getattr(preset_named(_root_.algorithm.preset), knob)
    return value.value if isinstance(value, StrEnum) else value


OmegaConf.register_new_resolver("algorithm_preset", _knob_of_preset, replace=True)


def fill_preset(cfg: DictConfig) -> None:
    """Put the preset's values where a composed config names none, in place, so that whoever prints it sees numbers.

    Raises:
        ConfigError: unknown preset.
    """
    if "algorithm" in cfg:
        preset_named(cfg.algorithm.preset)
        OmegaConf.resolve(cfg.algorithm)
