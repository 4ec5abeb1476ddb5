"""Stand-in for Apex's kernels; see README.md in the folder above."""

from gpu_stand_in.modules import AMP_C, install

install("amp_C", AMP_C)
