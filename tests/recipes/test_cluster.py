"""A site and a job become command lines; what a site says wrongly is named by its variable."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_ampo.config.compose import CONFIGS
from nemo_ampo.errors import ConfigError
from recipes.batch_recipe import PipelineConfig, read_recipe
from recipes.cluster import Cluster, Job, Site
from recipes.slurm import BatchJob, groups_of, prepare, servers_of

ROOT = Path("/project")
JOB = Job(number=7, restart=2, nodes=2, hosts=("10.0.0.1",))
TINY = CONFIGS / "pipeline" / "tiny.yaml"


def site(**variables: str) -> Site:
    return Site.of(ROOT, variables)


def words(line: list[str], *options: str) -> dict[str, str]:
    """Values of a line's options."""
    found = dict(word.split("=", 1) for word in line if word.startswith("--") and "=" in word)
    return {option: found[f"--{option}"] for option in options}


def test_an_empty_environment_is_one_node_of_cpus() -> None:
    assert site() == Site(ROOT, ranks_per_node=1) == site(AMPO_GPUS_PER_NODE="", AMPO_CONTAINER="")


def test_a_node_has_a_rank_for_each_gpu_unless_somebody_says_otherwise() -> None:
    assert site(AMPO_GPUS_PER_NODE="8").ranks_per_node == 8
    assert site(AMPO_GPUS_PER_NODE="8", AMPO_RANKS_PER_NODE="2").ranks_per_node == 2


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"AMPO_NODES": "two"}, "AMPO_NODES: expected a whole number of at least 0, got 'two'"),
        ({"AMPO_PORT": "-1"}, "AMPO_PORT: expected a whole number"),
        ({"AMPO_NODES": "1.5"}, "AMPO_NODES: "),
        ({"ROLLOUT_GPUS": "all"}, "ROLLOUT_GPUS: "),
        ({"AMPO_MIN_FREE_GB": "nan"}, "AMPO_MIN_FREE_GB: expected a number of at least 0, got 'nan'"),
        ({"AMPO_NODES": "0"}, "AMPO_NODES: expected a whole number of at least 1, got 0"),
        ({"AMPO_PORT": "65530"}, "AMPO_PORT: 16 ports from here on"),
        (
            {"AMPO_GPUS_PER_NODE": "8", "AMPO_RANKS_PER_NODE": "16"},
            "AMPO_RANKS_PER_NODE: 16 processes would share the 8 GPUs",
        ),
        ({"AMPO_CONTAINER": "docker"}, "AMPO_CONTAINER: expected none, pyxis, apptainer, got 'docker'"),
    ],
)
def test_a_site_that_cannot_be_names_the_variable(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        site(**variables)
    assert said in str(caught.value)


def test_the_disk_asked_for_is_the_recipe_s_unless_the_site_names_one_even_none() -> None:
    def asked(**variables: str) -> str:
        line = Cluster(site(**variables), JOB, Path("/logs")).preflight(Path("/run"), 12.0, "http://judge/v1")
        return line[line.index("--run-gb") + 1]

    assert (asked(), asked(AMPO_MIN_FREE_GB="0.5"), asked(AMPO_MIN_FREE_GB="0")) == ("12", "0.5", "0")


PYXIS = {"AMPO_CONTAINER": "pyxis", "AMPO_IMAGE": "/i.sqsh"}
OWN = {"AMPO_JUDGE_IMAGE": "/j.sqsh", "AMPO_JUDGE_COMMAND": "serve"}


@pytest.mark.parametrize(
    ("variables", "judge_group", "expected"),
    [
        ({}, 1, []),
        (PYXIS, None, [("/i.sqsh", "ampo-7", "2")]),
        (PYXIS, 1, [("/i.sqsh", "ampo-7", "2"), ("/i.sqsh", "ampo-7", "1")]),
        (PYXIS, 0, [("/i.sqsh", "ampo-7", "2")]),
        (PYXIS | OWN, 1, [("/i.sqsh", "ampo-7", "2"), ("/j.sqsh", "ampo-7-judge", "1")]),
        (PYXIS | OWN, 0, [("/i.sqsh", "ampo-7", "2"), ("/j.sqsh", "ampo-7-judge", "1")]),
    ],
)
def test_every_image_is_made_once_where_it_runs(
    variables: dict[str, str], judge_group: int | None, expected: list[tuple[str, str, str]]
) -> None:
    images = Cluster(site(**variables), JOB, Path("/logs")).images(judge_group)
    made = [words(image.make, "container-image", "container-name", "nodes") for image in images]
    assert [tuple(values.values()) for values in made] == expected
    assert [image.remove[-1] for image in images] == [f"pyxis_{name}" for _, name, _ in expected]
    assert not any("--container-image" in word for image in images for word in image.remove)


def test_a_judge_s_own_job_has_nothing_but_its_image() -> None:
    [image] = Cluster(site(**PYXIS, **OWN), JOB, Path("/logs")).images(0, trainer=False)
    assert image.name == "/j.sqsh"


def test_a_judge_without_a_group_of_its_own_runs_beside_the_trainer_if_it_takes_no_gpu() -> None:
    assert groups_of(["judge"], 2, "ampo.sh", site()) == {"judge": 1}
    assert groups_of(["judge"], 1, "ampo.sh", site()) == {"judge": 0}
    assert groups_of(["judge", "rollout"], 2, "ampo.sh", site()) == {"judge": 0, "rollout": 1}
    assert groups_of([], 1, "ampo.sh", site()) == {}
    refused = [(["judge"], {"AMPO_JUDGE_GPUS": "1"}), (["rollout"], {}), (["judge", "rollout"], {})]
    for servers, variables in refused:
        with pytest.raises(ConfigError, match=f"no group for each of: {' '.join(servers)}; submit with slurm/ampo.sh"):
            groups_of(servers, 1, "ampo.sh", site(**variables))


def tiny(*overrides: str) -> PipelineConfig:
    return read_recipe(TINY, ["run_dir=/runs/it's $HOME", *overrides])


def started(script: str, recipe: PipelineConfig, given: Site | None = None) -> BatchJob:
    hosts = tuple(f"10.0.0.{i}" for i in range(1, 2 + len(servers_of(script, recipe))))
    return prepare(script, recipe, given or site(), Job(7, 2, 2, hosts), record=False)


@pytest.mark.parametrize(
    ("script", "first", "last", "judged"),
    [
        ("ampo.sh", "world", "evaluate-ampo", True),
        ("bc.sh", "world", "bc", True),
        ("evaluate.sh", "export-bc", "evaluate-ampo", True),
    ],
)
def test_each_script_has_its_part(script: str, first: str, last: str, judged: bool) -> None:
    batch = started(script, tiny())
    assert (batch.stages[0].name, batch.stages[-1].name, batch.judge is not None) == (first, last, judged)
    assert batch.rollout is None and batch.logs == Path("/runs/it's $HOME/logs/7-2")


def test_a_judge_alone_starts_nothing_else() -> None:
    batch = prepare("judge.sh", tiny(), site().judge_alone, JOB, record=False)
    assert batch.judge is not None and batch.judge.url == f"http://10.0.0.1:{batch.port + 15}/v1"
    assert not batch.stages and not batch.preflight and not batch.images


def test_servers_are_where_their_groups_are_and_the_trainer_is_told() -> None:
    batch = started("ampo.sh", tiny("ampo.rollout.engine=trtllm_server", "judge.port=99"))
    assert batch.judge is not None and batch.judge.url == "http://10.0.0.2:99/v1"
    assert batch.rollout is not None and batch.rollout.url == f"http://10.0.0.3:{batch.port + 14}"
    ampo = next(stage for stage in batch.stages if stage.name == "ampo")
    assert {"judge.base_url=http://10.0.0.2:99/v1", f"rollout.trtllm_server.url={batch.rollout.url}"} <= set(ampo.line)


def test_the_embedded_judge_is_not_started_for_another_model() -> None:
    with pytest.raises(ConfigError, match=r"judge\.model: without AMPO_JUDGE_COMMAND the demo judge runs, which is not gpt"):
        started("ampo.sh", tiny("judge.model=gpt"))
    with pytest.raises(ConfigError, match=r"judge\.model: without AMPO_JUDGE_COMMAND"):
        prepare("judge.sh", tiny("judge.model=gpt"), site().judge_alone, JOB, record=False)
    assert started("ampo.sh", tiny("judge.model=gpt"), site(AMPO_JUDGE_COMMAND="serve gpt")).judge is not None


def test_a_layout_for_gpus_is_not_submitted_to_nodes_without_any() -> None:
    both = [
        f"{stage}.{key}"
        for stage in ("bc", "ampo")
        for key in ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true", "run.device=auto")
    ]
    with pytest.raises(ConfigError, match=r"stage bc: model\.sequence_parallel: .*; or is AMPO_GPUS_PER_NODE missing\?"):
        started("ampo.sh", tiny(*both))


def test_options_of_sbatch_keep_their_quotes() -> None:
    line = site(AMPO_SBATCH='--comment="a b" --exclude=n[1-2]').sbatch_line("ampo.sh", "r.yaml", [], [])
    assert line[1:3] == ["--comment=a b", "--exclude=n[1-2]"]


def test_the_shell_gets_every_word_as_it_was(tmp_path: Path) -> None:
    """Folders that a shell would take apart, through ``eval`` of both kinds of assignment."""
    batch = started("ampo.sh", tiny(), site(**PYXIS, AMPO_MOUNTS="/a b:/c,/runs"))
    script = tmp_path / "facts"
    script.write_text(batch.for_shell)

    def said(command: str) -> list[str]:
        text = f'set -u; eval "$(<{script})"; {command}'
        return subprocess.run(["bash", "-c", text], capture_output=True, check=True, text=True).stdout.split("\0")[:-1]

    shown: Callable[[str], list[str]] = lambda name: said(f'printf "%s\\0" "${{{name}[@]}}"')  # noqa: E731
    assert shown("RUN") == ["/runs/it's $HOME"] and shown("PREFLIGHT") == batch.preflight
    assert shown("STAGES") == [stage.name for stage in batch.stages]
    assert shown("OUTPUTS") == [str(stage.output) for stage in batch.stages]
    assert batch.judge is not None and shown("JUDGE") == batch.judge.line
    for number, stage in enumerate(batch.stages):
        assert said(f'eval "LINE=(${{LINES[{number}]}})"; printf "%s\\0" "${{LINE[@]}}"') == stage.line
    assert said('eval "LINE=(${MAKE_IMAGES[0]})"; printf "%s\\0" "${LINE[@]}"') == batch.images[0].make


def test_a_file_that_the_containers_do_not_show_is_named_before_anything_is_submitted(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    recipe = read_recipe(TINY, [f"run_dir={ROOT}/runs/a", f"ampo.data.train={rows}"])
    with pytest.raises(ConfigError) as caught:
        started("ampo.sh", recipe, site(**PYXIS, AMPO_MOUNTS="/lustre:/lustre"))
    assert "data.train" in str(caught.value) and "shows /project and /lustre:/lustre; add " in str(caught.value)
    for mounts in (f"{tmp_path}:{tmp_path}", f"/lustre:/lustre,{tmp_path}", "/:/"):
        started("ampo.sh", recipe, site(**PYXIS, AMPO_MOUNTS=mounts))
    started("ampo.sh", recipe, site())
    with pytest.raises(ConfigError, match=f"{tmp_path}/new/run.* is not seen"):
        started("ampo.sh", read_recipe(TINY, [f"run_dir={tmp_path}/new/run"]), site(**PYXIS))


def test_a_link_in_the_project_that_leads_out_of_it_is_not_shown(tmp_path: Path) -> None:
    project, outside = tmp_path / "project", tmp_path / "outside"
    for folder in (project, outside):
        folder.mkdir()
    (project / "data").symlink_to(outside)
    (tmp_path / "home").symlink_to(project)
    there = Site.of(tmp_path / "home", PYXIS)
    assert there.shows(tmp_path / "home" / "runs") and not there.shows(tmp_path / "home" / "data")
    assert Site.of(tmp_path / "home", PYXIS | {"AMPO_MOUNTS": str(outside)}).shows(tmp_path / "home" / "data")
    assert not there.shows(tmp_path / "home" / ".." / "outside")
    (tmp_path / "other").mkdir()
    assert not Site.of(tmp_path / "home", PYXIS | {"AMPO_MOUNTS": f"{tmp_path}/other:{outside}"}).shows(outside)
