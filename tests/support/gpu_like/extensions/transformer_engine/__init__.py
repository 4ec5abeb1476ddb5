"""Stand-in for Transformer Engine; see README.md in the folder above."""

from gpu_stand_in.modules import TRANSFORMER_ENGINE, install

install("transformer_engine", TRANSFORMER_ENGINE)
