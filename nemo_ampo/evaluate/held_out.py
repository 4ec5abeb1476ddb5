"""How good is an exported checkpoint on held-out turns? Drawn by the serving engine, judged and scored as in training.

This is the embedded evaluation: one reply per held-out turn. It loads nothing of NeMo, so it also proves that the export is
an ordinary Hugging Face folder.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed, wait
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ampo.algo.rewards import scored_reply
from nemo_ampo.errors import AskedToStopError, BudgetError, DataError, EngineError, JudgeError, UserError
from nemo_ampo.evaluate.answer_file import AnswerFile, StoredReply
from nemo_ampo.evaluate.config import EvaluateConfig
from nemo_ampo.files import derived_seed, sealed, sha256_of, write_once
from nemo_ampo.output.lock import hold_output
from nemo_ampo.output.outcome import PARTIAL_FOLDER, TRIED_IN_VAIN, Outcome
from nemo_ampo.output.protocol import digest, keep_protocol
from nemo_ampo.reply.grammar import answer_of
from nemo_ampo.reply.modes import MODES
from nemo_ampo.run.interrupt import stop_after_calls
from nemo_ampo.run.metrics import mean
from nemo_ampo.types import ALL_TAGS, DialogueTurn, JudgeRequest, ScoredReply, Verdict

if TYPE_CHECKING:
    from nemo_ampo.judge.background import JudgeThread


@dataclass(frozen=True)
class PlannedAnswer:
    """One planned answer.

    Attributes:
        turn: what is asked.
        prompt: its tokens.
    """

    turn: DialogueTurn
    prompt: list[int]


def evaluate(config: EvaluateConfig, device: str) -> tuple[Path, Outcome]:
    """Answer, judge and summarise; what an earlier start of the same evaluation drew and paid for is taken over.

    Returns:
        The result file, ``<run.dir>/<run.name>.json`` when everything is judged and ``<run.dir>/partial/<run.name>.json``
        otherwise; and how far it got.

    Raises:
        DataError: no rows, or a prompt too long for the model.
        ConfigError: the judge cannot be reached, or the evaluation was begun with other settings.
        UserError: another job makes the same evaluation.
        DiskError: something cannot be written.
    """
    from nemo_ampo.data.chat import check_tokenizer, encode_prompt
    from nemo_ampo.data.episodes import chat_messages, read_turns
    from nemo_ampo.judge.client import verdict_protocol
    from nemo_ampo.model_folder.loading import load_tokenizer
    from nemo_ampo.model_folder.policy_files import stop_token_ids, system_prompt

    judged_by = verdict_protocol(config.judge)
    turns = read_turns(config.data.turns)
    if config.data.limit >= 0:
        turns = turns[: config.data.limit]
    if not turns:
        raise DataError(f"{config.data.turns}: no rows to evaluate (data.limit={config.data.limit})")
    folder, run_dir = Path(config.run.checkpoint), Path(config.run.dir)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer)
    system = system_prompt(folder, config.data.system_prompt)
    asked = [PlannedAnswer(turn, encode_prompt(chat_messages(turn, system), tokenizer)) for turn in turns]
    check_positions(asked, folder, config)
    asked = [question for question in asked for _ in range(config.data.samples)]
    whole, partial = run_dir / f"{config.run.name}.json", run_dir / PARTIAL_FOLDER / f"{config.run.name}.json"
    # A folder of its own: several checkpoints are evaluated into one run folder, each with a budget.
    own = run_dir / "judge" / config.run.name
    with hold_output(whole, "run.name"):
        settings = protocol(config, system, stop_token_ids(folder, tokenizer)) | {"judge": judged_by}
        cure = f"give another run.name, or remove {own} to evaluate anew"
        kept = own / "answers.jsonl"
        hold = functools.partial(
            keep_protocol,
            own / "protocol.json",
            settings,
            "run.name",
            parts=("generate", "reward", "judge"),
            cure=cure,
            results=kept,
        )
        hold(write=False)
        answers = AnswerFile(kept, [question.turn.row_id for question in asked])
        unjudged = _answer_and_judge(asked, answers, tokenizer, config, own, device, begin=hold)
        scored = [
            scored_reply(
                asked[i].turn,
                reply.text,
                reply.num_tokens,
                answers.verdicts.get(i),
                unjudged.failures.get(i),
                tokenizer,
                config.reward,
            )
            for i, reply in sorted(answers.replies.items())
        ]
        outcome = _outcome(len(asked), scored, unjudged.by)
        result = {
            "name": config.run.name,
            "checkpoint": config.run.checkpoint,
            "seed": config.run.seed,
            "mode_bias": config.generate.mode_bias,
            "planned": outcome.planned,
            "complete": outcome.complete,
            "summary": summarise(scored),
            "samples": [reply.row() | {"answer": _answer(reply, config)} for reply in scored],
        }
        path = whole if outcome.complete else partial
        write_once(path, json.dumps(sealed(result), ensure_ascii=False, indent=1))
        if outcome.complete:
            partial.unlink(missing_ok=True)
    return path, outcome


def protocol(config: EvaluateConfig, system: str, stops: tuple[int, ...]) -> dict[str, Any]:
    """Everything the numbers depend on but the judge; an evaluation that goes on is held to it."""
    from nemo_ampo.model_folder.policy_files import policy_hash

    return {
        "checkpoint": policy_hash(Path(config.run.checkpoint)),
        "turns": sha256_of(config.data.turns),
        "limit": config.data.limit,
        "samples": config.data.samples,
        "system_prompt": digest(system),
        "stop_tokens": list(stops),
        "seed": config.run.seed,
        "generate": {name: value for name, value in vars(config.generate).items() if value is not None},
        "reward": asdict(config.reward),
    }


def check_positions(asked: Sequence[PlannedAnswer], folder: Path, config: EvaluateConfig) -> None:
    """A model says nothing sensible beyond the positions it was made for.

    Raises:
        DataError: a prompt leaves no room for the longest reply, naming the row.
    """
    from nemo_ampo.model_folder.facts import read_facts

    positions = read_facts(folder).max_positions
    for question in asked:
        tokens = len(question.prompt) + config.generate.max_new_tokens
        if tokens > positions:
            raise DataError(
                f"{config.data.turns}: row {question.turn.row_id}: prompt of {len(question.prompt)} tokens plus "
                f"generate.max_new_tokens={config.generate.max_new_tokens} exceeds the {positions} positions of "
                f"{folder} (max_position_embeddings); lower it or leave the row out"
            )


def _outcome(planned: int, answers: Sequence[ScoredReply], stopped: str | None) -> Outcome:
    outcome = Outcome(planned, begun=len(answers), words=("answers drawn", "judged or needing no judge"), stopped=stopped)
    for answer in answers:
        if answer.judge_error is None:
            outcome.done += 1
        else:
            outcome.miss(f"verdict ({answer.judge_error})", f"row {answer.row_id}: no verdict ({answer.judge_error})")
    return outcome


def summarise(answers: Sequence[ScoredReply]) -> dict[str, dict[str, Any]]:
    """Means over all answers and per tag. A failed judge call is left out of reward and goal, and counted."""
    tags = sorted({a.tag for a in answers if a.tag})
    groups = {ALL_TAGS: list(answers)} | {tag: [a for a in answers if a.tag == tag] for tag in tags}
    return {name: _summary(group) for name, group in groups.items()}


def _summary(answers: Sequence[ScoredReply]) -> dict[str, Any]:
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
        "mode_share": {str(k): mean(float(a.parts.mode == k) for a in answers) for k in MODES} if answers else {},
    }


@dataclass
class Unjudged:
    """What is not judged, and why.

    Attributes:
        failures: place of an answer to the kind of the judge's failure.
        by: what only the user can change, in one line: a spent budget, or a judge that refuses whatever it is asked.
    """

    failures: dict[int, str] = field(default_factory=dict)
    by: str | None = None


def _answer_and_judge(
    asked: list[PlannedAnswer],
    answers: AnswerFile,
    tokenizer: Any,
    config: EvaluateConfig,
    own: Path,
    device: str,
    begin: Callable[[], None],
) -> Unjudged:
    """Draw and judge what is missing; replies are judged while others are drawn.

    ``begin`` is called once the judge is known to answer: a start that failed binds the evaluation to nothing.
    """
    from nemo_ampo.judge.job import open_judge

    spoken = [i for i in answers.replies if _answer(answers.replies[i], config) is not None]
    if len(answers.replies) == len(asked) and len(answers.verdicts) == len(spoken):
        return Unjudged()
    with open_judge(config.judge, own) as judge:
        judge.check()
        begin()
        work = _Judging(asked, answers, judge, config)
        with stop_after_calls(judge.ask_no_more) as stop:
            for index in sorted(answers.replies):
                work.submit(index)
            missing = [index for index in range(len(asked)) if index not in answers.replies]
            for index, reply in _draw(asked, missing, config, device, ends=lambda: work.in_vain or stop.requested):
                answers.add_reply(index, reply)
                work.submit(index)
            return work.finish()


class _Judging:
    """Verdicts under way; each is kept as soon as it is there."""

    def __init__(self, asked: list[PlannedAnswer], answers: AnswerFile, judge: JudgeThread, config: EvaluateConfig) -> None:
        self._asked, self._answers, self._judge, self._config = asked, answers, judge, config
        self._futures: dict[int, Future[Verdict]] = {}
        self._errors: list[BaseException] = []
        self._spent = False

    def submit(self, index: int) -> None:
        """Have an answer judged, unless it was, or says nothing."""
        answer = _answer(self._answers.replies[index], self._config)
        if answer is None or index in self._answers.verdicts:
            return
        future = self._futures[index] = self._judge.submit(JudgeRequest.about(self._asked[index].turn, answer))
        future.add_done_callback(functools.partial(self._keep, index))

    def _keep(self, index: int, done: Future[Verdict]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            self._spent = self._spent or isinstance(error, UserError)
            self._errors.append(error)
        elif not done.cancelled():
            self._answers.add_verdict(index, done.result())

    @property
    def in_vain(self) -> bool:
        """Whatever else is asked will not be answered: a budget is spent, or the judge refused all so far."""
        return self._spent or self._refusal(self._errors, TRIED_IN_VAIN) is not None

    def _refusal(self, errors: Sequence[BaseException], tried: int) -> str | None:
        """What the judge says, where it refused every one of at least so many questions and would again."""
        if self._answers.verdicts or len(errors) < tried:
            return None
        refused_all = all(isinstance(error, JudgeError) and error.permanent for error in errors)
        return f"judge: {errors[0]}" if refused_all else None

    def finish(self) -> Unjudged:
        """Wait for all: those under way are paid for.

        Raises:
            UserError: what ended the asking, other than a budget.
            DiskError: a verdict could not be written.
        """
        wait(self._futures.values())
        self._answers.require_written()
        errors = {index: future.exception() for index, future in self._futures.items()}
        unjudged = Unjudged(by=self._refusal([error for error in errors.values() if error is not None], tried=1))
        for index, error in errors.items():
            if isinstance(error, AskedToStopError):
                unjudged.failures[index] = "asked to stop"
            elif isinstance(error, BudgetError):
                unjudged.failures[index], unjudged.by = "budget", str(error)
            elif isinstance(error, JudgeError):
                unjudged.failures[index] = error.kind
            elif error is not None:
                raise error
        return unjudged


def _draw(
    asked: list[PlannedAnswer], missing: Sequence[int], config: EvaluateConfig, device: str, ends: Callable[[], bool]
) -> Iterator[tuple[int, StoredReply]]:
    """Replies as they end, with their places. Each has a seed of its own and is computed as if it were alone, so that an
    evaluation that goes on draws what one that never stopped does. Once ``ends`` is true, what is not finished is given up.

    Raises:
        UserError: the model computes nothing that could be drawn from.
    """
    if not missing or ends():
        return
    from nemo_ampo.serve.engine import GenerateRequest, ServingEngine

    how, rows = config.generate, min(config.generate.batch_size, len(asked))
    engine = ServingEngine(
        Path(config.run.checkpoint), device="cuda" if device == "gpu" else "cpu", max_batch=rows, height=rows
    )
    with closing(engine):
        drawn = {
            engine.submit(
                GenerateRequest(
                    prompt=tuple(asked[index].prompt),
                    max_tokens=how.max_new_tokens,
                    temperature=how.temperature,
                    seed=derived_seed(f"{config.run.seed}/{index}"),
                    mode_bias=how.mode_bias or {},
                )
            ): index
            for index in missing
        }
        for future in as_completed(drawn):
            index = drawn[future]
            try:
                reply = future.result()
            except EngineError as error:
                raise UserError(f"{config.run.checkpoint}: {error}") from error
            yield index, StoredReply(asked[index].turn.row_id, reply.text, len(reply.ids))
            if ends():
                return


def _answer(reply: StoredReply | ScoredReply, config: EvaluateConfig) -> str | None:
    return answer_of(reply.text, strict=config.reward.strict_format)
