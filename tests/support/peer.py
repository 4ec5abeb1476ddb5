"""The environment with what we did not write: vLLM on a CPU, and the transformers 5 that it brings."""

from __future__ import annotations

import os

import pytest

PYTHON = os.environ.get("PEER_PYTHON", "")
MARKS = [
    pytest.mark.peer,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON, reason="no vLLM: run `make test-peer`, which installs it (3.5 GB)"),
]


def environment() -> dict[str, str]:
    """Of its processes: nothing of this project, no network."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    }  # fmt: skip
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | settings
