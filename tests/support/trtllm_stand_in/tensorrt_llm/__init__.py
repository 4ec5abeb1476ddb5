"""Stand-in for TensorRT-LLM; see README.md in the folder above."""

from stand_in.modules import TENSORRT_LLM, install

install("tensorrt_llm", TENSORRT_LLM)
