"""The supported model families, by the ``model_type`` of their config.json."""

from __future__ import annotations

from converters import llama, qwen2
from converters.mapping import Family
from nemo_ampo.model_folder.facts import ARCHITECTURES

FAMILIES: dict[str, Family] = {"llama": llama.FAMILY, "qwen2": qwen2.FAMILY}
assert set(FAMILIES) == set(ARCHITECTURES), "what can be read can be converted"
