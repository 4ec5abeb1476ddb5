"""``contract_jobs.py FAMILY FOLDER``: the engine contract on the model in a folder, all engines in one process.

Measures and writes ``results.json``; the assertions are in the test files. Every engine draws with the project's own
sampler (TensorRT-LLM is a stand-in that executes the weights it is given), so the Megatron engine is an exact oracle.
Two ranks share one model, tensor-parallel.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
MAIN = os.environ.get("RANK", "0") == "0"
FAMILY, FOLDER = sys.argv[1], Path(sys.argv[2])
VOCAB = json.loads((FOLDER / "hf/config.json").read_text())["vocab_size"]
MAX_PROMPT, MAX_NEW, ROWS = 40, 24, 128
LENGTHS = (5, 9, 1, 30, 12, 17)


def open_session() -> tuple[Any, Path]:
    """An actor on the model of the folder, and its Hugging Face files."""
    from nemo_ampo import compat

    compat.setup("cpu")
    from nemo_ampo.algo.algorithm import AlgorithmConfig
    from nemo_ampo.checkpoint.nemo_file import unpack_assets
    from nemo_ampo.config.compose import compose
    from nemo_ampo.training.actor import AmpoActor
    from nemo_ampo.training.session import open_session, prepare_config

    nemo = FOLDER / "model.nemo"
    overrides = ["model.optim.lr=0.01", "model.global_batch_size=8", "model.micro_batch_size=4"]
    cfg = compose("ampo", "tiny", [*overrides, f"model.tensor_model_parallel_size={RANKS}"])
    assets = unpack_assets(str(nemo), FOLDER / "assets")
    prepare_config(cfg, FOLDER / "run", str(nemo), assets, "cpu")
    session = open_session(cfg, "reinforce", AmpoActor, str(nemo), 8, keep_reference=True)
    session.model.algorithm = AlgorithmConfig(kl_coef=0.01)
    return session, assets


def text_of(ids: Sequence[int]) -> str:
    """Not a text anybody reads, but one that depends on every token."""
    return "".join(chr(0x100 + i) for i in ids)


class Engines:
    """Makes each engine over the same session."""

    def __init__(self, session: Any, assets: Path, folder: Path, stack: ExitStack) -> None:
        self._session, self._assets, self._folder, self._stack = session, assets, folder, stack
        self._count = 0

    def make(self, name: str, batch_size: int = ROWS, decode: Callable[[Sequence[int]], str] = text_of) -> Any:
        from hf_backend import HfBackend
        from serving import served

        from converters.live import publish_weights
        from nemo_ampo.ranks import MegatronRanks
        from nemo_ampo.rollout import EngineSetup, make_engine
        from nemo_ampo.rollout.config import RolloutConfig, TrtLlmConfig, TrtLlmServerConfig

        self._count += 1
        ranks = MegatronRanks()
        server = TrtLlmServerConfig()
        if name == "trtllm_server":
            backend = HfBackend(MAX_PROMPT, MAX_PROMPT + MAX_NEW, VOCAB)
            url = self._stack.enter_context(served(backend)) if ranks.is_leader else ""
            server = TrtLlmServerConfig(url=ranks.share(url))
        rollout = RolloutConfig(
            engine=name,
            max_prompt_tokens=MAX_PROMPT,
            max_new_tokens=MAX_NEW,
            batch_size=batch_size,
            trtllm=TrtLlmConfig(engine_dir=str(self._folder / f"engine{self._count}")),
            trtllm_server=server,
        )
        return make_engine(
            EngineSetup(
                self._session.model,
                rollout,
                decode,
                ranks,
                self._folder / f"run{self._count}",
                lambda model, folder: publish_weights(model, self._assets, folder),
            )
        )


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    g = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, VOCAB, (n,), generator=g).tolist()) for n in lengths]


def ids_of(responses: Sequence[Any]) -> list[list[int]]:
    return [list(r.token_ids) for r in responses]


def refused(call: Callable[[], Any]) -> str:
    from nemo_ampo.errors import EngineError

    try:
        call()
    except EngineError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def logprob_error(session: Any, requests: Sequence[Any], responses: Sequence[Any]) -> float:
    """Largest difference to the trainer's log-probabilities on the same tokens."""
    from nemo_ampo.rollout.packing import pack

    packed = pack(requests, responses, pad_id=0)
    trainer = session.model.get_inference_log_probs(packed.tokens_BT)
    return float((packed.sampling_logprobs_BT - trainer)[packed.mask_BT].abs().max())


