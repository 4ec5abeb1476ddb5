"""``engine_jobs.py FOLDER``: everything about engine, actor and trainer that needs a NeMo model, in one process.

Measures and writes ``results.json``; the assertions are in the test files. The oracle is transformers on the same weights.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(sys.argv[1])


def open_actor() -> tuple[Any, Any]:
    """The folder's actor and the transformers model it was converted from."""
    from transformers import AutoModelForCausalLM

    from nemo_ampo import compat

    compat.setup("cpu")
    from nemo_ampo.checkpoint.nemo_file import unpack_assets
    from nemo_ampo.config.compose import compose
    from nemo_ampo.training.actor import AmpoActor
    from nemo_ampo.training.session import open_session, prepare_config

    overrides = ["model.optim.lr=0.01", "model.global_batch_size=8", "model.micro_batch_size=4", "model.optim.eps=2e-8"]
    cfg = compose("ampo", "tiny", overrides)
    nemo = str(FOLDER / "model.nemo")
    (FOLDER / "run").mkdir()
    prepare_config(cfg, FOLDER / "run", nemo, unpack_assets(nemo, FOLDER / "assets"), "cpu")
    session = open_session(cfg, "reinforce", AmpoActor, nemo, 8, keep_reference=True)
    return session, AutoModelForCausalLM.from_pretrained(FOLDER / "hf").eval()


def hf_logprobs(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    logits = model(tokens_BT).logits[:, :-1]
    return torch.log_softmax(logits.float(), -1).gather(-1, tokens_BT[:, 1:].unsqueeze(-1)).squeeze(-1)


def engine_checks(session: Any, hf: Any) -> dict[str, Any]:
    from nemo_ampo.errors import EngineError
    from nemo_ampo.megatron.padding import vocab_size
    from nemo_ampo.rollout import megatron
    from nemo_ampo.rollout.engine import Request, SamplingSpec
    from nemo_ampo.rollout.megatron import MegatronEngine
    from nemo_ampo.rollout.packing import pack

    vocab = vocab_size(session.model)
    engine = MegatronEngine(session.model, batch_size=16)
    g = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, vocab, (n,), generator=g).tolist()) for n in (5, 9, 1, 30, 12, 17)]
    requests = [Request(i, p, seed=1000 + i) for i, p in enumerate(prompts)]
    stops = tuple(range(3, vocab, 24))  # one id in 24 ends a reply: some end soon, some run to the limit
    spec = SamplingSpec(24, stops)
    order: list[int] = []
    responses = engine.generate(requests, spec, on_finish=lambda r: order.append(r.request_id))
    packed = pack(requests, responses, pad_id=0)
    oracle = hf_logprobs(hf, packed.tokens_BT)
    alone = [engine.generate([r], spec)[0] for r in requests]
    small = MegatronEngine(session.model, batch_size=2).generate(requests, spec)
    whole_pass = dict(megatron._PREFILL_TOKENS)
    megatron._PREFILL_TOKENS.update(dict.fromkeys(whole_pass, 32))  # passes of 30, 17, 12 + 9 and 5 + 1 tokens
    in_passes = engine.generate(requests, spec)
    megatron._PREFILL_TOKENS.update(whole_pass)
    shuffled = engine.generate(requests[::-1], spec)[::-1]
    reseeded = engine.generate([replace(r, seed=r.seed + 1) for r in requests], spec)
    twins = engine.generate([Request(i, prompts[0], seed=5) for i in range(4)], spec)
    many = engine.generate([Request(i, prompts[1], seed=i) for i in range(16)], SamplingSpec(1, stops))
    cold = engine.generate(requests, replace(spec, temperature=0.01))
    greedy = hf.generate(
        input_ids=torch.tensor([prompts[3]]), max_new_tokens=24, do_sample=False, eos_token_id=list(stops), pad_token_id=0
    )[0, 30:].tolist()

    def refused(bad: list[Request], sampling: SamplingSpec = spec) -> str:
        try:
            engine.generate(bad, sampling)
        except EngineError as error:
            return str(error)
        return ""

    def ids(rows: Any) -> list[list[int]]:
        return [list(r.token_ids) for r in rows]

    return {
        "finish": [r.finish for r in responses],
        "lengths": [len(r.token_ids) for r in responses],
        "stop_only_at_end": all(not set(r.token_ids[:-1]) & set(stops) for r in responses),
        "finished_order": order,
        "logprob_error": float((packed.sampling_logprobs_BT - oracle)[packed.mask_BT].abs().max()),
        "trainer_error": float((session.model.get_inference_log_probs(packed.tokens_BT) - oracle).abs().max()),
        "alone_equal": ids(alone) == ids(responses),
        "small_batches_equal": ids(small) == ids(responses),
        "passes_equal": ids(in_passes) == ids(responses),
        "passes_error": max(float((a.logprobs - b.logprobs).abs().max()) for a, b in zip(in_passes, responses, strict=True)),
        "order_does_not_matter": ids(shuffled) == ids(responses),
        "other_seed_differs": ids(reseeded) != ids(responses),
        "equal_seeds_equal": len({r.token_ids for r in twins}) == 1,
        "first_tokens": len({r.token_ids for r in many}),
        "largest_id": max(max(r.token_ids) for r in responses),
        "vocab": vocab,
        "cold_is_greedy": list(cold[3].token_ids) == greedy,
        "training_mode_restored": all(m.training for m in session.model.get_model_module_list()),
        "too_long": refused([Request(0, (3,) * 5000, 1)]),
        "empty": refused([Request(0, (), 1)]),
        "twice": refused([requests[0], requests[0]]),
        "outside": refused([Request(0, (vocab,), 1)]),
        "no_stop": refused(requests, SamplingSpec(4, ())),
    }


