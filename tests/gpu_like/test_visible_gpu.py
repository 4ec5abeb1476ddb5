"""A laptop with a GPU and none of its stack: the tiny recipes run on the CPU, as they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from nemo_process import GPU_VISIBLE, convert, run_nemo

from nemo_ampo.world.pack import make_pack
from nemo_ampo.world.tiny_model import make_tiny_checkpoint

pytestmark = pytest.mark.slow


def test_the_tiny_recipe_does_not_take_a_gpu_that_nobody_asked_for(tmp_path: Path) -> None:
    world, hf = tmp_path / "world", tmp_path / "hf"
    make_pack(str(world), 1, 64, 8, 8)
    make_tiny_checkpoint(str(hf), str(world), 1)
    base = convert(hf, tmp_path / "base.nemo", machine=GPU_VISIBLE)
    data = (f"data.train={world / 'bc_train.jsonl'}", f"data.heldout={world / 'bc_heldout.jsonl'}")
    words = ["recipes.bc", "--config-name", "tiny", f"run.dir={tmp_path / 'bc'}", f"run.init_from={base}", *data]
    steps = ("trainer.sft.max_steps=1", "trainer.sft.val_check_interval=1", "trainer.sft.save_interval=1")
    few = ("data.heldout_replies=2", "data.max_new_tokens=4")
    finished = run_nemo([*words, *steps, *few], machine=GPU_VISIBLE)
    assert finished.status == 0, finished.err[-4000:]
    assert (tmp_path / "bc" / "policy.nemo").exists()
    refused = run_nemo([*words, f"run.dir={tmp_path / 'other'}", "run.device=gpu"], machine=GPU_VISIBLE)
    assert refused.status and "already set up for cpu, not gpu" in refused.err, "the machine does show a GPU"
