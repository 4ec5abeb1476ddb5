from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from nemo_ampo.commands.cli import COMMANDS, DOORS, make_app
from nemo_ampo.config.stages import STAGES
from nemo_ampo.errors import FormatError
from nemo_ampo.reply.grammar import parse_reply

ROOT = Path(__file__).resolve().parents[3]
VALID = 'Thinking Level: 1\n<|begin_of_answer|>\n"Hi there."\n<|end_of_answer|>\n'
THINKING = (
    "Thinking Level: 2\n<|begin_of_thinking|>\nIntent:\ngreet\n\nStyle:\nwarm\n\nResponse:\nHi!\n"
    '<|end_of_thinking|>\n<|begin_of_answer|>\n"Hi!"\n<|end_of_answer|>\n'
)
GIVEN = {
    "bc": ["run.dir=r", "run.init_from=a.nemo", "data.train=t.json", "data.heldout=h.json"],
    "ampo": ["run.dir=r", "run.init_from=a.nemo", "data.train=t.json", "judge.base_url=http://judge:1/v1"],
    "evaluate": [
        *("run.dir=r", "run.name=bc", "run.checkpoint=hf", "data.turns=t.json"),
        "judge.base_url=http://judge:1/v1",
    ],
    "sotopia": [
        *("--config-name", "self_play", "run.dir=r", "data.sotopia_dir=s", "policy.checkpoint=hf"),
        *("judge.base_url=http://judge:1/v1", "judge.model=j"),
    ],
}


