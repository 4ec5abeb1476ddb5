"""Hugging Face <-> NeMo checkpoints: one mapping table per model family, used in both directions.

``hf_to_nemo``, ``nemo_to_hf`` and ``verify`` are the commands; :mod:`converters.llama` and
:mod:`converters.qwen2` hold the tables and :mod:`converters.mapping` the operations they are made of.
"""
