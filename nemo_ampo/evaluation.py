"""How good is an exported checkpoint on held-out turns? Answers drawn with transformers, judged and scored as in training.

This is the embedded evaluation: one reply per held-out turn. It loads nothing of NeMo, so it also proves that the export is
an ordinary Hugging Face folder. Legend: B rows, T positions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ampo.config import EvaluateConfig
from nemo_ampo.errors import DataError, JudgeError
from nemo_ampo.files import write_once
from nemo_ampo.grammar import answer_of
from nemo_ampo.metrics import mean
from nemo_ampo.modes import MODES
from nemo_ampo.rewards import RewardConfig, RewardParts, score_reply
from nemo_ampo.serve.dial import DialProcessor, ModeDial
from nemo_ampo.types import DialogueTurn, JudgeRequest, Verdict

if TYPE_CHECKING:
    from nemo_ampo.judge import JudgeThread


@dataclass(frozen=True)
class Answered:
    """One reply of the evaluated checkpoint.

    Attributes:
        turn: what was asked.
        text: decoded reply.
        num_tokens: reply tokens, the stop token included.
        answer: the spoken part, None when the reply breaks the grammar.
        parts: reward and what it was made of.
        verdict: None when the judge was not asked or failed.
        judge_error: kind of the judge's failure.
    """

    turn: DialogueTurn
    text: str
    num_tokens: int
    answer: str | None
    parts: RewardParts
    verdict: Verdict | None
    judge_error: str | None

    def row(self) -> dict[str, Any]:
        """As written to the results file."""
        return {
            "row_id": self.turn.row_id,
            "tag": self.turn.tag,
            "dialogue": "\n".join(self.turn.dialog),
            "text": self.text,
            "answer": self.answer,
            "num_tokens": self.num_tokens,
            "mode": self.parts.mode,
            "reward": self.parts.reward,
            "goal": self.parts.goal,
            "valid": self.parts.valid,
            "format_rule": self.parts.format_rule,
            "agent1_score": self.verdict.agent1 if self.verdict else None,
            "agent2_score": self.verdict.agent2 if self.verdict else None,
            "judge_error": self.judge_error,
        }


def evaluate(config: EvaluateConfig, device: str) -> dict[str, Any]:
    """Answer, judge and summarise; writes ``<run.dir>/<run.name>.json`` and returns its content.

    Raises:
        DataError: no rows.
        ConfigError: the judge cannot be reached.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_ampo.checkpoint.policy_files import stop_token_ids, system_prompt
    from nemo_ampo.data.chat import check_tokenizer, encode_prompt
    from nemo_ampo.data.episodes import chat_messages, read_turns
    from nemo_ampo.judge import open_judge

    turns = read_turns(config.data.turns)
    if config.data.limit >= 0:
        turns = turns[: config.data.limit]
    if not turns:
        raise DataError(f"{config.data.turns}: no rows to evaluate (data.limit={config.data.limit})")
    turns = [turn for turn in turns for _ in range(config.data.samples)]
    folder = Path(config.run.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer)
    system = system_prompt(folder, config.data.system_prompt)
    prompts = [encode_prompt(chat_messages(turn, system), tokenizer) for turn in turns]
    # A folder of its own: several checkpoints are evaluated into one run folder, each with a budget.
    spending = Path(config.run.dir) / "judge" / config.run.name
    spending.mkdir(parents=True, exist_ok=True)
    with open_judge(config.judge, spending) as judge:
        judge.check()
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
        answers = _answers(model, tokenizer, prompts, turns, config, stop_token_ids(folder, tokenizer), judge, device)
    result = {
        "name": config.run.name,
        "checkpoint": config.run.checkpoint,
        "seed": config.run.seed,
        "mode_bias": config.generate.mode_bias,
        "summary": summarise(answers),
        "samples": [answer.row() for answer in answers],
    }
    write_once(Path(config.run.dir) / f"{config.run.name}.json", json.dumps(result, ensure_ascii=False, indent=1))
    return result


