from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_ampo.commands.cli import make_app
from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.job.plan import Assumptions, checkpoint_bytes, compose_for_plan, lines, make_plan, model_of
from nemo_ampo.rehearse.sizes import MODELS, parameters_of

SMOLLM2 = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def test_bytes_of_a_checkpoint() -> None:
    n = parameters_of(MODELS["tiny"])
    assert checkpoint_bytes(MODELS["tiny"], half=True) == (14 * n, 2 * n)
    assert checkpoint_bytes(MODELS["tiny"], half=False) == (16 * n, 4 * n)


def test_shapes_from_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    for source in (tmp_path, tmp_path / "config.json"):
        assert parameters_of(model_of(source, "anything")) == parameters_of(MODELS["smollm2_135m"])
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2 | {"model_type": "qwen2", "vocab_size": 151_665}))
    shape = model_of(tmp_path, "")
    assert shape.qkv_bias and shape.padded_vocab == 151_680
    with pytest.raises(UserError, match="--model: needed for --config-name mine"):
        model_of(None, "mine")
    with pytest.raises(UserError, match=r"--model .*absent: no such file"):
        model_of(tmp_path / "absent", "")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"--model .*model_type None is not supported"):
        model_of(tmp_path, "")


def test_every_shipped_training_config_has_a_plan() -> None:
    for stage in ("bc", "ampo"):
        for name in ("tiny", "smollm2_135m", "qwen2.5_7b", "llama3.1_8b"):
            ranks = 8 if "b" in name[-2:] else 1
            plan = make_plan(stage, compose_for_plan(stage, name, [], ranks), MODELS[name], ranks)
            assert plan.memory.total > 0 and 0 < plan.step_seconds[1] <= plan.step_seconds[0]
            assert (plan.work.judge_calls > 0) == (stage == "ampo")


def test_what_grows_with_what() -> None:
    shape, name = MODELS["qwen2.5_7b"], "qwen2.5_7b"

    def plan(*overrides: str, ranks: int = 8):  # type: ignore[no-untyped-def]
        return make_plan("ampo", compose_for_plan("ampo", name, list(overrides), ranks), shape, ranks)

    base = plan()
    assert base.work.samples == base.work.judge_calls == 256
    assert plan("rollout.group_size=32", "model.global_batch_size=512").work.samples == 512
    assert plan(ranks=16).memory.optimizer == base.memory.optimizer / 2
    assert plan(ranks=16).memory.weights == base.memory.weights
    assert plan(ranks=16).checkpoint_bytes == base.checkpoint_bytes
    one, three = (plan(f"model.tokens_per_micro_batch={rows * 8192}").memory for rows in (1, 3))
    assert 3 * one.activations == pytest.approx(three.activations)
    # All but the stretch of logits that the loss works on, at most 0.3 GB each time.
    assert 0 < 3 * one.loss - three.loss < 0.6e9
    recompute = [f"model.activations_checkpoint_{key}" for key in ("granularity=full", "method=uniform", "num_layers=1")]
    assert plan(*recompute).memory.activations < base.memory.activations
    native, server = plan("rollout.engine=megatron").memory, plan("rollout.engine=trtllm_server").memory
    inside = plan("rollout.engine=trtllm", "rollout.trtllm.unload_during_training=false").memory
    assert inside.engine > native.engine > server.engine == 0
    assert inside.total == pytest.approx(
        inside.weights + inside.gradients + inside.optimizer + inside.activations + inside.loss + inside.engine
    )
    assert native.total < inside.total
    assert plan("checkpoint.keep_best=3").disk_bytes == base.disk_bytes + 2 * base.weights_only_bytes
    assert plan("algorithm.kl_coef=0").seconds["logprobs"][0] == base.seconds["logprobs"][0] / 2
    slow, fast = base.step_seconds
    assert slow > fast
    cfg = compose_for_plan("ampo", name, [], 8)
    patient = make_plan("ampo", cfg, shape, 8, assume=Assumptions(judge_latency_s=(500, 400)))
    assert patient.step_seconds[1] > 400, "a slow judge is what the step waits for"


def test_a_layout_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        compose_for_plan("ampo", "qwen2.5_7b", [], 6)
    with pytest.raises(ConfigError, match=r"model\.tensor_model_parallel_size: 4 does not divide num_attention_heads=9"):
        make_plan(
            "ampo",
            compose_for_plan("ampo", "smollm2_135m", ["model.tensor_model_parallel_size=4"], 4),
            MODELS["smollm2_135m"],
            4,
        )
    with pytest.raises(ConfigError, match="STAGE: a plan is for bc or ampo"):
        compose_for_plan("evaluate", "tiny", [], 1)
    with pytest.raises(ConfigError, match="--gpu: expected one of h100, h200, a100"):
        make_plan("bc", compose_for_plan("bc", "tiny", [], 1), MODELS["tiny"], 1, gpu="tpu")


@pytest.mark.parametrize(
    "given",
    [
        "model.tensor_model_parallel_size=0",
        "model.tensor_model_parallel_size=null",
        "model.micro_batch_size=0",
        "model.tokens_per_micro_batch=-5",
        "model.global_batch_size=100",
        "algorithm.aggregate_over=micro_batch",
        "rollout.engine=nope",
        "guard.max_wait_s=inf",
        "run.device=tpu",
    ],
)
def test_no_plan_is_made_of_what_the_stage_would_refuse(given: str) -> None:
    with pytest.raises(ConfigError, match=given.partition("=")[0].replace(".", r"\.")):
        compose_for_plan("ampo", "qwen2.5_7b", [given], 8)


def test_the_command_prints_the_plan() -> None:
    result = CliRunner().invoke(make_app(), ["plan", "ampo", "--config-name", "qwen2.5_7b", "--gpus", "8"])
    assert result.exit_code == 0, result.output
    expected = lines(make_plan("ampo", compose_for_plan("ampo", "qwen2.5_7b", [], 8), MODELS["qwen2.5_7b"], 8))
    assert result.output.splitlines() == expected
    assert "7.62 G parameters on 8 x h100 (tensor 4, pipeline 1, data 2)" in expected[0]
    assert any(line.split() == ["optimizer", "11.4", "GB"] for line in expected)


def test_a_plan_that_does_not_leave_a_tenth_of_the_memory_is_exit_status_1() -> None:
    alone = ["model.tensor_model_parallel_size=1", "model.sequence_parallel=false"]
    result = CliRunner().invoke(make_app(), ["plan", "ampo", "--config-name", "qwen2.5_7b", *alone])
    assert result.exit_code == 1 and "DOES NOT FIT in 80 GB, a tenth of which is left free" in result.output
