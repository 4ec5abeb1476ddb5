"""What a user can get wrong stops a stage before a model loads, with one line that says what to change."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from stage_runs import ROOT, Finished, Quickstart, run
from tokenizers import Tokenizer

from nemo_ampo.dialogue.opening import write_opening_rows
from nemo_ampo.overrides import override

pytestmark = pytest.mark.slow
SOTOPIA = ROOT.parent / "shared" / "sotopia"


def one_line(finished: Finished) -> str:
    assert finished.status == 2, finished.err
    lines = finished.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), finished.err
    return lines[0]


def ampo(quickstart: Quickstart, tmp_path: Path, *overrides: str) -> str:
    return one_line(quickstart.ampo(tmp_path / "run", "http://127.0.0.1:9/v1", *overrides))


def test_judge_unreachable(quickstart: Quickstart, tmp_path: Path) -> None:
    assert "http://127.0.0.1:9/v1" in ampo(quickstart, tmp_path)


def test_missing_key_variable(quickstart: Quickstart, tmp_path: Path) -> None:
    assert "NO_SUCH_KEY" in ampo(quickstart, tmp_path, "judge.api_key_env=NO_SUCH_KEY")


def test_bad_row_names_file_line_and_field(quickstart: Quickstart, tmp_path: Path) -> None:
    lines = (quickstart.folder / "world" / "rl_train.jsonl").read_text().splitlines()
    row = json.loads(lines[2])
    row["state"]["agent1"]["score"] = 11
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*lines[:2], json.dumps(row), *lines[3:]]))
    line = ampo(quickstart, tmp_path, f"data.train={bad}")
    assert "bad.jsonl" in line and "line 3" in line and "score" in line


def test_rows_of_the_evaluation_set(quickstart: Quickstart, tmp_path: Path) -> None:
    if not SOTOPIA.is_dir():
        pytest.skip(f"the SOTOPIA data files are not at {SOTOPIA}")
    rows = tmp_path / "opening.jsonl"
    write_opening_rows(SOTOPIA, rows)
    line = ampo(quickstart, tmp_path, f"data.train={rows}")
    assert "opening.jsonl" in line and "data.allow_evaluation_scenarios" in line
    assert "rollout.max_prompt_tokens" in ampo(
        quickstart, tmp_path, f"data.train={rows}", "data.allow_evaluation_scenarios=true"
    )


def cloning(quickstart: Quickstart, tmp_path: Path, *overrides: str, **changes: str) -> Finished:
    """A start of BC on one row of the world with some fields changed."""
    world, rows = quickstart.folder / "world", tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(json.loads((world / "bc_train.jsonl").read_text().splitlines()[0]) | changes))
    return run(
        [
            *("recipes.bc", "--config-name", "tiny", f"run.dir={tmp_path / 'bc'}"),
            *(override("run.init_from", quickstart.folder / "nemo" / "base.nemo"), f"data.train={rows}"),
            *(override("data.heldout", world / "bc_heldout.jsonl"), *overrides),
        ]
    )


def test_bad_cloning_row(quickstart: Quickstart, tmp_path: Path) -> None:
    finished = cloning(quickstart, tmp_path, output="no grammar")
    assert finished.status == 2
    assert "rows.jsonl" in finished.err and "line 1" in finished.err and "'level'" in finished.err


def test_a_cloning_row_beyond_the_models_positions(quickstart: Quickstart, tmp_path: Path) -> None:
    line = one_line(cloning(quickstart, tmp_path, "data.max_tokens=9999", instruction="Sell the chair. " * 900))
    assert "data.max_tokens: 9999 lets rows of up to" in line and line.endswith("set it to 2048")


def test_tensor_parallel_that_does_not_divide(quickstart: Quickstart, tmp_path: Path) -> None:
    finished = quickstart.ampo(tmp_path / "run", "http://127.0.0.1:9/v1", "model.tensor_model_parallel_size=3", ranks=3)
    assert finished.status != 0
    assert "error: model.tensor_model_parallel_size: 3 does not divide" in finished.err


def test_prompt_longer_than_the_limit(quickstart: Quickstart, tmp_path: Path) -> None:
    assert "rollout.max_prompt_tokens=8" in ampo(quickstart, tmp_path, "rollout.max_prompt_tokens=8")


def test_held_out_replies_beyond_the_models_positions(quickstart: Quickstart, tmp_path: Path) -> None:
    line = one_line(
        cloning(quickstart, tmp_path, "model.global_batch_size=1", "model.micro_batch_size=1", "data.max_new_tokens=2000")
    )
    assert "data.max_new_tokens: 2000 after a held-out prompt of" in line and "the model's 2048 positions" in line


def test_more_positions_than_the_model_has(quickstart: Quickstart, tmp_path: Path) -> None:
    assert "positions" in ampo(quickstart, tmp_path, "rollout.max_new_tokens=100000")


def repacked(quickstart: Quickstart, tmp_path: Path, edit: object) -> Path:
    """The cloned policy with edited Hugging Face files."""
    from nemo_ampo.checkpoint.nemo_file import unpack_assets
    from nemo_ampo.checkpoint.nemo_writing import add_assets

    source = quickstart.folder / "bc" / "policy.nemo"
    copy = tmp_path / "policy.nemo"
    shutil.copy(source, copy)
    assets = unpack_assets(source, tmp_path / "assets")
    config = json.loads((assets / "tokenizer_config.json").read_text())
    edit(config)  # type: ignore[operator]
    (assets / "tokenizer_config.json").write_text(json.dumps(config))
    (assets / "chat_template.jinja").unlink(missing_ok=True)
    add_assets(copy, assets)
    assert tarfile.is_tarfile(copy)
    return copy


def test_tokenizer_without_chat_template(quickstart: Quickstart, tmp_path: Path) -> None:
    policy = repacked(quickstart, tmp_path, lambda config: config.pop("chat_template", None))
    assert "chat_template" in ampo(quickstart, tmp_path, f"run.init_from={policy}")


def test_tokenizer_without_eos(quickstart: Quickstart, tmp_path: Path) -> None:
    policy = repacked(quickstart, tmp_path, lambda config: config.update(eos_token=None))
    assert "eos_token" in ampo(quickstart, tmp_path, f"run.init_from={policy}")


def test_vocabulary_larger_than_the_embedding(quickstart: Quickstart, tmp_path: Path) -> None:
    def many(config: dict[str, object]) -> None:
        path = str(tmp_path / "assets" / "tokenizer.json")
        tokenizer = Tokenizer.from_file(path)
        tokenizer.add_special_tokens([f"<|extra_{i}|>" for i in range(2000)])
        tokenizer.save(path)

    policy = repacked(quickstart, tmp_path, many)
    line = ampo(quickstart, tmp_path, f"run.init_from={policy}")
    assert "embedding" in line and "rows" in line