def summarise(answers: Sequence[Answered]) -> dict[str, dict[str, Any]]:
    """Means over all answers and per tag. A failed judge call is left out of reward and goal, and counted."""
    tags = sorted({a.turn.tag for a in answers if a.turn.tag})
    groups = {"all": list(answers)} | {tag: [a for a in answers if a.turn.tag == tag] for tag in tags}
    return {name: _summary(group) for name, group in groups.items()}


def _summary(answers: Sequence[Answered]) -> dict[str, Any]:
    """Means of one group; null where there is nothing to average."""
    means = {
        "reward": mean(a.parts.reward for a in answers),
        "goal": mean(a.parts.goal for a in answers if a.parts.mode),
        "valid_format": mean(float(a.parts.format_rule is None) for a in answers),
        "tokens": mean(float(a.num_tokens) for a in answers),
    }
    return {name: None if math.isnan(value) else value for name, value in means.items()} | {
        "samples": len(answers),
        "judge_failed": sum(a.judge_error is not None for a in answers),
        "mode_share": {str(k): mean(float(a.parts.mode == k) for a in answers) for k in MODES},
    }


def _answers(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    turns: list[DialogueTurn],
    config: EvaluateConfig,
    stops: tuple[int, ...],
    judge: JudgeThread,
    device: str,
) -> list[Answered]:
    """Replies batch by batch; a batch is judged while the next one is drawn."""
    import torch

    model = model.to("cuda" if device == "gpu" else "cpu").eval()
    torch.manual_seed(config.run.seed)
    drawn: list[tuple[DialogueTurn, str, int, Future[Verdict] | None]] = []
    size = config.generate.batch_size
    dial = ModeDial(tokenizer) if config.generate.mode_bias else None
    for begin in range(0, len(prompts), size):
        replies = generate(model, prompts[begin : begin + size], stops, config, dial)
        for turn, ids in zip(turns[begin : begin + size], replies, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            answer = answer_of(text, strict=config.reward.strict_format)
            future = None if answer is None else judge.submit(JudgeRequest.about(turn, answer))
            drawn.append((turn, text, len(ids), future))
    return [_score(turn, text, tokens, future, tokenizer, config.reward) for turn, text, tokens, future in drawn]


def generate(
    model: Any, prompts: list[list[int]], stops: tuple[int, ...], config: EvaluateConfig, dial: ModeDial | None = None
) -> list[list[int]]:
    """Reply tokens of a batch of prompts, each up to and including its stop token; ``dial`` applies the mode dial."""
    import torch

    width = max(map(len, prompts))
    pad = stops[0]
    ids_BT = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    sampled = config.generate.temperature > 0
    options: dict[str, Any] = (
        {"do_sample": True, "temperature": config.generate.temperature, "top_k": 0, "top_p": 1.0}
        if sampled
        else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    )
    if dial is not None:
        options["logits_processor"] = [DialProcessor(dial, config.generate.mode_bias or {}, width)]
    with torch.no_grad():
        out_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=config.generate.max_new_tokens,
            eos_token_id=list(stops),
            pad_token_id=pad,
            **options,
        )
    return [_until_stop(row, stops) for row in out_BT[:, width:].tolist()]


def _until_stop(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    for position, token in enumerate(ids):
        if token in stops:
            return ids[: position + 1]
    return ids


def _score(
    turn: DialogueTurn, text: str, tokens: int, future: Future[Verdict] | None, tokenizer: Any, reward: RewardConfig
) -> Answered:
    verdict, failure = None, None
    if future is not None:
        try:
            verdict = future.result()
        except JudgeError as error:
            failure = error.kind
    answer = answer_of(text, strict=reward.strict_format)
    answer_tokens = len(tokenizer.tokenize(answer)) if answer is not None else 0
    parts = score_reply(turn, text, verdict, answer_tokens, reward)
    return Answered(turn, text, tokens, answer, parts, verdict, failure)
