"""Every stage of the main job, as a user starts it."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from stage_runs import AMPO_STEPS, BC_STEPS, Quickstart, quickstart_command, run

from nemo_ampo.checkpoint.nemo_file import read_model_config, unpack_assets
from nemo_ampo.files import read_jsonl
from nemo_ampo.overrides import override
from nemo_ampo.run.metrics import DESCRIPTIONS
from nemo_ampo.world.judge_server import demo_judge_process

pytestmark = pytest.mark.slow


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_output_is_there(quickstart: Quickstart) -> None:
    names = (
        *("world/pack.json", "hf/base/model.safetensors", "nemo/base.nemo", "bc/policy.nemo", "hf/bc/config.json"),
        *("ampo/policy.nemo", "ampo/metrics.jsonl", "ampo/rollouts.jsonl", "ampo/config.yaml", "ampo/provenance.json"),
        *("hf/ampo/model.safetensors", "evaluate/base.json", "evaluate/bc.json", "evaluate/ampo.json", "report.html"),
    )
    assert [n for n in names if not (quickstart.folder / n).is_file()] == []
    assert "report:" in quickstart.finished.out and "ampo" in quickstart.finished.out


def test_output_is_ours(quickstart: Quickstart) -> None:
    """At the default level the frameworks' warnings and log lines are not shown."""
    noise = ("[NeMo", "Warning", "warnings.warn", "does not have field", "Apex", "Transformer Engine")
    text = quickstart.finished.out + quickstart.finished.err
    assert [line for line in text.splitlines() if any(word in line for word in noise)] == []


def test_second_run_does_nothing(quickstart: Quickstart) -> None:
    before = sha256(quickstart.folder / "ampo" / "policy.nemo")
    again = run(quickstart_command(quickstart.folder))
    assert again.status == 0
    assert again.out.count("done before") == 10
    assert sha256(quickstart.folder / "ampo" / "policy.nemo") == before


def test_other_settings_need_another_folder(quickstart: Quickstart) -> None:
    other = run([*quickstart_command(quickstart.folder), "--seed", "2"])
    assert other.status == 2
    assert "was made with seed=1, now 2" in other.err


def test_exact_number_of_steps_with_known_metrics(quickstart: Quickstart) -> None:
    rows = read_jsonl(quickstart.folder / "ampo" / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(AMPO_STEPS))
    patterns = [re.compile(re.sub(r"\\{\w+\\}", r"[^/]+", re.escape(name))) for name in DESCRIPTIONS]
    for row in rows:
        unknown = [k for k in row if k not in ("step", "kind") and not any(p.fullmatch(k) for p in patterns)]
        assert unknown == []
        assert not [k for k in row if k.startswith("memory/") or "per_gpu" in k], "there is no GPU"
        assert row["engine/logprob_gap"] < 1e-5
        assert row["policy/ratio_max"] == pytest.approx(1, abs=1e-4), "one update: the first pass sees ratio 1"
        assert row["judge/failed_fraction"] == 0
        assert sum(row[f"mode/{k}/share"] for k in (1, 2, 3, 4)) == pytest.approx(1 - row["format/failed_fraction"])
    bc = read_jsonl(quickstart.folder / "bc" / "metrics.jsonl")
    assert [r["step"] for r in bc if r["kind"] == "train"] == list(range(BC_STEPS))


def test_the_schedule_of_the_cloning_stage_does_not_leak_into_the_next(quickstart: Quickstart) -> None:
    """The cloned policy's own config holds a warm-up and a decay."""
    config = yaml.safe_load((quickstart.folder / "ampo" / "config.yaml").read_text())
    rates = {row["policy/lr"] for row in read_jsonl(quickstart.folder / "ampo" / "metrics.jsonl")}
    assert rates == {config["model"]["optim"]["lr"]} and "sched" not in config["model"]["optim"]


