"""A stage carried out without its machine: real model, loss and collectives, tensors that have shapes and no values.

:mod:`~nemo_ampo.rehearse.world` makes one process look like one rank of the job, :mod:`~nemo_ampo.rehearse.collectives`
writes down what it asks of the others, :mod:`~nemo_ampo.rehearse.ledger` counts its memory,
:mod:`~nemo_ampo.rehearse.sizes` is the arithmetic of the same without executing anything. docs/rehearse.md explains what is
proved by it and what is not.
"""
