"""Starting the real stages as a user does, with fewer steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_process import ROOT, Finished, run_nemo

from nemo_ampo.checkpoint.nemo_file import unpack_assets
from nemo_ampo.checkpoint.nemo_writing import add_assets
from nemo_ampo.overrides import override

BC_STEPS, AMPO_STEPS = 240, 4
BC = [
    f"trainer.sft.max_steps={BC_STEPS}",
    f"trainer.sft.val_check_interval={BC_STEPS}",
    f"trainer.sft.save_interval={BC_STEPS}",
]
SMALL_STEPS = [
    *("rollout.prompts_per_step=4", "rollout.group_size=4", "rollout.max_new_tokens=64", "model.global_batch_size=16"),
    *("model.micro_batch_size=8", "model.reinforce.forward_micro_batch_size=8"),
]
"""AMPO steps of a second, where it does not matter what is learned."""
AMPO = [f"trainer.reinforce.max_steps={AMPO_STEPS}", "trainer.reinforce.save_interval=2"]


def run(command: Sequence[str], ranks: int = 1, threads: int = 1) -> Finished:
    """``python -m command``, under torchrun for more than one rank."""
    starter = [sys.executable, "-m"]
    if ranks > 1:
        starter += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.run([*starter, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    return Finished(process.returncode, process.stdout, process.stderr)


def quickstart_command(folder: Path) -> list[str]:
    return ["recipes.quickstart", "--ranks", "1", "--dir", str(folder), "--bc", *BC, "--ampo", *AMPO]


@dataclass(frozen=True)
class Quickstart:
    """The finished run folder and what the first run printed."""

    folder: Path
    finished: Finished

    def ampo(self, run_dir: Path, judge_url: str, *overrides: str, ranks: int = 1) -> Finished:
        """One more AMPO stage from the same cloned policy."""
        command = [
            *("recipes.ampo", "--config-name", "tiny", f"run.dir={run_dir}", f"judge.base_url={judge_url}"),
            *(
                override("run.init_from", self.folder / "bc" / "policy.nemo"),
                override("data.train", self.folder / "world" / "rl_train.jsonl"),
            ),
            *(*AMPO, *overrides),
        ]
        return run_nemo(command, ranks)


ENDS = [0, 2]
"""What ends a reply of the embedded model: ``<|endoftext|>`` and ``<|im_end|>``, its tokenizer's own end."""


def naming_one_end(policy: Path, folder: Path) -> Path:
    """A copy of a ``.nemo`` file whose ``generation_config.json`` lacks the tokenizer's own end, as a base model's does."""
    assets = unpack_assets(policy, folder / "naming-one-end")
    path = assets / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ENDS[0]}))
    copy = Path(shutil.copy(policy, folder / "naming-one-end.nemo"))
    add_assets(copy, assets)
    return copy


def ends_named(policy: Path, folder: Path) -> list[int]:
    """``eos_token_id`` in the ``generation_config.json`` of a ``.nemo`` file."""
    named = json.loads((unpack_assets(policy, folder / "of-the-policy") / "generation_config.json").read_text())
    return sorted(named["eos_token_id"])
