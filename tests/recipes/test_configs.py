"""Every shipped YAML parses, and bad input stops before anything is loaded, naming the key."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_ampo.config.check import check_stage
from nemo_ampo.config.compose import CONFIGS, compose
from nemo_ampo.config.reading import read_config
from nemo_ampo.config.stages import STAGES, AmpoConfig, BcConfig, check_ampo, check_bc, check_parallel_layout
from nemo_ampo.errors import ConfigError
from nemo_ampo.sotopia.config import SotopiaConfig

MODELS = ("tiny", "smollm2_135m", "qwen2.5_7b", "llama3.1_8b")
REQUIRED = {
    "bc": ["run.dir=r", "run.init_from=m", "data.train=t", "data.heldout=h"],
    "ampo": ["run.dir=r", "run.init_from=m", "data.train=t", "judge.base_url=http://localhost:1/v1"],
    "evaluate": ["run.dir=r", "run.name=n", "run.checkpoint=c", "data.turns=t", "judge.base_url=http://localhost:1/v1"],
}
PIPELINES = ("tiny", "quickstart", "smollm2", "qwen2.5_7b", "llama3.1_8b")
SOTOPIA = ("self_play", "partner", "vs_base", "api", "reference")
SHIPPED = [(stage, model) for stage in REQUIRED for model in MODELS] + [("sotopia", pairing) for pairing in SOTOPIA]
REQUIRED["sotopia"] = ["run.dir=r", "data.sotopia_dir=s", "judge.base_url=http://localhost:1/v1", "judge.model=j"]
PARTNER = ["partner.base_url=http://localhost:1/v1", "partner.model=p"]
AGENTS = {
    "self_play": ["policy.checkpoint=c"],
    "partner": ["policy.checkpoint=c", *PARTNER],
    "vs_base": ["policy.checkpoint=c"],
    "api": ["policy.base_url=http://localhost:1/v1", "policy.model=p", *PARTNER],
    "reference": ["policy.checkpoint=c"],
}


def test_nothing_is_shipped_untested() -> None:
    shipped = {p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml")}
    pipelines = {f"pipeline/{m}.yaml" for m in PIPELINES}  # tested in test_slurm_recipe.py
    assert shipped == {f"{s}/{m}.yaml" for s, m in SHIPPED} | {f"{s}/base.yaml" for s in STAGES} | pipelines


@pytest.mark.parametrize(("stage", "model"), SHIPPED)
def test_shipped_config_is_complete_and_typed(stage: str, model: str) -> None:
    cfg = compose(stage, model, [*REQUIRED[stage], *AGENTS.get(model, [])])
    read_config(cfg, STAGES[stage].schema)
    OmegaConf.resolve(cfg)


@pytest.mark.parametrize(("stage", "model"), SHIPPED)
def test_model_files_hold_only_differences(stage: str, model: str) -> None:
    base = OmegaConf.to_container(compose(stage, "base", []))
    own = yaml.safe_load((CONFIGS / stage / f"{model}.yaml").read_text())
    own.pop("defaults")

    def repeated(tree: dict[str, object], under: object, path: str = "") -> list[str]:
        out = []
        for key, value in tree.items():
            below = under.get(key) if isinstance(under, dict) else None
            if isinstance(value, dict):
                out += repeated(value, below, f"{path}{key}.")
            elif below == value and isinstance(under, dict) and key in under:
                out.append(f"{path}{key}")
        return out

    assert repeated(own, base) == []


@pytest.mark.parametrize(("stage", "model"), SHIPPED)
def test_small_models_run_on_the_cpu_even_where_a_gpu_is_visible(stage: str, model: str) -> None:
    run = compose(stage, model, []).get("run", {})
    if stage in ("bc", "ampo"):
        assert run.device == ("cpu" if model in ("tiny", "smollm2_135m") else "auto")
        assert compose(stage, model, ["run.device=gpu"]).run.device == "gpu"


@pytest.mark.parametrize("model", ["tiny", "smollm2_135m", "qwen2.5_7b", "llama3.1_8b"])
def test_batch_arithmetic_of_shipped_configs(model: str, tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.touch()
    world = 8 if model.endswith("b") and "smol" not in model and model != "tiny" else 1
    given = ["run.dir=r", f"run.init_from={file}", f"data.train={file}", "judge.base_url=http://localhost:1/v1"]
    cfg = compose("ampo", model, given)
    check_ampo(read_config(cfg, AmpoConfig), cfg, world)


def test_paper_hyper_parameters() -> None:
    for model, lr in (("qwen2.5_7b", 3e-7), ("llama3.1_8b", 2e-7)):
        cfg = compose("ampo", model, REQUIRED["ampo"])
        config = read_config(cfg, AmpoConfig)
        assert cfg.model.optim.lr == lr and "sched" not in cfg.model.optim
        assert (config.rollout.prompts_per_step, config.rollout.group_size) == (16, 16)
        assert cfg.model.global_batch_size == 256
        assert (config.rollout.max_prompt_tokens, config.rollout.max_new_tokens) == (6144, 2048)
        algorithm = config.algorithm
        assert (algorithm.clip_low, algorithm.clip_high, algorithm.kl_coef, algorithm.kl_kind) == (0.2, 0.2, 0.001, "k3")
        assert (algorithm.entropy_coef, algorithm.aggregate, algorithm.advantage) == (0.001, "token_mean", "ampo")
        assert cfg.trainer.reinforce.max_steps == 800 and cfg.trainer.reinforce.gradient_clip_val == 1.0
        bc = compose("bc", model, REQUIRED["bc"])
        assert bc.model.optim.lr == 2e-6 and bc.model.global_batch_size == 32 and bc.trainer.sft.max_epochs == 3
        assert bc.model.optim.sched.warmup_ratio == 0.1 and bc.model.optim.sched.name == "CosineAnnealing"


def test_the_authors_protocol() -> None:
    given = ["run.dir=r", "data.sotopia_dir=s", "judge.base_url=http://localhost:1/v1", "policy.checkpoint=c"]
    config = read_config(compose("sotopia", "reference", given), SotopiaConfig)
    episode, policy, judge = config.episode, config.policy, config.judge
    assert (episode.pairing, episode.view, episode.leave_rule) == ("self_play", "reference", "reference")
    assert (episode.max_turns, episode.max_prompt_tokens) == (20, 6144)
    assert (policy.temperature, policy.top_p, policy.max_tokens, policy.modes) == (0.7, 1.0, 2048, True)
    assert (judge.model, judge.temperatures) == ("gpt-4o-2024-08-06", [0.0, 0.0])


def ampo(tmp_path: Path, *overrides: str) -> None:
    file = tmp_path / "x"
    file.touch()
    given = ["run.dir=r", f"run.init_from={file}", f"data.train={file}", "judge.base_url=http://localhost:1/v1"]
    cfg = compose("ampo", "tiny", [*given, *overrides])
    check_ampo(read_config(cfg, AmpoConfig), cfg, 1)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("+rollout.groupsize=4", "rollout.groupsize"),
        ("rollout.groupsize=4", "rollout.groupsize"),
        ("+rolout.group_size=4", "rolout"),
        ("rollout.group_size=many", "rollout.group_size"),
        ("rollout.group_size=1", "rollout.group_size"),
        ("rollout.temperature=0.7", "rollout.temperature"),
        ("rollout.top_p=0.9", "rollout.top_p: 0.9 draws from a cut-off distribution"),
        ("rollout.top_k=50", "rollout.top_k: 50 draws from a cut-off distribution"),
        ("rollout.top_p=0", "rollout.top_p: must be a number above 0"),
        ("rollout.repetition_penalty=1.1", "rollout.repetition_penalty"),
        ("rollout.engine=vllm", "rollout.engine"),
        ("+rollout.trtllm.engine_folder=x", "rollout.trtllm.engine_folder"),
        ("rollout.engine=trtllm_server", "rollout.trtllm_server.url"),
        ("rollout.probe.max_gap=0", "rollout.probe"),
        ("algorithm.advantage=ppo", "algorithm.advantage"),
        ("algorithm.kl_kind=k4", "algorithm.kl_kind"),
        ("algorithm.aggregate=sum", "algorithm.aggregate"),
        ("run.init_from=/nowhere.nemo", "run.init_from"),
        ("data.train=/nowhere.json", "data.train"),
        ("data.train=null", "data.train"),
        ("judge.base_url=not-a-url", "judge.base_url"),
        ("judge.timeout_s=-1", "judge.timeout_s"),
        ("model.global_batch_size=100", "model.global_batch_size"),
        ("model.micro_batch_size=12", "model.global_batch_size"),
        ("model.tensor_model_parallel_size=2", "model.tensor_model_parallel_size"),
        ("model.reinforce.forward_micro_batch_size=33", "model.reinforce.forward_micro_batch_size"),
        ("trainer.reinforce.max_step=3", "max_step"),
    ],
)
def test_a_bad_key_is_named(tmp_path: Path, override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        ampo(tmp_path, override)


ONE_ROW = ("model.micro_batch_size=1", "model.reinforce.forward_micro_batch_size=1")
BUDGET = ("model.tokens_per_micro_batch=416", "algorithm.aggregate_over=batch", *ONE_ROW)
"""The longest row of the tiny config has 256 + 160 tokens."""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.tokens_per_micro_batch=-1", "model.tokens_per_micro_batch: must be a whole number of at least 0, or null"),
        (
            "model.tokens_per_micro_batch=408",
            "408 does not hold one row of .*max_new_tokens; needs at least 416",
        ),
        ("rollout.max_new_tokens=161", "needs at least 424"),
        (
            "model.micro_batch_size=2",
            "model.micro_batch_size: 2 has no effect with model.tokens_per_micro_batch=416; set it to 1",
        ),
        ("model.reinforce.forward_micro_batch_size=8", "forward_micro_batch_size: 8 has no effect with"),
        ("algorithm.aggregate_over=micro_batch", "would depend on which rows .*; set algorithm.aggregate_over=batch"),
    ],
)
def test_a_token_budget_stands_alone_and_holds_a_row(tmp_path: Path, change: str, words: str) -> None:
    ampo(tmp_path, *BUDGET)
    with pytest.raises(ConfigError, match=words):
        ampo(tmp_path, *BUDGET, change)
    for off in ("0", "null"):
        ampo(tmp_path, *BUDGET, f"model.tokens_per_micro_batch={off}", "algorithm.aggregate_over=micro_batch")


def test_a_token_budget_holds_a_row_of_the_cloning_stage(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.touch()
    given = ["run.dir=r", f"run.init_from={file}", f"data.train={file}", f"data.heldout={file}"]
    given += ["model.micro_batch_size=1", "model.data.validation_ds.micro_batch_size=1"]

    def bc(*overrides: str) -> None:
        cfg = compose("bc", "tiny", [*given, *overrides])
        check_bc(read_config(cfg, BcConfig), cfg, 1)

    bc("model.tokens_per_micro_batch=512")
    with pytest.raises(ConfigError, match=r"504 does not hold one row of data\.max_tokens; needs at least 512"):
        bc("model.tokens_per_micro_batch=504")
    with pytest.raises(ConfigError, match=r"model\.data\.validation_ds\.micro_batch_size: 64 has no effect with"):
        bc("model.tokens_per_micro_batch=512", "model.data.validation_ds.micro_batch_size=64")


def test_filters_can_be_allowed_by_name(tmp_path: Path) -> None:
    ampo(tmp_path, "rollout.top_p=0.9", "rollout.top_k=50", "rollout.allow_unreproducible_sampling=true")


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"run\.init_from: a value is required"):
        read_config(compose("bc", "tiny", ["run.dir=r"]), BcConfig)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "words"),
    [(3, 1, "num_attention_heads=4"), (4, 1, "num_query_groups=2"), (1, 3, "num_layers=4")],
)
def test_layouts_that_do_not_divide(tensor: int, pipeline: int, words: str) -> None:
    model = {"num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 96, "num_layers": 4}
    with pytest.raises(ConfigError, match=words):
        check_parallel_layout(model, tensor, pipeline)


@pytest.mark.parametrize("stage", ["bc", "ampo"])
def test_what_the_model_cannot_do_is_known_before_the_stage(stage: str, tmp_path: Path) -> None:
    model = {"num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 96, "num_layers": 4}
    model |= {"max_position_embeddings": 64, "tokenizer": {}}
    with tarfile.open(tmp_path / "policy.nemo", "w") as tar:
        (tmp_path / "model_config.yaml").write_text(OmegaConf.to_yaml(model))
        tar.add(tmp_path / "model_config.yaml", "./model_config.yaml")
    file = tmp_path / "policy.nemo"
    given = [f"run.dir={tmp_path / 'run'}", f"run.init_from={file}", f"data.train={file}"]
    given += [f"data.heldout={file}"] if stage == "bc" else ["judge.base_url=http://localhost:1/v1"]
    too_much = {"model.tensor_model_parallel_size": ["model.tensor_model_parallel_size=4"]}
    if stage == "ampo":
        too_much["rollout.max_prompt_tokens"] = []
    for key, overrides in too_much.items():
        cfg = compose(stage, "tiny", [*given, *overrides])
        check_stage(stage, cfg, 4, files=False)
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            check_stage(stage, cfg, 4)


@pytest.mark.parametrize(
    ("stage", "config", "missing"), [*((s, "tiny", "run.") for s in STAGES if s != "sotopia"), ("sotopia", "api", "data.")]
)
def test_the_command_line_says_it_in_one_line(stage: str, config: str, missing: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"recipes.{stage}", "--config-name", config, f"run.dir={tmp_path / 'run'}"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent)
    assert process.returncode == 2
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {missing}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["qwen2.5_7b", "llama3.1_8b"])
def test_production_rolls_out_on_tensorrt_llm_and_says_when_there_is_none(model: str, tmp_path: Path) -> None:
    assert compose("ampo", model, REQUIRED["ampo"]).rollout.engine == "trtllm"
    file = tmp_path / "x"
    file.touch()
    given = [f"run.dir={tmp_path / 'run'}", f"run.init_from={file}", f"data.train={file}"]
    command = [sys.executable, "-m", "recipes.ampo", "--config-name", model, *given, "judge.base_url=http://localhost:1/v1"]
    one_process = ["model.tensor_model_parallel_size=1", "model.sequence_parallel=false"]
    process = subprocess.run([*command, *one_process], capture_output=True, text=True, cwd=CONFIGS.parent)
    assert process.returncode == 2
    (line,) = process.stderr.strip().splitlines()
    assert line.startswith("error: rollout.engine: trtllm needs TensorRT-LLM 0.17.x, which is not installed")
    assert not (tmp_path / "run").exists()


def test_unknown_config_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"llama3\.1_8b, qwen2\.5_7b, smollm2_135m, tiny"):
        compose("ampo", "huge", [])
