"""Runs as self-contained HTML pages, and the same tables for the terminal: training runs and SOTOPIA runs.

Of a training run, read :mod:`.training.inputs` for what is read, :mod:`.training.charts` for which metric goes where,
:mod:`.training.alarms` for what a reader should see first. Nothing here needs torch or NeMo.
"""
