"""``peer_numbers.py vllm|transformers JOB OUT``: what a reader of an exported folder makes of it, as JSON.

Runs in an environment that may hold nothing of this project. The job names the folder, conversations, a text as tokens, how
many tokens a reply may have and tokens to force. Answered are the prompts' tokens by the folder's own tokenizer and
template, the greedy replies with the log-probability of each of their tokens, that of each token of the text but the first,
and how long a reply is when a token is forced.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

FORCED = 100.0
"""Added to the logit of a forced token; the most that vLLM takes."""


def of_transformers(job: dict[str, Any]) -> dict[str, Any]:
    """The Auto classes and ``generate`` with what the folder says, but for sampling."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    model = AutoModelForCausalLM.from_pretrained(job["folder"], torch_dtype=torch.float32)

    def reply(prompt: list[int], forced: int | None = None) -> dict[str, Any]:
        def force(ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
            if forced is not None:
                logits_BV[:, forced] += FORCED
            return logits_BV

        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=job["max_new_tokens"],
            logits_processor=LogitsProcessorList([force]),
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[0, len(prompt) :].tolist()
        logprobs = [torch.log_softmax(logits[0], -1)[t].item() for logits, t in zip(out.logits, tokens, strict=True)]
        return {"tokens": tokens, "logprobs": logprobs}

    with torch.no_grad():
        logprobs_TV = torch.log_softmax(model(torch.tensor([job["text"]])).logits[0, :-1], -1)
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        for messages in job["conversations"]
    ]
    return {
        "version": transformers.__version__,
        "prompts": prompts,
        "replies": [reply(prompt) for prompt in prompts],
        "text": [row[token].item() for row, token in zip(logprobs_TV, job["text"][1:], strict=True)],
        "lengths": [len(reply(prompts[0], token)["tokens"]) for token in job["forced"]],
    }


def of_vllm(job: dict[str, Any]) -> dict[str, Any]:
    """The engine with its defaults, which take the stop tokens from the folder."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    llm = vllm.LLM(job["folder"], dtype="float32", enforce_eager=True, max_model_len=job["max_model_len"], max_num_seqs=8)

    def reply(conversations: list[Any], forced: int | None = None) -> list[Any]:
        bias = None if forced is None else {forced: FORCED}
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=job["max_new_tokens"], logprobs=0, logit_bias=bias)
        return llm.chat(conversations, sampling, use_tqdm=False)

    answers = reply(job["conversations"])
    read = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    text = llm.generate({"prompt_token_ids": job["text"]}, read, use_tqdm=False)[0].prompt_logprobs
    return {
        "version": vllm.__version__,
        "prompts": [list(answer.prompt_token_ids) for answer in answers],
        "replies": [
            {
                "tokens": list(answer.outputs[0].token_ids),
                "logprobs": [
                    at[t].logprob for at, t in zip(answer.outputs[0].logprobs, answer.outputs[0].token_ids, strict=True)
                ],
            }
            for answer in answers
        ],
        "text": [at[token].logprob for at, token in zip(text[1:], job["text"][1:], strict=True)],
        "lengths": [len(reply(job["conversations"][:1], token)[0].outputs[0].token_ids) for token in job["forced"]],
    }


def main() -> None:
    reader, job, out = sys.argv[1:]
    numbers = {"vllm": of_vllm, "transformers": of_transformers}[reader](json.loads(Path(job).read_text()))
    Path(out).write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
