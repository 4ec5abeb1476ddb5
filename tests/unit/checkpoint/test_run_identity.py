from __future__ import annotations

from pathlib import Path

import pytest

from nemo_ampo.checkpoint.config import CheckpointConfig
from nemo_ampo.checkpoint.run_identity import check_resume, check_unchanged, identity, inputs, verdict_identity
from nemo_ampo.checkpoint.store import JobLayout, Manifest, Store
from nemo_ampo.config.compose import compose
from nemo_ampo.config.reading import read_config
from nemo_ampo.config.stages import AmpoConfig
from nemo_ampo.errors import ConfigError
from nemo_ampo.prompts import load_prompt

PATHS = ["run.dir=/run", "run.init_from=/m.nemo", "data.train=/rows.jsonl", "judge.base_url=http://localhost:1/v1"]


def settings(*overrides: str, stage: str = "ampo", data: str = "d1") -> dict[str, object]:
    paths = PATHS if stage == "ampo" else [*PATHS[:3], "data.heldout=/held.jsonl"]
    return identity(compose(stage, "tiny", [*paths, *overrides]), {"data": data, "run.init_from": "n1"})


DEFAULTS = identity(compose("ampo", "base", []), {})


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("run.seed=2", "run.seed"),
        ("algorithm.advantage=grpo", "algorithm.advantage"),
        ("rollout.group_size=8", "rollout.group_size"),
        ("reward.strict_format=true", "reward.strict_format"),
        ("judge.model=other", "judge.model"),
        ("model.optim.lr=1", "model.optim.lr"),
        ("model.global_batch_size=64", "model.global_batch_size"),
        ("trainer.reinforce.gradient_clip_val=2", "trainer.gradient_clip_val"),
        ("+model.optim.sched.name=CosineAnnealing", "model.optim.sched.name"),
    ],
)
def test_a_setting_that_decides_the_numbers_is_refused_by_name(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: .*run\.allow_changed=\[{key}"):
        check_unchanged(settings(), settings(override), [], "step-000005", DEFAULTS)
    assert check_unchanged(settings(), settings(override), [key.split(".")[0]], "step-000005", DEFAULTS)


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=/elsewhere",
        "run.verbose=true",
        "rollout.batch_size=7",
        "judge.timeout_s=1",
        "model.tensor_model_parallel_size=2",
        "trainer.reinforce.max_steps=7",
        "checkpoint.keep_last=9",
    ],
)
def test_a_setting_without_influence_on_the_numbers_may_change(override: str) -> None:
    assert check_unchanged(settings(), settings(override), [], "", DEFAULTS) == []


def test_the_number_of_steps_counts_where_a_schedule_is_laid_over_them() -> None:
    old, new = (settings(f"trainer.sft.max_steps={steps}", stage="bc") for steps in (800, 900))
    with pytest.raises(ConfigError, match=r"^trainer\.max_steps: 800 -> 900"):
        check_unchanged(old, new, [], "", DEFAULTS)


def test_other_data_and_another_reference_policy_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data: d1 -> d2"):
        check_unchanged(settings(), settings(data="d2"), [], "", DEFAULTS)
    with pytest.raises(ConfigError, match=r"^run\.init_from: n1 -> n2"):
        check_unchanged(settings(), settings() | {"run.init_from": "n2"}, ["data"], "", DEFAULTS)


def test_every_changed_key_is_named_and_each_must_be_allowed() -> None:
    new = settings("run.seed=2", "algorithm.kl_coef=0.5")
    with pytest.raises(ConfigError, match=r"^algorithm\.kl_coef: 0\.001 -> 0\.5; run\.seed: 1 -> 2: "):
        check_unchanged(settings(), new, [], "", DEFAULTS)
    with pytest.raises(ConfigError, match=r"^run\.seed: 1 -> 2: "):
        check_unchanged(settings(), new, ["algorithm"], "", DEFAULTS)
    assert check_unchanged(settings(), new, ["algorithm", "run.seed"], "", DEFAULTS) == ["algorithm.kl_coef", "run.seed"]


def test_a_key_an_older_version_did_not_know_is_no_change() -> None:
    old = settings()
    del old["reward.strict_format"]
    assert check_unchanged(old, settings(), [], "", DEFAULTS) == []
    with pytest.raises(ConfigError, match=r"^reward\.strict_format: absent -> True"):
        check_unchanged(old, settings("reward.strict_format=true"), [], "", DEFAULTS)


