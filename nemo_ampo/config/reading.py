"""From a composed config to typed sections: a misspelt key, a wrong type or a number out of range stops the run."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_ampo.algo.algorithm import KNOBS, AlgorithmConfig, preset_named
from nemo_ampo.errors import ConfigError
from nemo_ampo.ranges import as_yaml, check_numbers

NEMO_SECTIONS = ("trainer", "model", "exp_manager")


SWITCHES = ("structured",)
"""Keys with the words `on` and `off`, which a bare YAML reads as truth values and their sections read back."""


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
    return schema(**{f.name: read_section(f.name, f.type, raw.get(f.name)) for f in fields(_resolved(schema))})


def read_section(name: str, section: Any, given: Any) -> Any:
    """One section as an object, its numbers within their ranges.

    Raises:
        ConfigError: as :func:`read_config`.
    """
    _no_endless_integer(name, given)
    try:
        values = _section(name, section, given)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or name)
        # Inside a list OmegaConf forgets where it is.
        where = key if key.partition(".")[0] == name else f"{name}, {key}"
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None
    check_numbers(name, values)
    return values


def _no_endless_integer(key: str, value: Any) -> None:
    """Python's integers have no end; one that is no float ends OmegaConf with an error that names no key."""
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value)
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _no_endless_integer(f"{key}.{name}", inner)
    elif isinstance(value, int) and abs(value) > 2**64:
        raise ConfigError(f"{key}: a number of {len(str(abs(value)))} digits is too large")


def default_keys(schema: type[Any]) -> dict[str, Any]:
    """Every key of a stage with its default, ``???`` where a value is required; the YAML files build on this."""
    keys: dict[str, Any] = {
        f.name: OmegaConf.to_container(OmegaConf.structured(f.type), enum_to_str=True) for f in fields(_resolved(schema))
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


def _section(name: str, section: Any, given: Any) -> Any:
    given = given if given is not None else {}
    if section is AlgorithmConfig:
        given = dict(given)
        section = preset_named(given.get("preset", section.preset))
        # YAML reads a bare `off` as false.
        given |= {key: "off" for key in ("kl", "mismatch") if given.get(key) is False}
    typed = OmegaConf.create({name: OmegaConf.structured(section)})
    _refuse_other_texts(name, section if isinstance(section, type) else type(section), given)
    # Frozen classes come out read-only; they are frozen again once they are objects.
    OmegaConf.set_readonly(typed[name], False)
    merged = OmegaConf.merge(typed, {name: given})
    missing = OmegaConf.missing_keys(merged)
    if missing:
        raise ConfigError(f"{sorted(missing)[0]}: a value is required")
    return OmegaConf.to_object(merged)[name]  # type: ignore[index, call-overload]


def _refuse_other_texts(name: str, section: Any, given: Any) -> None:
    """YAML reads ``2024_01`` as 202401 and ``yes`` as true, which as text are other words than those that were written; an
    empty one is no path."""
    hints = get_type_hints(section)
    plain: Any = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    for key, value in plain.items() if isinstance(plain, dict) else ():
        hint = hints.get(str(key))
        if is_dataclass(hint):
            _refuse_other_texts(f"{name}.{key}", hint, value)
        elif (
            isinstance(value, int | float)
            and hint in (str, str | None)
            and not (isinstance(value, bool) and key in SWITCHES)
        ):
            raise ConfigError(f"{name}.{key}: YAML reads {as_yaml(value)} where text is expected; put quotes around it")
        elif value == "" and hint == str | None:
            raise ConfigError(f"{name}.{key}: must not be empty; null stands for none")


def _resolved(schema: type[Any]) -> type[Any]:
    """The class with its annotations as types instead of strings."""
    hints = get_type_hints(schema)
    for f in fields(schema):
        f.type = hints[f.name]
    return schema
