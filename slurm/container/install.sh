#!/usr/bin/env bash
# In a container of NVIDIA's image: lay our pins over it, then ask the doctor, whose findings end this with status 1.
#
# The Dockerfile beside this file runs it, and so does pyxis where there is no Docker; docs/slurm.md has both commands.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# NVIDIA's images hold pip to their own versions by a file that PIP_CONSTRAINT names; what stands in our lock is meant to differ.
PIP_CONSTRAINT='' python -m pip install --no-cache-dir --no-deps -r requirements-container.lock
python -m nemo_ampo.commands.cli doctor