def test_rollouts_explain_the_reward(quickstart: Quickstart) -> None:
    rows = read_jsonl(quickstart.folder / "ampo" / "rollouts.jsonl")
    assert len(rows) == AMPO_STEPS * 128
    for row in rows:
        if row["format_rule"] is not None:
            assert (row["reward"], row["mode"], row["agent1_score"]) == (-2.0, 0, None)
        else:
            assert row["reward"] == pytest.approx(row["goal"] * row["length"])
            assert row["mode"] in (1, 2, 3, 4) and 0 <= row["agent1_score"] <= 10


def test_cloning_learns_the_grammar(quickstart: Quickstart) -> None:
    last = [r for r in read_jsonl(quickstart.folder / "bc" / "metrics.jsonl") if r["kind"] == "val"][-1]
    assert last["bc/valid_replies"] > 0.7
    assert {f"bc/val_loss_mode_{k}" for k in (1, 2, 3, 4)} <= set(last)


def test_export_is_an_ordinary_folder_with_the_same_tokenizer(quickstart: Quickstart) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, out = quickstart.folder / "hf" / "base", quickstart.folder / "hf" / "ampo"
    AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template and tokenizer.eos_token_id is not None
    files = {p.name for p in base.iterdir()} - {"model.safetensors"}
    assert {n: sha256(out / n) for n in files} == {n: sha256(base / n) for n in files}


def test_training_moved_the_weights(quickstart: Quickstart) -> None:
    from safetensors.torch import load_file

    stages = [load_file(quickstart.folder / "hf" / n / "model.safetensors") for n in ("base", "bc", "ampo")]
    for before, after in itertools.pairwise(stages):
        assert set(before) == set(after)
        assert max(float((after[k] - before[k]).abs().max()) for k in before) > 1e-5


def test_system_prompt_travels_with_the_policy(quickstart: Quickstart, tmp_path: Path) -> None:
    first = json.loads((quickstart.folder / "world" / "bc_train.jsonl").read_text().splitlines()[0])
    assets = unpack_assets(quickstart.folder / "bc" / "policy.nemo", tmp_path)
    assert (assets / "system_prompt.txt").read_text() == first["system"]
    assert (quickstart.folder / "hf" / "ampo" / "system_prompt.txt").read_text() == first["system"]
    assert read_model_config(quickstart.folder / "ampo" / "policy.nemo")["mcore_gpt"] is True


def test_an_interrupted_pipeline_goes_on_at_the_first_unfinished_stage(quickstart: Quickstart, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(quickstart.folder, folder)
    (folder / "evaluate" / "ampo.json").unlink()
    shutil.rmtree(folder / "hf" / "ampo")
    again = run(quickstart_command(folder))
    assert again.status == 0, again.err
    assert again.out.count("done before") == 8
    assert (folder / "hf" / "ampo" / "config.json").is_file()


def test_the_mode_dial_moves_every_valid_reply_to_the_mode_it_is_turned_to(quickstart: Quickstart, tmp_path: Path) -> None:
    with demo_judge_process() as judge_url:
        turned = run(
            [
                *("recipes.evaluate", f"run.dir={tmp_path}", "run.name=turned", "generate.mode_bias={3: 50}"),
                *(
                    override("run.checkpoint", quickstart.folder / "hf" / "ampo"),
                    "data.limit=32",
                    f"judge.base_url={judge_url}",
                ),
                override("data.turns", quickstart.folder / "world" / "rl_heldout.jsonl"),
            ]
        )
    assert turned.status == 0, turned.err
    result = json.loads((tmp_path / "turned.json").read_text())
    modes = [sample["mode"] for sample in result["samples"] if sample["valid"] and sample["format_rule"] is None]
    assert result["mode_bias"] == {"3": 50.0} and len(modes) > 8 and set(modes) == {3}
    straight = json.loads((quickstart.folder / "evaluate" / "ampo.json").read_text())["summary"]["all"]["mode_share"]
    assert straight["3"] < 0.9
