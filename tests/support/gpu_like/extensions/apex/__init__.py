"""Stand-in for Apex; see README.md in the folder above."""

from gpu_stand_in.modules import APEX, install

install("apex", APEX)