def test_inputs_follow_content_not_place(tmp_path: Path) -> None:
    for name in ("a.nemo", "b.nemo"):
        (tmp_path / name).write_text("weights")
    a, b = str(tmp_path / "a.nemo"), str(tmp_path / "b.nemo")
    assert inputs({"/x": "h"}, a, [(1, 2), (3,)]) == inputs({"/y": "h"}, b, [[1, 2], [3]])
    assert inputs({"/x": "h"}, a, [(1, 2), (3,)]) != inputs({"/x": "h"}, a, [(1,), (2, 3)])
    assert inputs({"/x": "h"}, a, []) != inputs({"/x": "i"}, a, [])
    (tmp_path / "b.nemo").write_text("others")
    assert inputs({"/x": "h"}, a, []) != inputs({"/x": "h"}, b, [])


def test_a_run_folder_is_checked_against_its_newest_checkpoint(tmp_path: Path) -> None:
    check_resume(tmp_path, CheckpointConfig(), settings("run.seed=7"), [], DEFAULTS)
    store = Store(tmp_path / "checkpoints")
    folder = store.begin(5)
    (folder / "optimizer").mkdir()
    files = {"optimizer/x": {"bytes": 0, "sha256": ""}}
    (folder / "optimizer" / "x").touch()
    store.publish(folder, Manifest("ampo", 5, {"step": 5}, JobLayout(1, 1, 1, 1), settings(), None, {}, files))
    check_resume(tmp_path, CheckpointConfig(), settings(), [], DEFAULTS)
    with pytest.raises(ConfigError, match=r"^run\.seed: 1 -> 7: .*step-000005 was written under other settings"):
        check_resume(tmp_path, CheckpointConfig(), settings("run.seed=7"), [], DEFAULTS)


def judged(tmp_path: Path, *overrides: str) -> dict[str, object]:
    raw = compose("ampo", "tiny", [*PATHS, f"run.dir={tmp_path}", *overrides])
    return identity(raw, verdict_identity(read_config(raw, AmpoConfig).judge))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("judge.max_tokens=7", "judge.max_tokens"),
        ("judge.seed=7", "judge.seed"),
        ("judge.temperatures=[0.5]", "judge.temperatures"),
        ("judge.explain_parse_error=false", "judge.explain_parse_error"),
        ("+judge.extra_body.top_p=0.5", "judge.extra_body"),
        ("judge.structured=off", "judge.structured"),
        ("judge.endpoints=[{base_url: 'http://h/v1', model: other}]", "judge.models"),
    ],
)
def test_what_decides_a_verdict_is_refused_by_name(tmp_path: Path, override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: .*run\.allow_changed=\[{key}"):
        check_unchanged(judged(tmp_path), judged(tmp_path, override), [], "step-000005", DEFAULTS)
    assert check_unchanged(judged(tmp_path), judged(tmp_path, override), ["judge"], "", DEFAULTS)


@pytest.mark.parametrize(
    "override",
    [
        *("judge.base_url=http://other:2/v1", "judge.timeout_s=3", "judge.max_concurrency=3", "judge.structured=on"),
        *("judge.endpoints=[{base_url: 'http://h/v1'}]", "judge.connection_retries=9", "judge.max_calls=7"),
    ],
)
def test_where_and_how_patiently_a_judge_is_asked_may_change(tmp_path: Path, override: str) -> None:
    assert check_unchanged(judged(tmp_path), judged(tmp_path, override), [], "", DEFAULTS) == []


def test_of_a_prompt_its_text_counts_and_not_its_name(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    for path in (one, two):
        path.write_text(load_prompt("judge").text)
    old = judged(tmp_path, f"judge.prompt={one}")
    assert check_unchanged(old, judged(tmp_path, f"judge.prompt={two}"), [], "", DEFAULTS) == []
    one.write_text(load_prompt("judge").text + " Be strict.")
    with pytest.raises(ConfigError, match=r"^judge\.prompt\.text: "):
        check_unchanged(old, judged(tmp_path, f"judge.prompt={one}"), [], "", DEFAULTS)
    assert check_unchanged(old, judged(tmp_path, f"judge.prompt={one}"), ["judge.prompt"], "", DEFAULTS) == [
        "judge.prompt.text"
    ]
    # An older version wrote only the name down.
    older = {key: value for key, value in old.items() if key in settings()}
    assert check_unchanged(older, judged(tmp_path, f"judge.prompt={one}"), [], "", DEFAULTS) == []
    with pytest.raises(ConfigError, match=r"^judge\.prompt: "):
        check_unchanged(older, judged(tmp_path, f"judge.prompt={two}"), [], "", DEFAULTS)
