"""Stand-in for TensorRT; see README.md in the folder above."""

from stand_in.modules import install

install("tensorrt", {"": {"DataType": 0, "TensorLocation": 0, "Logger": 0, "Weights": 0, "Refitter": 0}})
