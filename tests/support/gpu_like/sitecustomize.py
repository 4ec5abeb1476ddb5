"""Python reads this file at its start when the folder is on ``PYTHONPATH``: the machine then looks as if it had GPUs."""

from gpu_stand_in.imports import after_import

after_import()
