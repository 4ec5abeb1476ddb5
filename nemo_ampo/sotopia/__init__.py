"""SOTOPIA: episodes between two characters, their scores, and what the scores are worth.

Who meets whom (:mod:`.scenarios`), what each of them may know (:mod:`.prompts`), how they talk (:mod:`.episode`,
:mod:`.run`), what is kept (:mod:`.records`), the seven dimensions (:mod:`.dimensions`), intervals and tests
(:mod:`.statistics`), reports (:mod:`.summary`, :mod:`.report`, :mod:`.compare`, :mod:`.overview`), others' results
(:mod:`.results`), first RL rows (:mod:`.opening`).

The project ships no copy of the SOTOPIA files; every function takes the folder that holds them.
"""
