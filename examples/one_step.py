"""One AMPO step with a scripted engine and a dictionary as judge; prints the advantages of one group.

A training run has a Megatron model, a rollout engine and an HTTP judge in their places, and calls the same function.
"""

from concurrent.futures import Future

import torch

from nemo_ampo import PRESETS, Verdict
from nemo_ampo.algo.rewards import RewardConfig
from nemo_ampo.ranks import OneProcess
from nemo_ampo.reply.grammar import render_reply
from nemo_ampo.reply.modes import MODES
from nemo_ampo.rollout.config import RolloutConfig
from nemo_ampo.rollout.engine import Caps, Response, SyncReport
from nemo_ampo.step import Parts, ampo_step
from nemo_ampo.types import DialogueTurn, Prompt, Updated

ACHIEVED = {1: 4.0, 2: 5.0, 3: 8.0, 4: 9.0}  # what each mode's answer makes of the speaker's goal, 0 to 10
TURN = DialogueTurn("chair", ("Turn 0: Ann said:",), 0, "Sell the chair.", "Ann", "Bo", "a high price", "a low price", 2, 2)


class Characters:
    """A tokenizer with a token per character; 0 ends a reply."""

    tokenize = staticmethod(list)

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(chr(i) for i in token_ids if i)


class Engine:
    """Answers two of eight requests in each mode; deeper modes think in more words."""

    caps = Caps("raw", 8, 999, 9999, 70_000, False)

    def sync(self, weight_version):
        return SyncReport(weight_version, 0, 0, 0.0)

    def release(self): ...

    def generate(self, requests, sampling, on_finish):
        responses = []
        for request in requests:
            mode = MODES[request.request_id // 2 + 1]
            text = render_reply(mode.id, f'"Offer {mode.id}."', dict.fromkeys(mode.sections, "Well. " * mode.id))
            ids = (*map(ord, text), 0)
            responses.append(Response(request.request_id, ids, torch.full((len(ids),), -0.5), "eos"))
            on_finish(responses[-1])
        return responses


class Judge:
    """Looks the offer up."""

    def submit(self, request):
        (future := Future()).set_result(Verdict(ACHIEVED[int(request.dialogue.split("Offer ")[1][0])], 3.0))
        return future


class Policy:
    """Its log-probabilities never change; a real one would learn from the batch."""

    def logprobs(self, tokens_BT, mask_BT):
        return torch.full((len(tokens_BT), tokens_BT.size(1) - 1), -0.5)

    updates_once, reference_logprobs = True, logprobs
    update = staticmethod(lambda batch: Updated({}, None))


def step():
    rules = RolloutConfig(prompts_per_step=1, group_size=8, max_new_tokens=999), RewardConfig(), PRESETS["ampo"]
    parts = Parts(Engine(), Judge(), Characters(), OneProcess(), *rules, stop_token_ids=(0,), pad_id=0, seed=1)
    return ampo_step(0, [Prompt(TURN, (1, 2, 3))], Policy(), parts)


if __name__ == "__main__":
    for sample, advantage in zip((result := step()).samples, result.advantages, strict=True):
        print(f"mode {sample.parts.mode}  {sample.num_tokens:4d} tokens  reward {sample.parts.reward:.3f}  {advantage:+.3f}")