STOP = "<|end_of_answer|>"
CONTEXTS = {
    "plain": ["ok", "\n", "<", "|", "end", "_of", "_answer", "|", ">", "tail"],
    "dot": ["ok", ".<", "|", "end", "_of", "_answer", "|", ">", "tail"],
    "bang": ["ok", "!<", "|", "end", "_of", "_answer", "|", ">", "tail"],
    "quote": ["ok", '"<', "|", "end", "_of", "_answer", "|", ">", "tail"],
    "bracket": ["ok", ")<", "|", "end", "_of", "_answer", "|", ">", "tail"],
    "blank": ["ok", " <|", "end", "_of", "_answer", "|", ">", "tail"],
    "newline behind": ["ok", '"\n', "<", "|", "end", "_of", "_answer", "|", ">\n\n", "tail"],
    "at once": ["<", "|", "end", "_of", "_answer", "|", ">", "tail"],
}
"""How the two real vocabularies cut the stop text after different characters: no fixed list of ids matches them all."""


def stop_string_checks(engines: Engines, name: str, free: list[int], request: Any, spec: Any) -> dict[str, Any]:
    """The engine draws the same tokens each time; what their text is changes from case to case."""

    def pieces_of(ids: Sequence[int], pieces: list[str]) -> str:
        """Text of a stretch of the known response, whatever stretch it is."""
        ids = list(ids)
        for begin in range(len(free)):
            if free[begin : begin + len(ids)] == ids:
                return "".join((pieces + ["x"] * len(free))[begin : begin + len(ids)])
        return "".join("y" for _ in ids)

    kept = {}
    current = CONTEXTS["plain"]
    engine = engines.make(name, decode=lambda ids: pieces_of(ids, current))
    engine.sync(1)
    for case, pieces in CONTEXTS.items():
        current = pieces
        response = engine.generate([request], replace(spec, stop_strings=(STOP,)))[0]
        kept[case] = [len(response.token_ids), response.finish, len(response.logprobs)]
    current = ["ok"]
    never = engine.generate([request], replace(spec, stop_strings=(STOP,)))[0]
    kept["never"] = [len(never.token_ids), never.finish, len(never.logprobs)]
    engine.close()
    return kept