def work_checks(session: Any) -> dict[str, Any]:
    """How many tokens go through the model, and through its output layer, for what is asked."""
    from nemo_ampo.megatron.padding import vocab_size
    from nemo_ampo.rollout.engine import Request, SamplingSpec
    from nemo_ampo.rollout.megatron import MegatronEngine

    vocab = vocab_size(session.model)
    (module,) = session.model.get_model_module_list()
    embedded: list[int] = []
    scored: list[int] = []
    hooks = [
        module.embedding.word_embeddings.register_forward_pre_hook(lambda m, args: embedded.append(args[0].numel())),
        module.output_layer.register_forward_hook(lambda m, args, out: scored.append(out[0].size(0))),
    ]
    engine = MegatronEngine(session.model, batch_size=64)

    def count(requests: list[Request], sampling: SamplingSpec) -> dict[str, int]:
        embedded.clear()
        scored.clear()
        drawn = sum(len(r.token_ids) for r in engine.generate(requests, sampling))
        return {"embedded": sum(embedded), "calls": len(embedded), "drawn": drawn, "columns": max(scored)}

    g = torch.Generator().manual_seed(4)
    prompts = [tuple(torch.randint(3, vocab, (n,), generator=g).tolist()) for n in (9, 30)]
    group = [Request(i, prompts[0], i) for i in range(16)]
    out = {
        "one prompt": count(group, SamplingSpec(1, (0,))),
        "two prompts": count([*group, *(Request(16 + i, prompts[1], i) for i in range(16))], SamplingSpec(1, (0,))),
        "most finish": count([Request(i, prompts[0], i) for i in range(64)], SamplingSpec(24, tuple(range(0, vocab, 4)))),
    }
    for hook in hooks:
        hook.remove()
    return out


def leaving_checks(session: Any) -> dict[str, Any]:
    """Rows fed and bytes cached in each forward pass, when all but 16 rows of a batch draw a stop token at once."""
    from nemo_ampo.megatron.padding import vocab_size
    from nemo_ampo.rollout.engine import Request, SamplingSpec
    from nemo_ampo.rollout.megatron import MegatronEngine

    (module,) = session.model.get_model_module_list()
    engine = MegatronEngine(session.model, batch_size=64)
    prompts = [tuple(range(5, 5 + n)) for n in (20, 12, 12, 7)]
    requests = [Request(i, prompts[i % 4], i) for i in range(200)]
    never = SamplingSpec(6, (vocab_size(session.model) - 1,))
    staying = requests[:16]
    kept = {i for r in engine.generate(staying, never) for i in r.token_ids}
    firsts = {r.request_id: r.token_ids[0] for r in engine.generate(requests[16:], replace(never, max_new_tokens=1))}
    leaving = [r for r in requests[16:] if firsts[r.request_id] not in kept][:48]
    passes: list[dict[str, int]] = []

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cached = [t for pair in kwargs["inference_params"].key_value_memory_dict.values() for t in pair]
        memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cached}
        passes.append({"rows": args[0].size(0), "columns": args[0].size(1), "bytes": sum(memory.values())})

    hook = module.register_forward_hook(after, with_kwargs=True)
    engine.generate(staying + leaving, replace(never, stop_token_ids=tuple({firsts[r.request_id] for r in leaving})))
    at_once = passes.copy()
    passes.clear()
    engine.generate(requests, never)
    hook.remove()
    config = session.model.cfg
    head = config.hidden_size // config.num_attention_heads
    column = config.num_layers * 2 * config.num_query_groups * head * 4  # keys and values of one token, float32
    return {"at_once": at_once, "in_batches": passes, "rows": len(staying + leaving), "column_bytes": column}


def frequencies(session: Any, hf: Any) -> dict[str, Any]:
    """First drawn tokens of 4,000 seeds against the distribution they should follow."""
    from nemo_ampo.rollout.engine import Request, SamplingSpec
    from nemo_ampo.rollout.megatron import MegatronEngine

    prompt = (5, 6, 7, 8)
    engine = MegatronEngine(session.model, batch_size=1000)
    with torch.no_grad():
        probabilities = torch.softmax(hf(torch.tensor([prompt])).logits[0, -1].float() / 0.25, -1)
    drawn = engine.generate([Request(i, prompt, i) for i in range(4000)], SamplingSpec(1, (0,), temperature=0.25))
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in drawn]), minlength=len(probabilities)).double()
    top = probabilities.argsort(descending=True)[:20]
    expected, seen = 4000 * probabilities[top].double(), counts[top]
    rest_expected, rest_seen = 4000 - expected.sum(), 4000 - seen.sum()
    chi2 = ((seen - expected) ** 2 / expected).sum() + (rest_seen - rest_expected) ** 2 / rest_expected
    return {"chi2": float(chi2), "degrees": 20}


