"""The algorithm can be imported where none of the frameworks is installed, and quickly.

Counted are modules in a fresh interpreter: what is already imported in the test's own process proves nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = {
    "nemo",
    "megatron",
    "nemo_aligner",
    "lightning",
    "pytorch_lightning",
    "tensorrt_llm",
    "transformers",
}
HEAVY = FRAMEWORKS | {"torch", "numpy"}


def top_level_modules_after(*modules: str) -> set[str]:
    code = f"import {', '.join(modules)}, json, sys; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "module",
    [
        "nemo_ampo.errors",
        "nemo_ampo.types",
        "nemo_ampo.reply.modes",
        "nemo_ampo.reply.grammar",
        "nemo_ampo.algo.rewards",
        "nemo_ampo.chat.client",
        "nemo_ampo.judge.job",
        "nemo_ampo.commands.sotopia_report",
        "nemo_ampo.commands.generate",
    ],
)
def test_text_and_judge_parts_need_no_torch(module: str) -> None:
    assert top_level_modules_after(module) & HEAVY == set()


def test_together_they_leave_http_to_the_call_that_needs_it() -> None:
    loaded = top_level_modules_after(
        "nemo_ampo.reply.grammar", "nemo_ampo.algo.rewards", "nemo_ampo.judge.job", "nemo_ampo.types"
    )
    assert loaded & (HEAVY | {"aiohttp", "httpx2", "openai"}) == set()


def test_configuration_and_batch_recipes_need_only_what_reads_yaml_and_types() -> None:
    modules = ("nemo_ampo.config.stages", "nemo_ampo.config.check", "nemo_ampo.config.compose", "recipes.slurm")
    bare = top_level_modules_after("sys", "sysconfig") | {f"_sysconfigdata__{sys.platform}_{os.uname().machine}-linux-gnu"}
    assert top_level_modules_after(*modules) - bare - set(sys.stdlib_module_names) <= {
        *("nemo_ampo", "recipes", "omegaconf", "yaml", "_yaml", "antlr4", "attr", "cython_runtime", "__mp_main__"),
        *(name for name in top_level_modules_after("yaml") if name.startswith("_cython_")),
        *(top_level_modules_after("pydantic") - bare),
    }


def test_the_mathematics_needs_torch_and_no_framework() -> None:
    loaded = top_level_modules_after("nemo_ampo.algo.advantage", "nemo_ampo.algo.loss")
    assert "torch" in loaded
    assert loaded & FRAMEWORKS == set()
