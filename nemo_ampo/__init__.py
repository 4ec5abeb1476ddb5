"""nemo-ampo: teach a language model when to think, with NeMo-Aligner.

Start reading at :mod:`nemo_ampo.step` (one AMPO step), then :mod:`nemo_ampo.algo.advantage` (the paper's idea). The
names below are the stable ones (docs/api.md); each is loaded when it is first used, so that ``import nemo_ampo`` costs
nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_ampo.algo.advantage import Levels, ampo_advantage, group_levels, grpo_advantage
    from nemo_ampo.algo.algorithm import PRESETS, AlgorithmConfig
    from nemo_ampo.algo.loss import kl_estimate, policy_loss
    from nemo_ampo.algo.rewards import answer_length_score, goal_gain
    from nemo_ampo.errors import FormatError, JudgeError, UserError
    from nemo_ampo.judge.verdict import parse_verdict
    from nemo_ampo.reply.grammar import parse_reply
    from nemo_ampo.types import Reply, Verdict

__version__ = "0.1.0"

_HOMES = {
    "PRESETS": "algo.algorithm",
    "AlgorithmConfig": "algo.algorithm",
    "FormatError": "errors",
    "JudgeError": "errors",
    "Levels": "algo.advantage",
    "Reply": "types",
    "UserError": "errors",
    "Verdict": "types",
    "ampo_advantage": "algo.advantage",
    "answer_length_score": "algo.rewards",
    "goal_gain": "algo.rewards",
    "group_levels": "algo.advantage",
    "grpo_advantage": "algo.advantage",
    "kl_estimate": "algo.loss",
    "parse_reply": "reply.grammar",
    "parse_verdict": "judge.verdict",
    "policy_loss": "algo.loss",
}

__all__ = [
    "PRESETS",
    "AlgorithmConfig",
    "FormatError",
    "JudgeError",
    "Levels",
    "Reply",
    "UserError",
    "Verdict",
    "ampo_advantage",
    "answer_length_score",
    "goal_gain",
    "group_levels",
    "grpo_advantage",
    "kl_estimate",
    "parse_reply",
    "parse_verdict",
    "policy_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
