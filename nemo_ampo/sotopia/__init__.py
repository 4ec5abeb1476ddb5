"""SOTOPIA: who meets whom (:mod:`.scenarios`), what each of them may know (:mod:`.prompts`), first RL rows
(:mod:`.opening`).

The project ships no copy of the SOTOPIA files; every function takes the folder that holds them.
"""