def engine_checks(session: Any, engines: Engines, name: str) -> dict[str, Any]:
    from nemo_ampo.rollout.engine import Request, SamplingSpec

    engine = engines.make(name)
    requests = [Request(i, p, 1000 + i) for i, p in enumerate(prompts_of(LENGTHS))]
    stops = tuple(range(3, VOCAB, 24))  # one id in 24 ends a reply: some end soon, some run to the limit
    spec = SamplingSpec(MAX_NEW, stops)
    out: dict[str, Any] = {"unsynced": refused(lambda: engine.generate(requests, spec))}
    report = engine.sync(1)
    out["sync"] = [report.weight_version, report.num_tensors, report.num_bytes]
    order: list[int] = []
    responses = engine.generate(requests, spec, on_finish=lambda r: order.append(r.request_id))
    out |= {
        "ids": ids_of(responses),
        "logprobs": [r.logprobs.tolist() for r in responses],
        "finish": [r.finish for r in responses],
        "versions": [r.weight_version for r in responses],
        "told": sorted(order),
        "logprob_error": logprob_error(session, requests, responses),
        "alone": ids_of([engine.generate([r], spec)[0] for r in requests]),
        "reversed": ids_of(engine.generate(requests[::-1], spec)[::-1]),
        "reseeded": ids_of(engine.generate([replace(r, seed=r.seed + 1) for r in requests], spec)),
        "twins": ids_of(engine.generate([Request(i, requests[0].prompt_ids, 5) for i in range(3)], spec)),
        "group": ids_of(engine.generate([Request(i, requests[0].prompt_ids, i) for i in range(8)], spec)),
        "at_once": ids_of(engine.generate(requests, replace(spec, stop_token_ids=tuple(range(VOCAB))))),
    }
    big = [Request(i, p, i) for i, p in enumerate(prompts_of([1 + i % 20 for i in range(ROWS)], seed=1))]
    short = replace(spec, max_new_tokens=4)
    many = engine.generate(big, short)
    out |= {"batch_128": ids_of(many), "batch_128_logprob_error": logprob_error(session, big, many)}
    out["split"] = ids_of(small_batches(engines, name, big[:10], short))
    engine.sync(1)  # one TensorRT-LLM engine per process: the small one took its place
    greedy = engine.generate(requests, replace(spec, greedy=True))
    out |= {"greedy": ids_of(greedy), "greedy_logprob_error": logprob_error(session, requests, greedy)}
    drawn = {i for row in out["ids"] for i in row}
    unseen = next(i for i in range(VOCAB) if i not in drawn)
    endless = engine.generate(requests, replace(spec, stop_token_ids=(unseen,), max_new_tokens=6))
    out["endless"] = [[len(r.token_ids), r.finish, unseen in r.token_ids] for r in endless]
    full = [Request(0, prompts_of([MAX_PROMPT])[0], 1)]
    out["full"] = len(engine.generate(full, replace(spec, stop_token_ids=(unseen,)))[0].token_ids)
    cool = replace(spec, temperature=0.5, top_k=20, top_p=0.9)
    out["cool"] = ids_of(engine.generate(requests, replace(cool, want_logprobs=False)))
    out["stop_in_batch"] = stop_in_batch(engine, requests, out["ids"], spec)
    out["no_logprobs"] = [r.logprobs is None for r in engine.generate(requests, replace(spec, want_logprobs=False))]
    longest, one_too_many = engine.caps.max_prompt, engine.caps.max_total - LENGTHS[3] + 1
    out["refused"] = {
        "empty prompt": refused(lambda: engine.generate([Request(0, (), 1)], spec)),
        "exceeds the engine's": refused(lambda: engine.generate([Request(0, (3,) * (longest + 1), 1)], spec)),
        "tokens plus": refused(lambda: engine.generate([requests[3]], replace(spec, max_new_tokens=one_too_many))),
        "distinct": refused(lambda: engine.generate([requests[0], requests[0]], spec)),
        "outside the vocabulary": refused(lambda: engine.generate([Request(0, (VOCAB,), 1)], spec)),
        "no stop token": refused(lambda: engine.generate(requests, replace(spec, stop_token_ids=()))),
        "temperature must": refused(lambda: engine.generate(requests, replace(spec, temperature=0.0))),
        "top_p must": refused(lambda: engine.generate(requests, replace(spec, top_p=0.0))),
        "max_new_tokens": refused(lambda: engine.generate(requests, replace(spec, max_new_tokens=0))),
        "seed -1": refused(lambda: engine.generate([replace(requests[0], seed=-1)], spec)),
        "empty stop string": refused(lambda: engine.generate(requests, replace(spec, stop_strings=("",)))),
    }
    engine.release()
    engine.sync(2)
    again = engine.generate(requests, spec)
    out |= {"after_release": ids_of(again), "version_after": again[0].weight_version}
    out["changed"] = weight_change(session, engine, requests, spec)
    engine.close()
    known = max(responses, key=lambda r: len(r.token_ids))
    whole = replace(spec, stop_token_ids=(unseen,))
    out["stop_strings"] = stop_string_checks(
        engines, name, *known_response(engines, name, requests[known.request_id], whole)
    )
    return out


def stop_in_batch(engine: Any, requests: list[Any], free: list[list[int]], spec: Any) -> dict[str, Any]:
    """Two stop texts for a batch: one that lies within one response, one that begins in another one's prompt."""
    row = max(range(len(free)), key=lambda i: len(free[i]))
    other = (row + 1) % len(free)
    inside, across = free[row][3:5], [requests[other].prompt_ids[-1], free[other][0]]
    responses = engine.generate(requests, replace(spec, stop_strings=(text_of(inside), text_of(across))))
    return {
        "pairs": [inside, across],
        "ids": ids_of(responses),
        "finish": [r.finish for r in responses],
        "logprobs": [len(r.logprobs) for r in responses],
    }


def small_batches(engines: Engines, name: str, requests: list[Any], spec: Any) -> list[Any]:
    engine = engines.make(name, batch_size=3)
    engine.sync(1)
    responses = engine.generate(requests, spec)
    engine.close()
    return responses


