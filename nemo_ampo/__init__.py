"""nemo-ampo: teach a language model when to think, with NeMo-Aligner.

Start reading at :mod:`nemo_ampo.step` (one AMPO step), then :mod:`nemo_ampo.advantage` (the paper's idea).
"""

__version__ = "0.1.0"
