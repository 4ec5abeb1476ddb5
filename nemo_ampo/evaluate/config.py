"""What an evaluation answers, how, and where its results are kept."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from nemo_ampo.algo.rewards import RewardConfig
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.ranges import LARGEST_SEED, SMALLEST_DRAW, number


@dataclass
class EvaluateDataConfig:
    """Held-out turns to answer.

    Attributes:
        turns: rows in the published RL layout.
        limit: the first so many rows; -1 takes all.
        samples: answers drawn per row.
        system_prompt: as in the AMPO stage.
    """

    turns: str = MISSING
    limit: int = number(-1, least=1, or_else=(-1,))
    samples: int = number(1, least=1, most=1000)
    system_prompt: str | None = None


@dataclass
class GenerateConfig:
    """How an exported checkpoint answers during evaluation.

    Attributes:
        max_new_tokens: limit, tokens.
        temperature: 0 takes the most likely token.
        batch_size: rows at once.
        mode_bias: the mode dial: mode to a number added to the logit of its digit where the mode is chosen; null for none.
    """

    max_new_tokens: int = number(2048, least=1)
    temperature: float = number(0.7, least=SMALLEST_DRAW, most=100, or_else=(0,))
    batch_size: int = number(64, least=1)
    mode_bias: dict[int, float] | None = number(None, least=-1e6, most=1e6, whole=False)


@dataclass
class EvaluateRunConfig:
    """Where an evaluation lives.

    Attributes:
        dir: results are written below it.
        name: label of the checkpoint in tables.
        checkpoint: Hugging Face folder.
        seed: of the sampling.
        device: auto, cpu or gpu.
    """

    dir: str = MISSING
    name: str = MISSING
    checkpoint: str = MISSING
    seed: int = number(1, least=0, most=LARGEST_SEED)
    device: str = "auto"


@dataclass
class EvaluateConfig:
    """Evaluation of an exported checkpoint."""

    run: EvaluateRunConfig
    data: EvaluateDataConfig
    generate: GenerateConfig
    reward: RewardConfig
    judge: JudgeConfig
