from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_run import evaluation, write_ampo, write_bc

from nemo_ampo.report.training.inputs import read_run
from nemo_ampo.report.training.page import card, headlines, render, write_report
from nemo_ampo.report.training.samples import ShownSample

ROOT = Path(__file__).resolve().parents[4]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Tags, attributes and visible text; fails on tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html(run_folder: Path) -> str:
    return render(read_run(run_folder))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_needs_nothing_but_itself(html: str, page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "http://" not in html and "https://" not in html
    assert "@import" not in html and "url(" not in re.sub(r"url\(#c[0-9a-f-]+", "", html)
    links = [value or "" for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in links)
    assert "default-src 'none'" in html


def test_ids_are_unique(page: Page) -> None:
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_sixty_steps_stay_small(html: str) -> None:
    assert len(html.encode()) < 1_000_000


def test_every_part_is_there(page: Page) -> None:
    for words in (
        *("Before BC", "After BC", "After AMPO", "0.550", "0.710"),
        *("Evaluation", "Which mode is chosen", "Each mode", "Replies and policy", "Judge", "Time", "Behaviour cloning"),
        *("The same prompt, every checkpoint", "Replies, early and late", "Training in numbers"),
        *("step 0", "step 59", "prospective simulation", "thinking: Intent, Style, Response"),
    ):
        assert words in page.text, words
    assert "was found" not in page.text, "nothing is missing from this run"
    assert page.tags.count("svg") > 15


def test_text_of_a_model_cannot_become_markup(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    row = {
        "step": 0,
        "row_id": attack,
        "tag": attack,
        "mode": 0,
        "text": attack,
        "format_rule": attack,
        "dialogue": attack,
    }
    thinking = f"Thinking Level: 2\n<|begin_of_thinking|>\nIntent:\n{attack}\n\nStyle:\n{attack}\n\nResponse:\n{attack}"
    spoken = f'{thinking}\n<|end_of_thinking|>\n<|begin_of_answer|>\n"{attack}"\n<|end_of_answer|>'
    rows = (row, row | {"mode": 2, "text": spoken, "format_rule": None, "judge_error": attack})
    run = tmp_path / "<b>run<"
    write_ampo(run / "ampo", 2, rows)
    with (run / "ampo" / "metrics.jsonl").open("a") as file:
        tagged = {f"tag/{attack}/reward": 0.5, f"tag/{attack}/mode/1/share": 0.5, f"time/{attack}_s": 1.0}
        file.write(json.dumps({"step": 2, "kind": "train", "time/step_s": 2.0} | tagged) + "\n")
    for name in ("a", "b"):
        data = evaluation(attack + name, 0.5)
        data["checkpoint"] = attack
        data["summary"][attack] = data["summary"]["easy"]
        data["samples"][0] |= {"tag": attack, "text": attack, "row_id": attack, "dialogue": attack}
        (run / "evaluate").mkdir(exist_ok=True)
        (run / "evaluate" / f"{name}.json").write_text(json.dumps(data))
    (run / "ampo" / "provenance.json").write_text(json.dumps({"packages": {attack: attack}}))

    html = render(read_run(run))
    page = Page(html)
    assert not {"script", "img", "b"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(attack) > 8, "the text itself is still shown"


def test_dollar_signs_and_odd_characters_are_only_text(tmp_path: Path) -> None:
    odd = "a $x^2 & \\frac _tag \ud800 \x00"
    write_ampo(tmp_path / "ampo", 1)
    with (tmp_path / "ampo" / "rollouts.jsonl").open("a") as file:
        row = {"step": 0, "row_id": "r", "tag": odd, "mode": 0, "text": odd, "format_rule": "level"}
        file.write(json.dumps(row) + "\n")
    with (tmp_path / "ampo" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "kind": "train", f"tag/{odd}/reward": 0.5}) + "\n")
    written = write_report(tmp_path)
    assert "a $x^2 &amp; \\frac _tag ?" in written.read_text(encoding="utf-8")


def test_missing_parts_are_said(tmp_path: Path) -> None:
    write_bc(tmp_path / "bc", 30)
    text = Page(render(read_run(tmp_path))).text
    assert "No evaluation (evaluate/*.json) was found." in text
    assert "No AMPO log was found." in text
    assert "After AMPO" not in text
    assert "Behaviour cloning" in text


def test_without_evaluations_the_headline_says_it_is_training(tmp_path: Path) -> None:
    write_ampo(tmp_path, 10)
    run = read_run(tmp_path)
    first, last = headlines(run)
    assert (first.title, last.title) == ("First steps", "Last steps")
    assert "training samples" in first.note
    assert run.ampo is not None
    begin, end = run.ampo.log.series("reward/mean").ends()
    assert (first.reward, last.reward) == (f"{begin:.3f}", f"{end:.3f}")


def test_a_run_that_has_only_begun_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "holds no training step yet" in Page(render(read_run(tmp_path))).text


def test_a_card_takes_a_valid_reply_apart() -> None:
    text = (
        "Thinking Level: 2\n<|begin_of_thinking|>\nIntent:\nthank\n\nStyle:\nwarm\n\nResponse:\nThanks!\n"
        '<|end_of_thinking|>\n<|begin_of_answer|>\n"Thanks!"\n<|end_of_answer|>'
    )
    shown = card(
        ShownSample(
            row_id="r",
            tag="",
            mode=2,
            text=text,
            dialogue='Turn 0: Ada said: "Cake?"\n\nTurn 1: Ben said: "Thanks!"',
            reward=0.75,
            advantage=-0.5,
            agent1_score=5.0,
            agent2_score=7.5,
            num_tokens=40,
        ),
        "step 3",
    )
    assert shown.answer == '"Thanks!"'
    assert shown.thinking == (("Intent", "thank"), ("Style", "warm"), ("Response", "Thanks!"))
    assert shown.context == 'Turn 0: Ada said: "Cake?"\n\nTurn 1: Ben said:', "the answer is not shown twice"
    assert dict(shown.facts) == {
        "reward": "0.750",
        "judge": "5 / 7.5",
        "advantage": "-0.500",
        "tokens": "40",
    }
    assert shown.problem is None


def test_a_card_says_why_there_is_no_reward() -> None:
    broken = card(ShownSample(row_id="r", tag="", mode=0, text="hm", format_rule="level"), "t")
    assert (broken.answer, broken.raw) == (None, "hm")
    assert broken.problem == "breaks the grammar (rule: level)"
    unjudged = card(ShownSample(row_id="r", tag="", mode=1, text="hm", judge_error="timeout"), "t")
    assert unjudged.problem == "the judge failed (timeout); no reward"


def test_the_same_run_gives_the_same_page(run_folder: Path, html: str) -> None:
    assert render(read_run(run_folder)) == html


def test_the_report_is_written_beside_the_run_or_where_asked(run_folder: Path, tmp_path: Path) -> None:
    asked = tmp_path / "deep" / "page.html"
    assert write_report(run_folder, asked) == asked
    assert asked.read_text(encoding="utf-8").startswith("<!doctype html>")
    write_bc(tmp_path / "stage", 3)
    assert write_report(tmp_path / "stage") == tmp_path / "stage" / "report.html"


def test_a_report_is_imported_without_torch_and_without_drawing_libraries() -> None:
    code = "import nemo_ampo.report, sys; print({'torch', 'matplotlib', 'jinja2', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr
