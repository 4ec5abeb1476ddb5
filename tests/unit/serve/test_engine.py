"""The engine against transformers' own ``generate`` on the same weights, many requests at once."""

from __future__ import annotations

import random
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from nemo_ampo.errors import EngineError, UserError
from nemo_ampo.model_folder.policy_files import stop_token_ids
from nemo_ampo.serve import engine as engine_module
from nemo_ampo.serve.dial import ModeDial
from nemo_ampo.serve.engine import GenerateRequest, ServingEngine, sample
from nemo_ampo.serve.rows import next_logits


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path):
    engine = ServingEngine(tiny_checkpoint, max_batch=4)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path):
    """Greedy tokens by ``generate``, one prompt at a time, the stop token included."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, torch_dtype="auto").eval()
    stops = list(stop_token_ids(tiny_checkpoint, AutoTokenizer.from_pretrained(tiny_checkpoint)))

    def generate(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )
        return out[0, len(prompt) :].tolist()

    return generate


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.randrange(3, 600) for _ in range(draw.randrange(1, 90))) for _ in range(count)]


def test_many_requests_at_once_get_the_tokens_each_would_get_alone(engine: ServingEngine, reference) -> None:
    asked = [GenerateRequest(p, max_tokens=5 + 7 * (i % 5), temperature=0) for i, p in enumerate(prompts(23, seed=1))]
    futures = [engine.submit(request) for request in asked]
    for request, future in zip(asked, futures, strict=True):
        assert list(future.result(timeout=60).ids) == reference(request.prompt, request.max_tokens)
    lengths = {len(request.prompt) for request in asked}
    assert len(lengths) > 10 and len({f.result().ids for f in futures}) > 10


def test_a_seed_means_the_same_alone_and_in_company(engine: ServingEngine) -> None:
    (prompt, *others) = prompts(9, seed=2)
    request = GenerateRequest(prompt, max_tokens=30, temperature=1.0, top_p=0.95, seed=5)
    alone = engine.submit(request).result(timeout=60)
    crowd = [engine.submit(GenerateRequest(p, max_tokens=40, temperature=1.0)) for p in others]
    assert engine.submit(request).result(timeout=60) == alone
    assert [f.result(timeout=60) for f in crowd]
    other_seed = GenerateRequest(prompt, max_tokens=30, temperature=1.0, top_p=0.95, seed=6)
    assert engine.submit(other_seed).result(timeout=60) != alone


def test_a_stop_text_ends_the_reply_and_is_not_part_of_it(engine: ServingEngine) -> None:
    prompt = prompts(1, seed=3)[0]
    whole = engine.submit(GenerateRequest(prompt, max_tokens=40, temperature=0)).result(timeout=60)
    stop = whole.text[20:26]
    cut = engine.submit(GenerateRequest(prompt, max_tokens=40, temperature=0, stop=(stop,))).result(timeout=60)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, len(cut.ids) < len(whole.ids)) == ("stop", True)


def test_a_cancelled_request_leaves_and_the_others_go_on(engine: ServingEngine, reference) -> None:
    first, second, third = prompts(3, seed=4)
    kept = engine.submit(GenerateRequest(first, max_tokens=60, temperature=0))
    given_up = engine.submit(GenerateRequest(second, max_tokens=100_000, temperature=1.0))
    given_up.cancel()
    after = engine.submit(GenerateRequest(third, max_tokens=9, temperature=0))
    assert list(kept.result(timeout=60).ids) == reference(first, 60)
    assert list(after.result(timeout=60).ids) == reference(third, 9)
    with pytest.raises(CancelledError):
        given_up.result()


def test_a_prompt_beyond_the_context_is_refused_and_a_reply_ends_with_it(engine: ServingEngine) -> None:
    with pytest.raises(UserError, match="context_length_exceeded: 2048 prompt tokens, the context is 2048"):
        engine.submit(GenerateRequest((5,) * 2048, max_tokens=1))
    reply = engine.submit(GenerateRequest((5,) * 2040, max_tokens=100, temperature=0)).result(timeout=60)
    assert len(reply.ids) <= 8


def test_the_mode_dial_decides_the_mode_and_nothing_else(engine: ServingEngine, tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    dial = engine._mode_dial()
    opening = tuple(tokenizer.encode("Thinking Level:", add_special_tokens=False))
    assert {k: tokenizer.decode([token]).strip() for k, token in dial.choices.items()} == {k: str(k) for k in range(1, 5)}
    assert dial.chooses_next(opening) and not dial.chooses_next((*opening, 5)) and not dial.chooses_next(())

    # A random model writes no level line; what it writes first stands in for it here.
    prompt = prompts(1, seed=8)[0]
    plain = engine.submit(GenerateRequest(prompt, max_tokens=12, temperature=0)).result(timeout=60).ids
    engine._dial = dial = ModeDial(tokenizer)
    dial._prefix, dial._prefix_text = list(plain[:4]), tokenizer.decode(plain[:4])
    try:
        biased = {
            mode: engine.submit(GenerateRequest(prompt, 12, temperature=0, mode_bias={mode: 1e4})).result(timeout=60).ids
            for mode in (1, 3)
        }
        none = engine.submit(GenerateRequest(prompt, 12, temperature=0, mode_bias={2: 0.0})).result(timeout=60).ids
    finally:
        engine._dial = None
    assert none == plain
    for mode, ids in biased.items():
        assert ids[:4] == plain[:4] and ids[4] == dial.choices[mode]
        rest = engine.submit(GenerateRequest((*prompt, *ids[:5]), 7, temperature=0)).result(timeout=60).ids
        assert ids[5:] == rest, "the bias went on after the choice"


def test_a_step_that_breaks_for_one_request_ends_that_one_only(
    engine: ServingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="a token outside the model's vocabulary"):
        engine.submit(GenerateRequest((10**6,), max_tokens=3))
    asked = [GenerateRequest(p, 20, temperature=1.0, seed=i) for i, p in enumerate(prompts(4, seed=5))]
    alone = [engine.submit(request).result(timeout=60) for request in asked]
    usual = engine_module.next_logits
    broken = len(asked[2].prompt) + 5

    def breaks(model, tokens, known, height):
        if any(row[0][0].shape[2] == broken for row in known):
            raise RuntimeError("out of\nmemory")
        return usual(model, tokens, known, height)

    monkeypatch.setattr(engine_module, "next_logits", breaks)
    unlucky = [i for i, r in enumerate(asked) if len(r.prompt) <= broken < len(r.prompt) + len(alone[i].ids) - 1]
    outcomes = [future.exception(timeout=60) or future.result() for future in map(engine.submit, asked)]
    assert 2 in unlucky and len(unlucky) < len(asked)
    for i, outcome in enumerate(outcomes):
        if i in unlucky:
            assert isinstance(outcome, EngineError) and str(outcome) == "generation failed: out of memory"
        else:
            assert outcome == alone[i]


def test_poisonous_numbers_spoil_their_own_reply_only(engine: ServingEngine) -> None:
    """What the web side refuses; here nothing stands in the way."""
    good = [GenerateRequest(p, 30, temperature=1.0, seed=i) for i, p in enumerate(prompts(9, seed=6))]
    alone = [engine.submit(request).result(timeout=60) for request in good]
    prompt = good[0].prompt
    poison = [GenerateRequest(prompt, 5, temperature=t, top_p=p) for t in (1e-300, 1e-40, 1e-5) for p in (1.0, 0.5, 1e-300)]
    futures = [engine.submit(request) for pair in zip(good, poison, strict=True) for request in pair]
    assert [future.result(timeout=60) for future in futures[::2]] == alone
    greedy = engine.submit(GenerateRequest(prompt, 5, temperature=0)).result(timeout=60)
    for future in futures[1::2]:
        assert isinstance(future.exception(timeout=60), EngineError) or future.result() == greedy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_logit_in_company_is_the_one_alone_to_the_last_bit(tiny_checkpoint: Path, dtype: str) -> None:
    """Against rows of other lengths, in every place of the step, over many steps."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, torch_dtype=getattr(torch, dtype)).eval()
    asked = prompts(8, seed=7)
    compared = 0
    with torch.inference_mode():
        known = []
        for prompt in asked:
            cache = DynamicCache()
            model(torch.tensor([prompt]), past_key_values=cache, use_cache=True)
            known.append(list(zip(cache.key_cache, cache.value_cache, strict=True)))
        together, single = known, [[row] for row in known]
        draw = random.Random(8)
        for _ in range(12):
            order = draw.sample(range(8), 8)
            tokens = [draw.randrange(3, 600) for _ in asked]
            logits_BV, grown = next_logits(model, [tokens[i] for i in order], [together[i] for i in order], 8)
            together = [grown[order.index(i)] for i in range(8)]
            for i in range(8):
                alone_1V, single[i] = next_logits(model, [tokens[i]], single[i], 8)
                assert torch.equal(alone_1V[0], logits_BV[order.index(i)])
                compared += 1
    assert compared == 96


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2, 1e-9]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(logits, 1.0, 1.0, generator) for _ in range(4000)]
    assert [drawn.count(i) / 4000 for i in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    nucleus = [sample(logits, 1.0, 0.75, generator) for _ in range(4000)]
    assert nucleus.count(0) / 4000 == pytest.approx(0.625, abs=0.03) and set(nucleus) == {0, 1}
    cold = [sample(logits, 0.5, 1.0, generator) for _ in range(4000)]
    assert cold.count(0) / 4000 == pytest.approx(25 / 38, abs=0.03)