def update_checks(session: Any, hf: Any) -> dict[str, Any]:
    """One optimizer step against autograd on the transformers model with the same pure loss functions."""
    from nemo_ampo.algo.algorithm import PRESETS, AlgorithmConfig
    from nemo_ampo.algo.loss import entropy_from_logits, kl_estimate, surrogate, token_weights, weighted_sum
    from nemo_ampo.training.optimise import optimise

    out: dict[str, Any] = {}
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 500, (8, 40), generator=g)
    drawn = torch.rand((8, 39), generator=g) < torch.linspace(0.2, 0.9, 8)[:, None]  # micro-batches of unequal size
    advantages = torch.randn(8, generator=g)[:, None].expand(drawn.shape).contiguous()
    with torch.no_grad():
        now = hf_logprobs(hf, tokens)
    old = now + 0.3 * torch.randn(now.shape, generator=g)
    ref = now + 0.5 * torch.randn(now.shape, generator=g)
    algorithms = {
        "paper": AlgorithmConfig(),
        "left out": AlgorithmConfig(),
        "heavy": AlgorithmConfig(kl_coef=0.5, entropy_coef=0.2, aggregate="sequence_mean", kl_kind="k2", clip_high=0.3),
        "dual": AlgorithmConfig(aggregate_over="batch", dual_clip=1.2),
        "dr-grpo": PRESETS["dr-grpo"],
        "dapo": PRESETS["dapo"],
        "gspo": replace(PRESETS["gspo"], clip_low=0.03, clip_high=0.04),
    }
    for name, algorithm in algorithms.items():
        mask, rows = drawn, [slice(0, 4), slice(4, 8)]  # the two micro-batches, each with its own mean ...
        if algorithm.aggregate_over == "batch":
            rows = [slice(0, 8)]  # ... or one mean over both
        if name == "left out":  # no sample of the first one counts: as if it had not been there
            mask, rows = drawn & (torch.arange(8) > 3)[:, None], [slice(4, 8)]
        hf.zero_grad()
        total = 0.0
        for part in rows:
            logits = hf(tokens[part]).logits[:, :-1].float()
            logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[part, 1:, None])[..., 0]
            policy = surrogate(
                logprobs,
                old[part],
                advantages[part],
                mask[part],
                algorithm.clip_low,
                algorithm.clip_high,
                algorithm.dual_clip,
                algorithm.ratio,
            )
            kl = kl_estimate(logprobs, ref[part], algorithm.kl_kind, mask[part])
            values = policy.loss_BT + algorithm.kl_coef * kl - algorithm.entropy_coef * entropy_from_logits(logits)
            weights = token_weights(mask[part], algorithm.aggregate, None, algorithm.constant_tokens)
            loss = weighted_sum(values, weights) / len(rows)
            loss.backward()
            total += float(loss.detach())
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in hf.parameters() if p.grad is not None]))
        session.model.algorithm = algorithm
        session.model.prepare_for_training()
        for group in session.optimizer.param_groups:
            group["lr"] = 0.0  # the weights stay, so that the next case starts from the same ones
        batch = {
            "tokens_BT": tokens,
            "mask_BT": mask,
            "advantages_BT": advantages,
            "old_logprobs_BT": old,
            "ref_logprobs_BT": ref,
        }
        metrics = optimise(session, batch, clip=1.0)
        session.model.finish_training()
        out[name] = {"loss": total, "grad_norm": float(norm), "nemo": metrics}
    return out


def reference_checks(session: Any, hf: Any) -> dict[str, Any]:
    """The reference policy stays what it was while the weights move."""
    tokens = torch.randint(3, 500, (8, 24), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        oracle = hf_logprobs(hf, tokens)
        for p in session.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    moved = session.model.get_inference_log_probs(tokens)
    reference = session.model.get_init_policy_logprobs(tokens)
    after = session.model.get_inference_log_probs(tokens)
    return {
        "moved": float((moved - oracle).abs().max()),
        "reference_error": float((reference - oracle).abs().max()),
        "policy_untouched": bool(torch.equal(moved, after)),
    }


def main() -> None:
    session, hf = open_actor()
    results = {
        "eps": [group["eps"] for group in session.optimizer.param_groups],
        "engine": engine_checks(session, hf),
        "work": work_checks(session),
        "leaving": leaving_checks(session),
        "frequencies": frequencies(session, hf),
        "update": update_checks(session, hf),
        "reference": reference_checks(session, hf),
    }
    (FOLDER / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
