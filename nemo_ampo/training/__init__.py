"""The NeMo side of a stage: model, optimizer and trainers on Megatron, thin subclasses of NeMo-Aligner's. [nemo]

:mod:`~nemo_ampo.training.session` opens a run in Aligner's order, :mod:`~nemo_ampo.training.actor` is the policy,
:mod:`~nemo_ampo.training.trainer` hands both to :func:`nemo_ampo.step.ampo_step`.
"""

STRETCH_ELEMENTS = 1 << 24
"""Logits that the loss computes with at once in fp32, 64 MiB: :mod:`nemo_ampo.training.vocab_parallel`."""
WIDTH_MULTIPLE = 8
"""Widths of training batches are rounded up to this: sequence parallelism and fast kernels need it."""
