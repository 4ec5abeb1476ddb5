"""Run on one or two tensor-parallel ranks: log-probabilities, entropies and gradients against what they replace."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROWS, POSITIONS, VOCAB = 3, 7, 40


def main(folder: Path) -> None:
    from megatron.core import parallel_state, tensor_parallel
    from nemo_aligner.utils.distributed import from_parallel_logits_to_logprobs

    from nemo_ampo.algo.loss import entropy_from_logits
    from nemo_ampo.megatron import vocab_parallel
    from nemo_ampo.megatron.vocab_parallel import next_token_logprobs

    alone = {} if "RANK" in os.environ else {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("gloo", **alone)
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    g = torch.Generator().manual_seed(0)
    whole = 5 * torch.randn(ROWS, POSITIONS, VOCAB, generator=g)
    whole[:, :, -3:] = -1e4  # as padded rows of the vocabulary
    whole[0, 0, 5] = -torch.inf
    tokens = torch.randint(0, VOCAB - 3, (ROWS, POSITIONS), generator=g)
    of_logprobs, of_entropy = torch.randn(2, ROWS, POSITIONS - 1, generator=g)
    part = slice(rank * VOCAB // size, (rank + 1) * VOCAB // size)

    mask = torch.rand(ROWS, POSITIONS - 1, generator=g) < 0.7
    mask[0, 0] = True

    def before(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        full = tensor_parallel.gather_from_tensor_model_parallel_region(logits)[:, :-1]
        logprobs = from_parallel_logits_to_logprobs(vocab_parallel_logits=logits, target=tokens, higher_stability=True)
        return logprobs.where(mask, 0.0), entropy_from_logits(full.float()).where(mask, 0.0)

    def after(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return next_token_logprobs(logits[:, :-1][mask], tokens, mask)

    result: dict[str, Any] = {}
    cases = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for name, kind in cases.items():
        logits = whole[:, :, part].to(kind)
        for weights in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
            found = []
            for function, widen in ((before, True), (after, False)):
                mine = logits.clone().requires_grad_()
                # Megatron's wrapper used to make them fp32; each rank's gradient is that of its own part.
                logprobs, entropy = function(mine.float() if widen else mine, tokens)
                (weights[0] * logprobs * of_logprobs + weights[1] * entropy * of_entropy).sum().backward()
                found.append([value.detach() for value in (logprobs, entropy, mine.grad)])
            gaps = [float((a.float() - b.float()).nan_to_num().abs().max()) for a, b in zip(*found, strict=True)]
            result[f"{name} {weights}"] = gaps
        with mock.patch.object(vocab_parallel, "STRETCH_ELEMENTS", 2 * VOCAB // size):
            short = logits.clone().requires_grad_()
            values = after(short, tokens)
            (values[0] * of_logprobs + values[1] * of_entropy).sum().backward()
        at_once = logits.clone().requires_grad_()
        values = after(at_once, tokens)
        (values[0] * of_logprobs + values[1] * of_entropy).sum().backward()
        result[f"{name} stretches"] = float((short.grad - at_once.grad).abs().max())
        result[f"{name} types"] = [str(value.dtype) for value in (*values, short.grad)]
        result[f"{name} finite"] = bool(short.grad.isfinite().all())
    (folder / f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