def invoke(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(make_app(), list(arguments), input=text)


def process(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """The program as a user starts it: the only way to see its exit status and stderr."""
    command = [sys.executable, "-m", "nemo_ampo.commands.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=False, timeout=300)


def test_help_lists_every_command_and_imports_next_to_nothing() -> None:
    code = (
        "import sys\nfrom nemo_ampo.commands.cli import make_app\n"
        "try:\n    make_app()(['--help'])\nexcept SystemExit as end:\n"
        "    print(end.code, {'torch', 'numpy', 'omegaconf', 'hydra', 'openai', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 set()", done.stderr
    for name in COMMANDS:
        assert f" {name} " in done.stdout


def test_help_into_a_full_disk_is_one_line() -> None:
    command = [sys.executable, "-m", "nemo_ampo.commands.cli", "score", "--help"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (2, "error: cannot write a file: No space left on device\n")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in DOORS])
def test_every_command_explains_itself(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    words = (COMMANDS[name].__doc__ or "").split()[:4]
    assert words and all(word in result.output for word in words)


@pytest.mark.parametrize("name", DOORS)
def test_every_door_hands_its_options_on(name: str) -> None:
    done = process(name, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ")
    assert process(name, "--no-such-option").returncode == 2


def test_the_version_is_the_package_s() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert invoke("--version").output == f"nemo-ampo {stated}\n"


def test_demo_judge_hands_its_options_on() -> None:
    done = process("demo-judge", "--help")
    assert done.returncode == 0
    assert "--latency-ms" in done.stdout
    assert process("demo-judge", "--fail-rate", "3").returncode == 2


def test_a_user_error_is_one_line_and_status_2() -> None:
    done = process("report", "no/such/folder")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no/such/folder: no such folder\n"


def test_world_writes_its_files(tmp_path: Path) -> None:
    sizes = ["--num-bc", "8", "--num-rl", "4", "--num-heldout", "4"]
    result = invoke("world", "--out", str(tmp_path / "world"), *sizes)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "world" / "pack.json").is_file()


# --- score


def test_score_shows_mode_sections_and_answer() -> None:
    result = invoke("score", text=THINKING)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "format    valid",
        "mode      2 (intentional analysis)",
        "sections  Intent, Style, Response",
        'answer    "Hi!"',
    ]


def test_score_multiplies_goal_and_length() -> None:
    # (8 - 5) / (10 - 5) = 0.6 -> (0.6 + 1) / 2 = 0.8; 250 tokens are the midpoint: 0.5
    result = invoke("score", "--before", "5", "--after", "8", "--answer-tokens", "250", text=VALID)
    assert result.output.splitlines()[-3:] == [
        "goal      0.8000",
        "length    0.5000 (250 tokens)",
        "reward    0.4000",
    ]


def test_score_invents_no_length() -> None:
    result = invoke("score", "--before", "5", "--after", "8", text=VALID)
    assert "reward" not in result.output
    assert "unknown; give --answer-tokens or --tokenizer" in result.output


def test_score_of_a_broken_reply_names_the_rule_and_fails() -> None:
    result = invoke("score", "--before", "5", "--after", "8", text="Hello.")
    assert result.exit_code == 1
    assert "broken, rule level" in result.output
    assert result.output.splitlines()[-1].split() == ["reward", "-2"]


def test_score_sees_line_ends_as_the_reward_does(tmp_path: Path) -> None:
    file = tmp_path / "reply.txt"
    for reply in (VALID, VALID.replace("\n", "\r\n"), f"{VALID}\r"):
        file.write_bytes(reply.encode())
        try:
            parse_reply(reply)
        except FormatError:
            assert invoke("score", str(file)).exit_code == 1
        else:
            assert invoke("score", str(file)).exit_code == 0
    file.write_bytes(b"\xff")
    assert invoke("score", str(file)).exit_code != 0


def test_score_reads_a_file_and_ignores_one_final_line_feed(tmp_path: Path) -> None:
    file = tmp_path / "reply.txt"
    file.write_text(VALID)
    assert invoke("score", "--strict", str(file)).exit_code == 0
    file.write_text(VALID + "\n")
    result = invoke("score", "--strict", str(file))
    assert result.exit_code == 1 and "rule outside" in result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--before", "5"], "--before, --after: give both scores or neither"),
        (["--before", "5", "--after", "12"], "must be in 0..10, got 12.0"),
        (["--answer-tokens", "3", "--tokenizer", "."], "give one of the two"),
    ],
)
def test_score_refuses_contradictory_options(options: list[str], said: str) -> None:
    done = process("score", *options, text=VALID)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and said in done.stderr


# --- check-config


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_prints_its_resolved_config(stage: str) -> None:
    result = invoke("check-config", stage, "--no-files", *GIVEN[stage])
    assert result.exit_code == 0, result.exception
    printed = yaml.safe_load(result.output)
    assert printed["run"]["dir"] == "r"
    assert "${" not in result.output


def test_an_override_arrives_with_its_consequences() -> None:
    result = invoke("check-config", "ampo", "--no-files", *GIVEN["ampo"], "trainer.reinforce.max_steps=7")
    assert yaml.safe_load(result.output)["trainer"]["max_steps"] == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["amppo"], "STAGE: expected one of bc, ampo, evaluate, sotopia, got 'amppo'"),
        (["ampo", "rollout.group_sise=8"], "group_sise"),
        (["ampo", "--config-name", "nope"], "--config-name nope"),
        (["ampo"], "run.init_from: no such file: a.nemo"),
        (["bc"], "run.init_from: no such file: a.nemo"),
        (
            ["ampo", "--no-files", "algorithm.advantage=amop"],
            "algorithm.advantage: expected one of ampo, ampo_paper, ampo_robust, grpo, got 'amop'",
        ),
        (["ampo", "--no-files", "algorithm.preset=ppo"], "algorithm.preset: expected one of ampo-paper, ampo,"),
        (["ampo", "--no-files", "rollout.group_size=1"], "rollout.group_size"),
        (["ampo", "--no-files", "rollout.engine=vllm"], "rollout.engine: expected one of megatron, trtllm, trtllm_server"),
        (["ampo", "--no-files", "--ranks", "3"], "model.global_batch_size"),
        (["evaluate"], "data.turns: no such file: t.json"),
        (["evaluate", "--no-files", "data.samples=0"], "data.samples"),
    ],
)
def test_a_config_that_cannot_run_is_refused_naming_the_key(arguments: list[str], said: str) -> None:
    done = process("check-config", *arguments, *GIVEN.get(arguments[0], []))
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ") and said in done.stderr


def test_a_missing_value_is_named() -> None:
    done = process("check-config", "bc", "run.dir=r")
    assert done.returncode == 2
    assert "a value is required" in done.stderr


# --- paths


def _path_parameters() -> list[tuple[str, str]]:
    """Command and parameter of every path that a command takes."""
    own = {name: inspect.signature(function) for name, function in COMMANDS.items() if name not in DOORS}
    return [(name, key) for name, of in own.items() for key, value in of.parameters.items() if "Path" in value.annotation]


@pytest.mark.parametrize(("name", "parameter"), _path_parameters())
def test_every_path_has_the_rule_of_an_override(name: str, parameter: str) -> None:
    """The shell leaves ``--output=~/x`` as it is; nobody wants a folder of the name ``~``."""
    signature = inspect.signature(COMMANDS[name])
    positional = "typer.Argument" in signature.parameters[parameter].annotation
    given = ["~/x"] if positional else [f"--{parameter.replace('_', '-')}=~/x"]
    needed = [key for key, value in signature.parameters.items() if value.default is inspect.Parameter.empty]
    others = [key for key in needed if key != parameter]
    rest = [
        "x" if "typer.Argument" in signature.parameters[key].annotation else f"--{key.replace('_', '-')}=x" for key in others
    ]
    result = invoke(name, *given, *rest)
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and "~/x: nothing here expands ~; write the whole path" in said


def test_a_name_that_begins_with_a_tilde_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("./~x").write_text(VALID)
    assert "mode      1" in invoke("score", "./~x").output


# --- report and doctor


def test_report_prints_what_it_wrote(tmp_path: Path) -> None:
    line = {"step": 0, "kind": "train", "reward/mean": 0.25}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    result = invoke("report", str(tmp_path))
    assert result.exit_code == 0
    assert "reward/mean" in result.output and "0.25" in result.output
    assert "wrote" in result.output
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_doctor_tells_by_its_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_ampo.commands import doctor

    missing = doctor.Report((doctor.ReportLine("x", doctor.Status.MISSING, "not installed", "install x"),))
    monkeypatch.setattr(doctor, "doctor", lambda judge_key_env: missing)
    result = invoke("doctor")
    assert result.exit_code == 1 and "install x" in result.output
    monkeypatch.setattr(doctor, "doctor", lambda judge_key_env: doctor.Report(()))
    assert invoke("doctor").exit_code == 0


def test_doctor_lists_the_substitutes() -> None:
    result = invoke("doctor", "--compat")
    assert result.exit_code == 0
    assert "torch.Tensor.cuda" in result.output


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A training checkpoint as far as packing looks at it."""
    import torch
    import torch.distributed.checkpoint as dcp

    from nemo_ampo.checkpoint.store import JobLayout, Manifest, Store, list_files, measure

    store = Store(tmp_path / "run" / "checkpoints")
    folder = store.begin(5)
    dcp.save({"model.weight": torch.ones(64)}, checkpoint_id=folder / "model_weights")
    (folder / "model_config.yaml").write_text("mcore_gpt: true\n")
    assets = tmp_path / "run" / "hf_assets"
    assets.mkdir()
    (assets / "config.json").write_text("{}")
    layout = JobLayout(1, 1, 1, 1)
    files = measure(folder, list_files(folder))
    return store.publish(folder, Manifest("bc", 5, {"step": 5}, layout, {}, None, {}, files)).path


def test_pack_uses_only_what_is_as_it_was_written(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.nemo"
    assert invoke("pack", str(checkpoint), "--output", str(output)).exit_code == 0
    first = output.read_bytes()
    for name in ("model_weights/__0_0.distcp", "model_weights/.metadata", "model_config.yaml"):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        finished = process("pack", str(checkpoint), "--output", str(output))
        assert (finished.returncode, finished.stdout) == (2, "")
        assert finished.stderr == (
            f"error: {checkpoint / name}: damaged: its content does not have the hash in manifest.json\n"
        )
        (checkpoint / name).write_bytes(whole)
    assert output.read_bytes() == first
