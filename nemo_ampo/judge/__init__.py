"""The judge: a language model behind an OpenAI-compatible API that says how far both speakers have come.

Read :mod:`nemo_ampo.judge.verdict` for what counts as an answer, :mod:`nemo_ampo.judge.client` for how one is
obtained, :mod:`nemo_ampo.judge.background` for how a synchronous loop gets many of them while it generates.
A judge that gave no usable answer raises :class:`JudgeError`: its sample has no reward, never a made-up one.
"""

from nemo_ampo.errors import JudgeError
from nemo_ampo.judge.background import JudgeThread
from nemo_ampo.judge.client import Judge
from nemo_ampo.judge.config import JudgeConfig, SecondJudgeConfig
from nemo_ampo.judge.job import open_judge
from nemo_ampo.judge.stats import JudgeStats
from nemo_ampo.judge.verdict import parse_verdict
from nemo_ampo.types import JudgeRequest, Verdict

__all__ = [
    "Judge",
    "JudgeConfig",
    "JudgeError",
    "JudgeRequest",
    "JudgeStats",
    "JudgeThread",
    "SecondJudgeConfig",
    "Verdict",
    "open_judge",
    "parse_verdict",
]
