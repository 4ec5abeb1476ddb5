"""The tiny pipeline on a GPU node: bf16, O2, distributed optimizer, TP=2 with sequence parallelism, DP=2, gloo ranks."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from nemo_process import CPU_OF_GPU_NODE, GPU_NODE, Finished, convert, run_nemo
from safetensors.torch import load_file

from nemo_ampo.world.judge_server import demo_judge_process
from nemo_ampo.world.pack import make_pack
from nemo_ampo.world.tiny_model import make_tiny_checkpoint

pytestmark = pytest.mark.slow

LAYOUT = [
    *("run.device=gpu", "trainer.precision=bf16", "model.megatron_amp_O2=true", "model.tensor_model_parallel_size=2"),
    *("model.sequence_parallel=true", "model.activations_checkpoint_granularity=selective", "model.global_batch_size=8"),
]
BC = [
    *("trainer.sft.max_steps=2", "trainer.sft.val_check_interval=2", "trainer.sft.save_interval=2"),
    *("data.heldout_replies=4", "data.max_new_tokens=8", "model.tokens_per_micro_batch=1024", "model.micro_batch_size=1"),
    *("model.data.validation_ds.micro_batch_size=1", "model.data.validation_ds.global_batch_size=8"),
]
AMPO = [
    *("rollout.engine=megatron", "rollout.prompts_per_step=2", "rollout.group_size=4", "rollout.max_new_tokens=24"),
    *("model.tokens_per_micro_batch=512", "model.micro_batch_size=1", "model.reinforce.forward_micro_batch_size=1"),
    *("algorithm.aggregate_over=batch", "algorithm.entropy_coef=0.1"),
    *("trainer.reinforce.max_steps=2", "trainer.reinforce.save_interval=1"),
]


@dataclass(frozen=True)
class Node:
    """Folders of one pipeline, and what its stages said."""

    folder: Path
    stages: dict[str, Finished]

    def metrics(self, stage: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    folder = tmp_path_factory.mktemp("pipeline")
    world, hf = folder / "world", folder / "hf"
    make_pack(str(world), 1, 64, 8, 8)
    make_tiny_checkpoint(str(hf), str(world), 1)
    stages: dict[str, Finished] = {}

    def ampo(name: str, url: str) -> None:
        data = (f"data.train={world / 'rl_train.jsonl'}", f"judge.base_url={url}")
        start = (f"run.dir={folder / name}", f"run.init_from={folder / 'bc' / 'policy.nemo'}")
        words = ["recipes.ampo", "--config-name", "tiny", *start, *data, *LAYOUT, *AMPO]
        stages[name] = run_nemo(words, ranks=4, machine=GPU_NODE)

    convert(hf, folder / "base.nemo", machine=CPU_OF_GPU_NODE)
    data = (f"data.train={world / 'bc_train.jsonl'}", f"data.heldout={world / 'bc_heldout.jsonl'}")
    start = (f"run.dir={folder / 'bc'}", f"run.init_from={folder / 'base.nemo'}")
    stages["bc"] = run_nemo(["recipes.bc", "--config-name", "tiny", *start, *data, *LAYOUT, *BC], 2, machine=GPU_NODE)
    with demo_judge_process() as url:
        ampo("ampo", url)
        shutil.copytree(folder / "ampo", folder / "resumed")
        shutil.rmtree(folder / "resumed" / "checkpoints" / "step-000002")
        (folder / "resumed" / "policy.nemo").unlink()
        ampo("resumed", url)
    for name in ("ampo", "resumed"):
        words = ["converters.nemo_to_hf", "--input", folder / name / "policy.nemo", "--output", folder / f"hf_{name}"]
        stages[f"export {name}"] = run_nemo(words, machine=CPU_OF_GPU_NODE)
    return Node(folder, stages)


def test_every_stage_ends_well(node: Node) -> None:
    failed = {name: finished.err[-4000:] for name, finished in node.stages.items() if finished.status}
    assert not failed, next(iter(failed.values()))


def test_the_steps_learn_from_finite_numbers(node: Node) -> None:
    validation = [row for row in node.metrics("bc") if "bc/val_loss" in row]
    assert validation and all(0 < row["bc/val_loss"] < 20 for row in validation)
    steps = [row for row in node.metrics("ampo") if "policy/grad_norm" in row]
    assert len(steps) == 2
    for row in steps:
        assert 0 < row["policy/grad_norm"] < 1e4
        assert row["policy/skipped_updates"] == 0
        assert row["engine/logprob_gap"] < 0.1


def test_memory_and_speed_are_measured_by_phase(node: Node) -> None:
    for stage, phases in (
        ("ampo", ("sync", "rollout", "judge_wait", "logprobs", "reference", "update")),
        ("bc", ("update",)),
    ):
        for row in (row for row in node.metrics(stage) if row["kind"] == "train"):
            assert {name for name in row if name.startswith("memory/")} == {f"memory/{phase}_gb" for phase in phases}
            assert row["memory/update_gb"] > row.get("memory/judge_wait_gb", 0)
            assert row["throughput/tokens_per_s_per_gpu"] > 0
            assert "throughput/update_mfu" not in row, "nobody knows what this card can do"
    assert all("memory/validate_gb" in row for row in node.metrics("bc") if row["kind"] == "val")
    provenance = json.loads((node.folder / "ampo" / "provenance.json").read_text())
    assert provenance["nccl"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1", "as Megatron needs it"


def test_a_resumed_run_is_the_run_that_was_not_stopped(node: Node) -> None:
    assert "continuing from" in node.stages["resumed"].err
    once, again = (load_file(node.folder / f"hf_{name}" / "model.safetensors") for name in ("ampo", "resumed"))
    assert all(torch.equal(once[name], again[name]) for name in once)
    base = load_file(node.folder / "hf" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in once.values())
    assert any(not torch.equal(once[name].float(), base[name].float()) for name in base)
