"""Odd values in every key of every stage: refused in one line that names the key, or of a kind the stage can start with."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from omegaconf import DictConfig, OmegaConf
from tiny_hf import make_config

from converters.model_config import nemo_config
from nemo_ampo.config.compose import CONFIGS, compose
from nemo_ampo.config.nemo_keys import NEMO, SCHEDULES, check_schedule
from nemo_ampo.config.reading import read_config, read_section
from nemo_ampo.config.stages import STAGES, check_device, check_model
from nemo_ampo.errors import ConfigError
from nemo_ampo.model_folder.facts import facts_of

ODD: tuple[Any, ...] = (
    *(float("nan"), float("inf"), float("-inf"), -1, 0, -0.5, 10**400, 2**31, 2**63, 1e300, True),
    *("", " ", "../x", "x" * 5000, "nan", "1e400", "ü新\u0301", "a\0b", "\ud800", "${x}", "\n", "0:0:0:0"),
    *([], {}, [1], {"a": 1}, None),
)
PER_KEY = 6


def composed(stage: str, folder: Path) -> DictConfig:
    file = folder / "config.json"
    file.touch()
    for name in ("agents", "envs", "env_agent_combos", "sotopia_hard"):
        (folder / f"{name}.json").touch()
    url = "http://localhost:1/v1"
    given = {
        "bc": [f"run.init_from={file}", f"data.train={file}", f"data.heldout={file}"],
        "ampo": [f"run.init_from={file}", f"data.train={file}", f"judge.base_url={url}"],
        "evaluate": ["run.name=n", f"run.checkpoint={folder}", f"data.turns={file}", f"judge.base_url={url}"],
        "sotopia": [f"policy.base_url={url}", "policy.model=m", f"judge.base_url={url}", "judge.model=j"],
    }
    more = [f"data.sotopia_dir={folder}"] if stage == "sotopia" else []
    name = "base" if stage == "sotopia" else "tiny"
    return compose(stage, name, [f"run.dir={folder / 'run'}", *given[stage], *more])


def check(stage: str, cfg: DictConfig) -> Any:
    config: Any = read_config(cfg, STAGES[stage].schema)
    check_rules(stage, config, cfg)
    return config


def check_rules(stage: str, config: Any, cfg: DictConfig) -> None:
    STAGES[stage].check(config, cfg, 1)


def keys_of(value: Any, prefix: str = "") -> list[str]:
    if not isinstance(value, dict) or not value:
        return [prefix]
    return [key for name, inner in value.items() for key in keys_of(inner, f"{prefix}.{name}" if prefix else str(name))]


def numbers_without_a_range(section: type[Any], prefix: str) -> list[str]:
    found: list[str] = []
    for name, hint in get_type_hints(section).items():
        field = getattr(section, "__dataclass_fields__", {}).get(name)
        kinds = [hint, *get_args(hint), *(inner for kind in get_args(hint) for inner in get_args(kind))]
        if field is None:
            continue
        if (int in kinds or float in kinds) and "range" not in field.metadata:
            found.append(f"{prefix}.{name}")
        for kind in kinds:
            if hasattr(kind, "__dataclass_fields__"):
                found += numbers_without_a_range(kind, f"{prefix}.{name}")
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_every_number_of_ours_has_a_range_beside_its_default(stage: str) -> None:
    assert numbers_without_a_range(STAGES[stage].schema, stage) == []


@pytest.mark.parametrize("stage", NEMO)
def test_every_key_of_nemos_in_the_base_file_has_a_rule(stage: str) -> None:
    base = OmegaConf.to_container(OmegaConf.load(CONFIGS / stage / "base.yaml"))
    assert isinstance(base, dict)
    keys = [key for key in keys_of(base) if key.partition(".")[0] in ("trainer", "model", "exp_manager")]
    may_be_absent = [key for key in keys if key.startswith("model.optim.sched.")]
    assert sorted(NEMO[stage]) == sorted(set(keys) - set(may_be_absent))


@pytest.mark.parametrize("stage", STAGES)
def test_an_odd_value_is_refused_by_name_or_harmless(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = composed(stage, tmp_path)
    OmegaConf.set_struct(good, False)
    config = check(stage, good)
    wrong: list[str] = []
    draw = random.Random(stage)
    for key in keys_of(OmegaConf.to_container(good, resolve=True)):
        usual = OmegaConf.select(good, key)
        for value in draw.sample(ODD, PER_KEY):
            with changed(good, key, value):
                wrong += [f"{key}={value!a:.40}: {problem}" for problem in problems(stage, config, good, key, value, usual)]
    assert wrong == []
    check(stage, good)


@contextmanager
def changed(cfg: DictConfig, key: str, value: Any) -> Iterator[None]:
    """Another value for a while; to copy the whole config for each takes longer than all checks."""
    above, _, name = key.rpartition(".")
    section: Any = OmegaConf.select(cfg, above) if above else cfg
    before = deepcopy(section._get_node(name))
    OmegaConf.update(cfg, key, value, merge=False)
    try:
        yield
    finally:
        section._content[name] = before


def problems(stage: str, config: Any, cfg: DictConfig, key: str, value: Any, usual: Any) -> list[str]:
    """What is wrong with how the stage takes the value; the sections it is not in are those of the good ``config``."""
    name, section = key.partition(".")[0], get_type_hints(STAGES[stage].schema)
    try:
        if name in section:
            config = replace(config, **{name: read_section(name, section[name], cfg.get(name))})
        check_rules(stage, config, cfg)
    except ConfigError as error:
        text = str(error)
        return [] if names(key, text) else [f"told as {text!a:.200}"]
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    if value in ("\ud800", "a\0b"):
        return ["taken"]
    numeric = isinstance(usual, int | float) and not isinstance(usual, bool)
    absurd = (
        isinstance(value, bool) or (isinstance(value, int | float) and not abs(value) < 2**31) or value in ([], {}, "", " ")
    )
    return ["taken as a number"] if numeric and absurd else []


def names(key: str, message: str) -> bool:
    """The key itself, one it decides together with, or its section stands in the message."""
    last = key.rpartition(".")[2]
    return key in message or last in message or key.rpartition(".")[0] in message


@pytest.mark.parametrize("stage", ["bc", "ampo"])
def test_what_a_recipe_asks_of_its_checkpoint(stage: str, tmp_path: Path) -> None:
    model = nemo_config(facts_of(json.loads(make_config("llama", tied=True).to_json_string(use_diff=False))), tmp_path)
    # A checkpoint of two layers and 2,048 positions.
    recomputed = {"activations_checkpoint_granularity": "full", "activations_checkpoint_method": "uniform"}
    for changes, message in (
        (recomputed | {"activations_checkpoint_num_layers": 2}, None),
        (recomputed | {"activations_checkpoint_num_layers": 3}, r"num_layers: 3 does not divide the 2 layers"),
    ):
        cfg = composed(stage, tmp_path)
        OmegaConf.set_struct(cfg, False)
        cfg.model = OmegaConf.merge(cfg.model, changes)
        config = check(stage, cfg)
        with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
            check_model(config, cfg, model)


@pytest.mark.parametrize("stage", ["bc", "ampo"])
def test_what_a_cpu_does_not_do_is_refused(stage: str, tmp_path: Path) -> None:
    cfg = composed(stage, tmp_path)
    for precision in ("bf16", "bf16-mixed"):
        cfg.trainer.precision = precision
        with pytest.raises(ConfigError, match=r"trainer\.precision: on a CPU, .* model\.megatron_amp_O2=true"):
            check(stage, cfg)
        with changed(cfg, "run.device", "auto"):
            check(stage, cfg)
            with pytest.raises(ConfigError, match=r"trainer\.precision: on a CPU"):
                check_device(cfg, "cpu")
        with changed(cfg, "model.megatron_amp_O2", True):
            check(stage, cfg)
    cfg.trainer.precision = 32
    cfg.model.update({"sequence_parallel": True, "tensor_model_parallel_size": 1})
    with pytest.raises(ConfigError, match=r"model\.sequence_parallel: needs Transformer Engine"):
        check_device(cfg, "cpu")
    check_device(cfg, "auto")


@pytest.mark.parametrize(
    ("stage", "key", "value", "message"),
    [
        *(
            (stage, "judge.replay", "absent", r"judge\.replay: no such file: absent")
            for stage in ("ampo", "evaluate", "sotopia")
        ),
        *((stage, "judge.cache", ".", r"judge\.cache: \. is a folder") for stage in ("ampo", "evaluate", "sotopia")),
        *((stage, "judge.prompt", "teacher", r"prompt teacher: placeholder") for stage in ("ampo", "evaluate", "sotopia")),
        ("ampo", "judge.ca_file", "absent", r"judge\.ca_file: no such file"),
        ("sotopia", "policy.replay", "absent", r"policy\.replay: no such file"),
        (
            "ampo",
            "judge.second",
            {"base_url": "http://x:1", "model": "m", "prompt": "teacher"},
            r"prompt teacher: placeholder",
        ),
        ("ampo", "rollout.trtllm_server.url", "http://x:1, y:2", r"rollout\.trtllm_server\.url: must be URLs"),
        ("ampo", "rollout.trtllm.engine_dir", "", r"rollout\.trtllm\.engine_dir: must not be empty"),
        ("ampo", "model.optim.overlap_param_sync", True, r"overlap_param_sync: needs model\.optim\.overlap_grad_sync=true"),
        ("bc", "checkpoint.dir", "", r"checkpoint\.dir: must not be empty; null stands for none"),
        ("evaluate", "data.system_prompt", "", r"data\.system_prompt: must not be empty"),
        ("sotopia", "serve.max_batch", 8, r"serve: nothing is served here without policy\.checkpoint"),
        ("sotopia", "episode.prompts", "", r"episode\.prompts: must not be empty"),
    ],
)
def test_what_a_stage_would_stumble_over_later_is_refused(
    stage: str, key: str, value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = composed(stage, tmp_path)
    OmegaConf.set_struct(cfg, False)
    check(stage, cfg)
    OmegaConf.update(cfg, key, value)
    with pytest.raises(ConfigError, match=message):
        check(stage, cfg)


@pytest.mark.parametrize("stage", ["bc", "ampo"])
def test_what_nemo_would_never_read_is_refused(stage: str, tmp_path: Path) -> None:
    good = composed(stage, tmp_path)
    for key, value in {
        "trainer.devices": 8,
        "trainer.accelerator": "gpu",
        "trainer.max_steps": 5,
        "trainer.gradient_clip_val": 3.0,
        "trainer.precision": "bf16-true",
        "trainer.max_time": "00:01:00:00",
        "exp_manager.explicit_log_dir": "elsewhere",
        "exp_manager.name": "../x",
        "exp_manager.max_time_per_run": "1:00:00",
        "model.sequence_parallel": True,
        "model.megatron_amp_O2": True,
        "model.seed": 7,
        "model.peft.peft_scheme": "lora",
        "model.optim.name": "adam",
        "model.optim.betas": [0.9, 1.0],
        "model.activations_checkpoint_granularity": "full",
        "model.activations_checkpoint_num_layers": 1,
    }.items():
        with changed(good, key, value), pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            check(stage, good)


@pytest.mark.parametrize(
    ("every", "save", "limit", "fits"),
    [
        *((50, 2, 1.0, False), (2, 4, 1.0, True), (0, 3, 1.0, True), (100, 0, 1.0, True)),
        *((0.5, 5, 1.0, True), (0.5, 4, 1.0, False), (0.05, 4, 1.0, False), (0.5, 5, 0.01, False), (3, 4, 2, False)),
    ],
)
def test_what_is_saved_must_have_been_validated(every: float, save: int, limit: float, fits: bool, tmp_path: Path) -> None:
    from nemo_ampo.config.stages import check_steps

    cfg = composed("bc", tmp_path)
    cfg.trainer.sft.update({"val_check_interval": every, "save_interval": save, "limit_train_batches": limit})
    if fits:
        check("bc", cfg)
        check_steps(cfg, 10)
        return
    with pytest.raises(ConfigError, match=r"trainer\.sft\.(save_interval|val_check_interval|limit_train_batches)"):
        check("bc", cfg)
        check_steps(cfg, 10)


@pytest.mark.parametrize(
    "sched",
    [
        {"name": "Cosine"},
        {"warmup_ratio": 0.1},
        {"name": "CosineAnnealing", "warmup_steps": 3, "warmup_ratio": 0.1},
        {"name": "CosineAnnealing", "constant_steps": 0, "constant_ratio": 0.1},
        {"name": "CosineAnnealing", "min_lr": 1.0},
        {"name": "CosineAnnealing", "constant_steps": 10},
        {"name": "WarmupPolicy", "constant_steps": 0},
        {"name": "NoamAnnealing", "warmup_steps": 1},
        {"name": "PolynomialHoldDecayAnnealing", "hold_ratio": 0.5, "warmup_ratio": 0.5},
        {"name": "CosineAnnealing", "constant_steps": 1, "min_lr": 2e-4},
        {"name": "CosineAnnealing", "max_steps": 5},
    ],
)
def test_a_schedule_that_nemo_would_not_make_is_refused(sched: dict[str, Any], tmp_path: Path) -> None:
    cfg = composed("ampo", tmp_path)
    OmegaConf.update(cfg, "model.optim.sched", sched, force_add=True)
    cfg.trainer.reinforce.max_steps = 10
    with pytest.raises(ConfigError, match=r"model\.optim\.sched"):
        check("ampo", cfg)
    check_schedule({"lr": 1.0, "sched": {"name": next(iter(SCHEDULES)), "warmup_ratio": 0.1}}, 10)
