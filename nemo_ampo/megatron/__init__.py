"""A NeMo model's forward pass: padding, pipeline schedule, log-probabilities over a split vocabulary. [nemo]"""

STRETCH_ELEMENTS = 1 << 24
"""Logits that the loss computes with at once in fp32, 64 MiB: :mod:`nemo_ampo.megatron.vocab_parallel`."""
WIDTH_MULTIPLE = 8
"""Widths of training batches are rounded up to this: sequence parallelism and fast kernels need it."""
