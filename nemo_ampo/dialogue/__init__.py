"""Dialogues between two characters.

The scenarios (:mod:`.scenarios`), what each character may know (:mod:`.prompts`), who speaks (:mod:`.agents`), when it is
over (:mod:`.episode`), what is kept (:mod:`.records`), and opening turns as RL rows (:mod:`.opening`).
"""
