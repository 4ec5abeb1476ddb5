"""The algorithm: advantages of two levels, credit to tokens, the loss, rewards, and what guards a step.

Read :mod:`~nemo_ampo.algo.advantage`, :mod:`~nemo_ampo.algo.mode_level` and :mod:`~nemo_ampo.algo.loss`. Pure functions of
tensors and records; :mod:`nemo_ampo.step` calls them in the paper's order.
"""
