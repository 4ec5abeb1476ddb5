"""The embedded world: scenes, gold replies, a judge by rules, and a model small enough to learn them on a laptop.

:mod:`.scenes` draws situations, :mod:`.replies` writes the right reply in each of the four modes, :mod:`.rules` judges
dialogues from their text, :mod:`.pack` writes all of it in the published row formats and :mod:`.tiny_model` makes the
checkpoint that training starts from. Only the last one needs torch and transformers.
"""

DEMO_JUDGE = "demo-judge"
"""The one model that the embedded judge answers for."""
