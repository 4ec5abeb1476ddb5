"""What is kept of a policy and of a run.

A *policy* is a ``.nemo`` file with its Hugging Face folder inside (:mod:`~nemo_ampo.checkpoint.nemo_file`). A *training
checkpoint* is a folder with the run's whole state (:mod:`~nemo_ampo.checkpoint.saving` [nemo]), published complete or not
at all (:mod:`~nemo_ampo.checkpoint.store`).
"""
