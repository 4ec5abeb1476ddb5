"""Peak memory of the loss over a large vocabulary, beside that of upstream's functions: ``python bench/loss_memory.py``.

One rank's share of Qwen2.5's vocabulary at four tensor-parallel ranks, logits in bf16 as the model gives them. Bytes are
those of torch's memory tracker; the logits themselves count on both sides. All positions count here; of a prompt none do.
"""

from __future__ import annotations

import torch
from torch.distributed._tools.mem_tracker import MemTracker

ROWS, POSITIONS, VOCAB = 1, 2048, 152064 // 4


def main() -> None:
    from nemo_ampo import compat

    compat.setup("cpu")
    from megatron.core import parallel_state
    from nemo_aligner.utils.distributed import from_parallel_logits_to_logprobs

    from nemo_ampo.algo.loss import entropy_from_logits
    from nemo_ampo.megatron.vocab_parallel import next_token_logprobs

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tokens = torch.randint(0, VOCAB, (ROWS, POSITIONS))

    def upstream(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = logits.float()  # as Megatron's half-precision wrapper does
        logprobs = from_parallel_logits_to_logprobs(vocab_parallel_logits=wide, target=tokens, higher_stability=True)
        return logprobs, entropy_from_logits(wide[:, :-1])

    mask = torch.ones(ROWS, POSITIONS - 1, dtype=torch.bool)

    def here(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return next_token_logprobs(logits[:, :-1].flatten(0, 1), tokens, mask)

    for name, function in (("upstream", upstream), ("here", here)):
        logits = torch.randn(ROWS, POSITIONS, VOCAB, dtype=torch.bfloat16).requires_grad_()
        tracker = MemTracker()
        tracker.track_external(logits)
        with tracker:
            logprobs, entropy = function(logits)
            (logprobs + 0.001 * entropy).sum().backward()
        (peak,) = [snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values()]
        print(f"{name:10s} {peak / 1e6:8.0f} MB, {peak / logits.nbytes:.1f} times the logits in bf16")


if __name__ == "__main__":
    main()
