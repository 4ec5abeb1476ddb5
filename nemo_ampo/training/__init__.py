"""The NeMo side of a stage: model, optimizer and trainers on Megatron, thin subclasses of NeMo-Aligner's. [nemo]

:mod:`~nemo_ampo.training.session` opens a run in Aligner's order, :mod:`~nemo_ampo.training.actor` is the policy,
:mod:`~nemo_ampo.training.trainer` hands both to :func:`nemo_ampo.step.ampo_step`.
"""
