"""Numbers that make no sense and keys that NeMo would overlook stop a stage before it divides by them or loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.model_config import ARCHITECTURE_KEYS
from nemo_ampo.config.compose import CONFIGS, compose
from nemo_ampo.config.nemo_keys import GPU_FUSIONS
from nemo_ampo.config.reading import read_config
from nemo_ampo.config.stages import STAGES
from nemo_ampo.errors import ConfigError


def check(stage: str, folder: Path, *overrides: str) -> None:
    file = folder / "config.json"
    file.touch()
    given = {
        "bc": ["run.dir=r", f"run.init_from={file}", f"data.train={file}", f"data.heldout={file}"],
        "ampo": ["run.dir=r", f"run.init_from={file}", f"data.train={file}", "judge.base_url=http://localhost:1/v1"],
        "evaluate": [
            *("run.dir=r", "run.name=n", f"run.checkpoint={folder}", f"data.turns={file}"),
            "judge.base_url=http://localhost:1/v1",
        ],
    }
    cfg = compose(stage, "tiny", [*given[stage], *overrides])
    keys = STAGES[stage]
    keys.check(read_config(cfg, keys.schema), cfg, 1)


@pytest.mark.parametrize("stage", ["bc", "ampo", "evaluate"])
def test_the_shipped_values_are_within_the_ranges(stage: str, tmp_path: Path) -> None:
    check(stage, tmp_path)


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        *(("ampo", f"model.{key}={value}") for key in ("micro_batch_size", "global_batch_size") for value in (0, "abc", -1)),
        *(("bc", f"model.{key}=0") for key in ("micro_batch_size", "global_batch_size", "tensor_model_parallel_size")),
        ("ampo", "model.pipeline_model_parallel_size=0"),
        ("ampo", "model.reinforce.forward_micro_batch_size=0"),
        ("ampo", "rollout.prompts_per_step=0"),
        ("ampo", "rollout.prompts_per_step=-8"),
        ("ampo", "rollout.batch_size=0"),
        ("ampo", "rollout.max_new_tokens=0"),
        ("ampo", "rollout.max_prompt_tokens=0"),
        *(("ampo", f"trainer.reinforce.max_steps={value}") for value in ("null", 0, -5, 2.5)),
        ("ampo", "trainer.reinforce.save_interval=-1"),
        *(("ampo", f"trainer.reinforce.gradient_clip_val={value}") for value in ("null", 0, "nan")),
        *(("ampo", f"model.optim.lr={value}") for value in ("abc", "nan", -1, "true")),
        ("ampo", "run.device=tpu"),
        ("ampo", "run.log_rollouts=-2"),
        *(("ampo", f"algorithm.{key}={value}") for key in ("entropy_coef", "kl_coef") for value in ("nan", "inf", -1)),
        *(("ampo", f"+judge.extra_body.penalty={value}") for value in ("nan", "inf")),
        ("bc", "data.max_tokens=0"),
        ("bc", "data.heldout_replies=-1"),
        ("bc", "model.tensor_model_parallel_size=3"),
        ("bc", "model.micro_batch_size=7"),
        ("evaluate", "generate.temperature=nan"),
        ("evaluate", "generate.batch_size=0"),
        ("evaluate", "generate.max_new_tokens=0"),
        ("evaluate", "data.limit=-5"),
        ("evaluate", "data.samples=0"),
        ("evaluate", "generate.mode_bias={7: 1}"),
    ],
)
def test_a_value_outside_is_one_line_that_names_the_key(stage: str, override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].strip("+").replace(".", r"\.")) as caught:
        check(stage, tmp_path, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.kl=off", "algorithm.kl_coef=0", "algorithm.kl_kind=k1"],
        ["algorithm.kl_coef=0", "algorithm.kl_kind=k1"],
        ["algorithm.judge_failure=zero", "guard.min_valid=4"],
    ],
)
def test_a_key_without_effect_beside_the_others_is_refused(overrides: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no effect"):
        check("ampo", tmp_path, *overrides)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("lr:", "learning_rate:", r"model\.optim\.learning_rate: no such key; it has name, lr"),
        (
            "save_interval:",
            "save_intervall:",
            r"trainer\.reinforce\.save_intervall: no such key; did you mean save_int",
        ),
    ],
)
def test_a_misspelt_key_of_nemo_in_a_file_is_refused(tmp_path: Path, before: str, after: str, message: str) -> None:
    text = (CONFIGS / "ampo" / "tiny.yaml").read_text(encoding="utf-8")
    assert before in text
    (tmp_path / "base.yaml").write_text((CONFIGS / "ampo" / "base.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.replace(before, after), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        compose("ampo", "mine", [], tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data.trian=x", "data.trian: no such key; did you mean train?"),
        ("dta.train=x", "dta: no such key; did you mean data?"),
        ("data.train.x=1", "data.train.x: no such key; data.train holds none"),
        ("xyz=red", "xyz: no such key; it has "),
        ("judge.extra_body.top_p=1", "judge.extra_body.top_p: nothing is there yet; +judge.extra_body.top_p=... adds it"),
        ("judge.price={m: {input_per_million: 1}}", "judge.price: +judge.price.NAME=... adds to it"),
    ],
)
def test_a_misspelt_key_of_the_command_line_is_refused(given: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("ampo", "tiny", [given])
    assert str(caught.value).startswith(message)


def test_only_a_key_that_something_reads_can_be_added() -> None:
    assert compose("ampo", "tiny", ["+model.optim.sched.name=CosineAnnealing"]).model.optim.sched.name == "CosineAnnealing"
    assert compose("ampo", "tiny", ["+trainer.deterministic=true"]).trainer.deterministic is True
    for key in ("model.optim.amsgrad", "trainer.strategy", "trainer.reinforce.foo", "exp_manager.create_mlflow_logger"):
        with pytest.raises(ConfigError, match=f"{key}: no such key"):
            compose("ampo", "tiny", [f"+{key}=true"])


@pytest.mark.parametrize("stage", ["bc", "ampo"])
@pytest.mark.parametrize("key", [*ARCHITECTURE_KEYS, "max_position_embeddings", "hidden_dropout"])
def test_what_the_model_is_its_checkpoint_says(stage: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.{key}: no such key; .*; what the model is, its checkpoint says"):
        compose(stage, "tiny", [f"+model.{key}=1"])


@pytest.mark.parametrize("stage", ["bc", "ampo"])
def test_a_fusion_for_gpus_is_refused_on_a_cpu(stage: str, tmp_path: Path) -> None:
    for key in GPU_FUSIONS:
        check(stage, tmp_path, f"+model.{key}=true", "run.device=auto")
        with pytest.raises(ConfigError, match=rf"^model\.{key}: needs extensions compiled for a GPU"):
            check(stage, tmp_path, f"+model.{key}=true")


def test_a_key_of_a_list_is_named_with_its_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^judge"):
        check("ampo", tmp_path, "judge.endpoints=[{url: x}]")
