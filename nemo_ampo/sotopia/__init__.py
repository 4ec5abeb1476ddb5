"""SOTOPIA: episodes between two characters, their scores, and what the scores are worth.

Who meets whom (:mod:`.pairings`), all of it planned (:mod:`.plan`) and played (:mod:`.run`), what is kept
(:mod:`.records`), the seven dimensions (:mod:`.dimensions`), intervals and tests (:mod:`.statistics`), the whole run in
numbers (:mod:`.summary`), others' results (:mod:`.results`). Pages are in :mod:`nemo_ampo.report.sotopia`.

The project ships no copy of the SOTOPIA files; every function takes the folder that holds them.
"""
