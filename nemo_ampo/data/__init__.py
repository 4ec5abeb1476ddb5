"""Training data: RL rows (:mod:`.episodes`), cloning rows (:mod:`.bc`), prompts as tokens (:mod:`.chat`),
batches (:mod:`.collate`).

Files are read strictly: the first row that breaks a rule stops the program with file, row and field named,
and no row is ever left out without being asked for.
"""
