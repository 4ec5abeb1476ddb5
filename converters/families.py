"""The supported model families, by the ``model_type`` of their config.json."""

from __future__ import annotations

from converters import llama, qwen2
from converters.mapping import Family
from nemo_ampo.errors import UserError

FAMILIES: dict[str, Family] = {"llama": llama.FAMILY, "qwen2": qwen2.FAMILY}


def family_of(model_type: str | None) -> Family:
    """Look a family up.

    Raises:
        UserError: listing the supported families.
    """
    if model_type not in FAMILIES:
        raise UserError(f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
