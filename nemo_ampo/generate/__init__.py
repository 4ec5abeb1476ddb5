"""Training rows from scenarios: a teacher model plays the dialogues, a judge says how they stand.

Read :mod:`.situations` for where dialogues start, :mod:`.teacher` for how a reply is asked for and refused,
:mod:`.rows` for what becomes a row, :mod:`.job` for the whole run, :mod:`.overlap` for what keeps test scenarios
out.
"""
