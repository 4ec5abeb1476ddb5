"""A run folder as one self-contained HTML page, and the same tables for the terminal.

Read :mod:`.inputs` for what is read, :mod:`.charts` for which metric goes where, :mod:`.judge` for the judge's
figures and the alarms, :mod:`.plots` for how it is drawn and :mod:`.html` for the page. Nothing here needs torch or NeMo.
"""

from nemo_ampo.report.training.inputs import Evaluation, Run, parse_evaluation, read_evaluation, read_run
from nemo_ampo.report.training.page import file_problems, write_report
from nemo_ampo.report.training.tables import evaluation_table, training_table

__all__ = [
    "Evaluation",
    "Run",
    "evaluation_table",
    "file_problems",
    "parse_evaluation",
    "read_evaluation",
    "read_run",
    "training_table",
    "write_report",
]