def known_response(engines: Engines, name: str, request: Any, spec: Any) -> tuple[list[int], Any, Any]:
    engine = engines.make(name)
    engine.sync(1)
    free = list(engine.generate([request], spec)[0].token_ids)
    engine.close()
    return free, request, spec


def parameters(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights; NeMo keeps its modules in a list that torch does not look into."""
    for module in model.get_model_module_list():
        yield from module.named_parameters()


@contextmanager
def moved_weights(model: Any, layer: int | None = None) -> Iterator[None]:
    """Other weights within the block: all of them, or those of one layer."""
    saved = {n: p.detach().clone() for n, p in parameters(model)}
    with torch.no_grad():
        for name, p in parameters(model):
            if layer is None or f"layers.{layer}." in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters(model):
                p.copy_(saved[name])


def probe_of(requests: Sequence[Any]) -> Any:
    from nemo_ampo.rollout.probe import Probe

    return Probe(tuple(r.prompt_ids for r in requests), 12, 0.01, (0,), 0)


def weight_change(session: Any, engine: Any, requests: list[Any], spec: Any) -> dict[str, Any]:
    from nemo_ampo.rollout.probe import probe_gap, sync_and_probe

    trainer = session.model.get_inference_log_probs
    before = engine.generate(requests, spec)
    with moved_weights(session.model):
        stale = probe_gap(engine, trainer, probe_of(requests))
        sync_and_probe(engine, 3, trainer, probe_of(requests))
        after = engine.generate(requests, spec)
        error = logprob_error(session, requests, after)
    sync_and_probe(engine, 4, trainer, probe_of(requests))
    back = engine.generate(requests, spec)
    return {
        "stale_gap": stale,
        "before": ids_of(before),
        "after": ids_of(after),
        "error": error,
        "back": ids_of(back),
        "versions": [after[0].weight_version, back[0].weight_version],
    }


def mutations(session: Any, engines: Engines, family: str) -> dict[str, str]:
    """What happens when one safeguard is taken away: the message that stopped it, or nothing."""
    from nemo_ampo.rollout import trtllm_export, trtllm_refit
    from nemo_ampo.rollout.engine import Request, SamplingSpec
    from nemo_ampo.rollout.probe import duplicate_fraction, sync_and_probe

    requests = [Request(i, p, 1000 + i) for i, p in enumerate(prompts_of(LENGTHS))]
    trainer = session.model.get_inference_log_probs

    def run(owner: Any, name: str, broken: Any, moved: bool = False) -> str:
        original = getattr(owner, name)
        engine = engines.make("trtllm")

        def whole() -> None:
            if moved:
                sync_and_probe(engine, 0, trainer, probe_of(requests))
            setattr(owner, name, broken(original))
            with moved_weights(session.model):
                sync_and_probe(engine, 1, trainer, probe_of(requests))

        try:
            return refused(whole)
        finally:
            setattr(owner, name, original)
            engine.close()

    def no_op(original: Any) -> Any:
        return lambda *args: None

    def no_check(original: Any) -> Any:
        return lambda *args: None

    def drop_layer(original: Any) -> Any:
        return lambda self, model: {k: v for k, v in original(self, model).items() if ".layers.1." not in k}

    def stale_layer(original: Any) -> Any:
        """Layer 1 keeps the weights the engine was built with, under the right names."""

        def convert(self: Any, model: Any) -> Any:
            old = {k: v.clone() for k, v in self.decoder_weights.items()}
            return original(self, model) | {k: v for k, v in old.items() if ".layers.1." in k}

        return convert

    def remember(original: Any) -> Any:
        def build(self: Any, model: Any) -> Any:
            weights = original(self, model)
            self.decoder_weights = {k: v.clone() for k, v in weights.items()}
            return weights

        return build

    exporter = trtllm_export.RepairedExporter
    out = {
        "config repair": run(trtllm_export, "repair_config", no_op),
        "layer left out of refit": run(exporter, "_convert", drop_layer, moved=True),
        "refit skipped": run(trtllm_export, "strict_refit", no_op, moved=True),
        "nothing broken": run(trtllm_export, "strict_refit", lambda original: original, moved=True),
    }
    original_build = exporter.build_engine
    exporter.build_engine = remember(original_build)
    out["layer left stale"] = run(exporter, "_convert", stale_layer, moved=True)
    exporter.build_engine = original_build
    if family == "qwen2":
        out["weight repair"] = build_error(lambda: run(trtllm_export, "repair_weights", no_op))
        # Without the strict comparison of names the bias is lost in silence: the probe must still see it.
        original = trtllm_export.check_names
        trtllm_export.check_names = no_check(original)
        out["config repair, names unchecked"] = run(trtllm_export, "repair_config", no_op)
        trtllm_export.check_names = original
    sample = trtllm_refit._Sampler.sample
    trtllm_refit._Sampler.sample = lambda self, rows, spec: sample(self, [replace(r, seed=7) for r in rows], spec)
    engine = engines.make("trtllm")
    engine.sync(1)
    group = [Request(i, requests[0].prompt_ids, i) for i in range(8)]
    out["seed dropped"] = str(duplicate_fraction(group, engine.generate(group, SamplingSpec(8, (0,)))))
    trtllm_refit._Sampler.sample = sample
    out["seed kept"] = str(duplicate_fraction(group, engine.generate(group, SamplingSpec(8, (0,)))))
    engine.close()
    return out


def build_error(call: Callable[[], str]) -> str:
    try:
        return call()
    except RuntimeError as error:  # the real package raises this too
        return str(error)


def doctor_checks(session: Any, engines: Engines, family: str) -> dict[str, Any]:
    """What rollout-doctor says of each engine, and of one without its repairs."""
    from nemo_ampo.rollout import ENGINES, trtllm_export
    from nemo_ampo.rollout.doctor import Patient, examine, verdict

    def findings(name: str) -> list[Any]:
        engine = engines.make(name)
        patient = Patient(
            engine,
            session.model.get_inference_log_probs,
            lambda: parameters(session.model),
            replace(probe_of(()), prompts=tuple(prompts_of((9, 14, 4)))),
            text_of,
            MAX_NEW,
        )
        found = list(examine(patient))
        engine.close()
        return [[f.name, f.ok, f.detail] for f in found] + [["verdict", None, verdict(name, found)]]

    out: dict[str, Any] = {name: findings(name) for name in ENGINES}
    original = trtllm_export.repair_config
    trtllm_export.repair_config = lambda config, model: None
    out["broken"] = findings("trtllm")
    trtllm_export.repair_config = original
    return out


class Scripted:
    """Tokenizer and judge at once: every response is a valid reply whose score follows from its tokens."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        answer = " ".join(str(i % 7) for i in token_ids[:5])
        return f'Thinking Level: 1\n<|begin_of_answer|>\n"{answer}"\n<|end_of_answer|>'

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def submit(self, request: Any) -> Any:
        from concurrent.futures import Future

        from nemo_ampo.types import Verdict

        future: Future[Any] = Future()
        digits = [int(c) for c in request.dialogue.rsplit(": ", 1)[1] if c.isdigit()]
        future.set_result(Verdict(min(10.0, sum(digits) / 2), 3.0))
        return future


class Trainer:
    """The calls :class:`nemo_ampo.training.trainer.AmpoTrainer` makes for a step."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def logprobs(self, tokens: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        return self._session.model.get_inference_log_probs(tokens, mask_BT)

    def reference_logprobs(self, tokens: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        return self._session.model.get_init_policy_logprobs(tokens, mask_BT)

    updates_once = True

    def update(self, batch: Any) -> Any:
        from nemo_ampo.training.optimise import optimise
        from nemo_ampo.types import Updated

        known = {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
        tensors = {name: tensor for name, tensor in known.items() if name != "sampling_logprobs_BT"}
        self._session.model.prepare_for_training()
        metrics = optimise(self._session, tensors, clip=1.0)
        self._session.model.finish_training()
        old_BT = batch.old_logprobs_BT
        logprobs_BT = self._session.model.logprobs_of_update_BT if old_BT is None else old_BT
        return Updated({f"policy/{name}": value for name, value in metrics.items()}, logprobs_BT)


def two_steps(session: Any, engines: Engines, name: str, count: int = 2) -> list[dict[str, float]]:
    """That many AMPO steps from the same weights and a fresh optimizer; the weights are put back afterwards."""
    from nemo_ampo.algo.rewards import RewardConfig
    from nemo_ampo.ranks import MegatronRanks
    from nemo_ampo.rollout.config import RolloutConfig
    from nemo_ampo.step import Parts, ampo_step
    from nemo_ampo.types import DialogueTurn, Prompt

    def turn(i: int) -> Any:
        goals = {"agent1_goal": "sell", "agent2_goal": "buy", "agent1_state": 4.0, "agent2_state": 3.0}
        names = {"instruction": "Sell.", "agent1_name": "Al", "agent2_name": "Bo", "tag": None}
        return DialogueTurn(row_id=str(i), dialog=("Turn 0: Al said:",), turn=0, **names, **goals)

    prompts = [Prompt(turn(i), p) for i, p in enumerate(prompts_of((9, 14)))]
    engine = engines.make(name, batch_size=8)
    parts = Parts(
        engine=engine,
        judge=Scripted(),
        tokenizer=Scripted(),
        ranks=MegatronRanks(),
        rollout=RolloutConfig(prompts_per_step=2, group_size=4, max_new_tokens=12),
        reward=RewardConfig(),
        algorithm=session.model.algorithm,
        stop_token_ids=tuple(range(3, VOCAB, 24)),
        pad_id=0,
        seed=1,
        probe=replace(probe_of(()), prompts=tuple(p.token_ids for p in prompts)),
    )
    saved = {n: p.detach().clone() for n, p in parameters(session.model)}
    steps = []
    for step in range(count):
        result = ampo_step(step, prompts, Trainer(session), parts)
        metrics = {k: v for k, v in result.metrics.items() if k.startswith(("reward/", "policy/", "engine/"))}
        steps.append(metrics | {"rewards": [s.parts.reward for s in result.samples]})
    engine.close()
    with torch.no_grad():
        for n, p in parameters(session.model):
            p.copy_(saved[n])
    forget_moments(session.optimizer)
    return steps


def duplicates_without_sample(session: Any, engines: Engines, name: str) -> float:
    """Share of repeated responses of a step whose seeds leave out the number of the sample."""
    from nemo_ampo import step

    original = step.request_seed
    step.request_seed = lambda run_seed, step, prompt, sample: original(run_seed, step, prompt, 0)
    try:
        return two_steps(session, engines, name, count=1)[0]["engine/duplicate_fraction"]
    finally:
        step.request_seed = original


def forget_moments(optimizer: Any) -> None:
    """Back to an optimizer that never stepped, over the weights as they are now."""
    inner = optimizer.mcore_optimizer
    inner.reload_model_params()
    for chained in getattr(inner, "chained_optimizers", [inner]):
        for group in chained.optimizer.param_groups:
            group["step"] = 0
        for state in chained.optimizer.state.values():
            for moment in state.values():
                moment.zero_()


def main() -> None:
    session, assets = open_session()
    from nemo_ampo.rollout import ENGINES

    with ExitStack() as stack:
        engines = Engines(session, assets, FOLDER, stack)
        results: dict[str, Any] = {name: engine_checks(session, engines, name) for name in ENGINES}
        if RANKS == 1:
            results["mutations"] = mutations(session, engines, FAMILY)
            results["doctor"] = doctor_checks(session, engines, FAMILY)
            results["steps"] = {name: two_steps(session, engines, name) for name in ENGINES}
            results["seed without sample"] = {name: duplicates_without_sample(session, engines, name) for name in ENGINES}
        else:
            results["unequal"] = unequal_calls(engines)
    if MAIN:
        (FOLDER / "results.json").write_text(json.dumps(results))


def unequal_calls(engines: Engines) -> dict[str, list[str]]:
    """Ranks of one replica that ask for different things must all refuse, and none may hang."""
    from nemo_ampo.rollout import ENGINES
    from nemo_ampo.rollout.engine import Request, SamplingSpec

    out = {}
    for name in ENGINES:
        engine = engines.make(name)
        engine.sync(1)
        mine = [Request(0, (5, 6), seed=torch.distributed.get_rank())]
        message = refused(lambda engine=engine, mine=mine: engine.generate(mine, SamplingSpec(4, (0,))))
        said = [""] * RANKS
        torch.distributed.all_gather_object(said, message)
        out[name] = said
        engine.close()
    return out


if __name__ == "__main__":
    main()
