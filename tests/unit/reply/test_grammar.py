"""The reply grammar: what the reference accepts, what it rejects, and what may be spoken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_ampo.reply.grammar import FORMAT_RULES, FormatError, one_line, parse_reply, render_reply, spoken_text
from nemo_ampo.reply.modes import MODES

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
ANSWER = '"Fine by me."'


def cases(name: str) -> list[Any]:
    found = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["cases"]
    return [pytest.param(case, id=case["name"]) for case in found]


def thoughts(mode: int) -> dict[str, str]:
    return {name: f"{name.lower()} text" for name in MODES[mode].sections}


def reply(mode: int, answer: str = ANSWER) -> str:
    return render_reply(mode, answer, thoughts(mode))


LEVEL_1 = 'Thinking Level: 1\n<|begin_of_answer|>\n"Fine by me."\n<|end_of_answer|>'
LEVEL_2 = (
    "Thinking Level: 2\n<|begin_of_thinking|>\nIntent:\nintent text\n\nStyle:\nstyle text\n\n"
    "Response:\nresponse text\n<|end_of_thinking|>\n<|begin_of_answer|>\n"
    '"Fine by me."\n<|end_of_answer|>'
)


def test_the_written_skeleton_is_exact() -> None:
    assert reply(1) == LEVEL_1
    assert reply(2) == LEVEL_2


@pytest.mark.parametrize("case", cases("format"))
def test_golden_format(case: dict[str, Any]) -> None:
    if case["expected_ok"]:
        parsed = parse_reply(case["text"])
        assert (parsed.mode, parsed.answer) == (case["expected_level"], case["expected_answer"])
    else:
        with pytest.raises(FormatError) as error:
            parse_reply(case["text"])
        assert error.value.rule in FORMAT_RULES


ACCEPTED = {
    "text before the level line": ("So.\n" + LEVEL_1, 1),
    "text after the end tag": (LEVEL_2 + "\nDone.", 2),
    "text between the blocks": (
        LEVEL_2.replace("thinking|>\n<|begin_of_a", "thinking|>\nwell\n<|begin_of_a"),
        2,
    ),
    "nothing between the blocks": (LEVEL_2.replace("thinking|>\n<|begin_of_a", "thinking|><|begin_of_a"), 2),
    "text before the first section": (LEVEL_2.replace("Intent:", "Hmm.\nIntent:"), 2),
    "empty section": (LEVEL_2.replace("Intent:\nintent text\n\nStyle", "Intent:\n\nStyle"), 2),
    "empty last section": (LEVEL_2.replace("response text\n", "\n"), 2),
    "three line feeds between sections": (LEVEL_2.replace("\n\nStyle", "\n\n\nStyle"), 2),
    "answer of several lines": (LEVEL_1.replace("Fine", "Well,\n\nfine"), 1),
    "empty quotes": (LEVEL_1.replace("Fine by me.", ""), 1),
    "apostrophes": (LEVEL_1.replace("Fine", "It's 'fine'"), 1),
    "unknown extra section": (LEVEL_2.replace("\n\nStyle", "\n\nMood:\ngood\n\nStyle"), 2),
    "header 2 over the sections of 3": (reply(3).replace("Level: 3", "Level: 2"), 2),
    "header 2 over the sections of 4": (reply(4).replace("Level: 4", "Level: 2"), 2),
    "header 3 over the sections of 4": (reply(4).replace("Level: 4", "Level: 3"), 3),
    "thinking around a level-1 block": (f"<|begin_of_thinking|>\nhm\n<|end_of_thinking|>\n{LEVEL_1}", 1),
    "an idle level line before the true one": ("Thinking Level: 1\n" + LEVEL_2, 2),
    "level 1 quoted in the thinking of level 3": (
        reply(3).replace("goal text", "Thinking Level: 1\n<|begin_of_answer|>\n"),
        1,
    ),
}


@pytest.mark.parametrize(("text", "mode"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepted_like_the_reference(text: str, mode: int) -> None:
    assert parse_reply(text).mode == mode


REJECTED = {
    "no quotes": (LEVEL_1.replace('"', ""), "answer"),
    "smart quotes": (LEVEL_1.replace('"', "\N{RIGHT DOUBLE QUOTATION MARK}"), "answer"),
    "a third quote": (LEVEL_1.replace("by", '"by'), "answer"),
    "two more quotes": (LEVEL_1.replace("by", '"by"'), "answer"),
    "escaped quote": (LEVEL_1.replace("by", '\\"by'), "answer"),
    "one quote": (LEVEL_1.replace('."', "."), "answer"),
    "blank before the quote": (LEVEL_1.replace('"Fine', ' "Fine'), "answer"),
    "blank after the quote": (LEVEL_1.replace('me."', 'me." '), "answer"),
    "line feed before the quote": (LEVEL_1.replace('"Fine', '\n"Fine'), "answer"),
    "text before the quote": (LEVEL_1.replace('"Fine', 'He: "Fine'), "answer"),
    "nothing in the answer": (LEVEL_1.replace('"Fine by me."', ""), "answer"),
    "no answer line at all": (LEVEL_1.replace('"Fine by me."\n', ""), "answer"),
    "blank after the level": (LEVEL_1.replace("1\n", "1 \n"), "level"),
    "unknown level": (LEVEL_1.replace("1", "5"), "level"),
    "lower-case level line": (LEVEL_1.lower(), "level"),
    "CRLF": (LEVEL_1.replace("\n", "\r\n"), "level"),
    "no level line": (LEVEL_1.removeprefix("Thinking Level: 1\n"), "level"),
    "nothing": ("", "level"),
    "level 1 with a thinking block": (LEVEL_2.replace("Level: 2", "Level: 1"), "level"),
    "level 2 without one": (LEVEL_1.replace("Level: 1", "Level: 2"), "level"),
    "cut before the end tag": (LEVEL_2.removesuffix("\n<|end_of_answer|>"), "tags"),
    "cut inside the thinking": (LEVEL_2[: LEVEL_2.index("Style")], "tags"),
    "end tag on the answer's line": (LEVEL_1.replace('."\n', '."'), "tags"),
    "two answers": (LEVEL_2 + "\n" + LEVEL_1.removeprefix("Thinking Level: 1\n"), "tags"),
    "two blocks": (f"{LEVEL_1}\n{LEVEL_1}", "tags"),
    "answer before the thinking": (
        'Thinking Level: 2\n<|begin_of_thinking|>\nx\n<|begin_of_answer|>\n"Fine."\n<|end_of_answer|>\n<|end_of_thinking|>',
        "order",
    ),
    "lower-case section": (LEVEL_2.replace("Style:", "style:"), "sections"),
    "bold section": (LEVEL_2.replace("Style:", "**Style:**"), "sections"),
    "text on the section's line": (LEVEL_2.replace("Style:\n", "Style: warm\n"), "sections"),
    "blank on the section's line": (LEVEL_2.replace("Style:\n", "Style: \n"), "sections"),
    "one line feed before a section": (LEVEL_2.replace("\n\nStyle", "\nStyle"), "sections"),
    "missing section": (LEVEL_2.replace("\n\nStyle:\nstyle text", ""), "sections"),
    "missing last section": (LEVEL_2.replace("\n\nResponse:\nresponse text", ""), "sections"),
    "last section without its line feed": (
        LEVEL_2.replace("Response:\nresponse text", "Response:"),
        "sections",
    ),
    "repeated last section": (LEVEL_2.replace("style text", "Response:\nhm"), "sections"),
    "repeated section": (LEVEL_2.replace("\n\nResponse", "\n\nStyle:\nagain\n\nResponse"), "sections"),
    "a word that ends in a section's name": (LEVEL_2.replace("intent text", "LifeStyle:\nslow"), "sections"),
    "swapped sections": (
        LEVEL_2.replace("Intent:", "?:").replace("Style:", "Intent:").replace("?:", "Style:"),
        "sections",
    ),
    "header 3 over the sections of 2": (LEVEL_2.replace("Level: 2", "Level: 3"), "sections"),
    "header 4 over the sections of 3": (reply(3).replace("Level: 3", "Level: 4"), "sections"),
}


@pytest.mark.parametrize(("text", "rule"), REJECTED.values(), ids=REJECTED.keys())
def test_rejected_like_the_reference(text: str, rule: str) -> None:
    with pytest.raises(FormatError) as error:
        parse_reply(text)
    assert error.value.rule == rule


def test_the_answer_is_cut_at_bare_tags_as_in_the_reference() -> None:
    assert parse_reply(LEVEL_1 + '\n<|begin_of_answer|>\n"Later."').answer == '"Later."'
    assert parse_reply(LEVEL_1.replace("by", "<|end_of_answer|>by")).answer == '"Fine'


@pytest.mark.parametrize("mode", MODES)
def test_sections_are_read_back(mode: int) -> None:
    parsed = parse_reply(reply(mode))
    assert parsed.mode == mode
    assert parsed.answer == ANSWER
    assert parsed.thinking == thoughts(mode)


def test_sections_of_a_deeper_mode_are_read_under_a_lower_header() -> None:
    assert parse_reply(reply(4).replace("Level: 4", "Level: 2")).thinking == thoughts(4)


def test_a_section_keeps_unknown_headings_and_loses_outer_blanks() -> None:
    text = LEVEL_2.replace("intent text", " one\n\nMood:\ngood\n\n").replace("Intent:", "Hmm Intent:")
    assert parse_reply(text).thinking == {
        "Intent": "one\n\nMood:\ngood",
        "Style": "style text",
        "Response": "response text",
    }


STRICT = {
    "text before": ("So.\n" + LEVEL_1, "outside"),
    "text after": (LEVEL_2 + "\n", "outside"),
    "text between the blocks": (
        LEVEL_2.replace("thinking|>\n<|begin_of_a", "thinking|>\nwell\n<|begin_of_a"),
        "outside",
    ),
    "text before the first section": (LEVEL_2.replace("Intent:", "Hmm.\nIntent:"), "outside"),
    "spare blank line": (LEVEL_2.replace("\n\nStyle", "\n\n\nStyle"), "outside"),
    "empty section": (LEVEL_2.replace("intent text\n\n", "\n\n"), "sections"),
    "sections of another mode": (reply(4).replace("Level: 4", "Level: 2"), "sections"),
    "one foreign section": (LEVEL_2.replace("intent text", "x\nGoal:\ny"), "sections"),
    "empty answer": (LEVEL_1.replace("Fine by me.", " "), "answer"),
}


@pytest.mark.parametrize(("text", "rule"), STRICT.values(), ids=STRICT.keys())
def test_strict_refuses_what_the_reference_lets_pass(text: str, rule: str) -> None:
    parse_reply(text)
    with pytest.raises(FormatError) as error:
        parse_reply(text, strict=True)
    assert error.value.rule == rule


@pytest.mark.parametrize("mode", MODES)
def test_strict_accepts_the_skeleton(mode: int) -> None:
    assert parse_reply(reply(mode), strict=True).mode == mode


WORDS = st.text(st.sampled_from("ab \n'.,:"), max_size=30)
SECTION = WORDS.map(str.strip)


@given(st.sampled_from(sorted(MODES)), WORDS, st.data())
def test_what_is_written_is_read_back(mode: int, words: str, data: st.DataObject) -> None:
    thinking = {name: data.draw(SECTION) for name in MODES[mode].sections}
    parsed = parse_reply(render_reply(mode, f'"{words}"', thinking))
    assert (parsed.mode, parsed.answer, parsed.thinking) == (mode, f'"{words}"', thinking)


@pytest.mark.parametrize(
    ("mode", "thinking"),
    [(0, {}), (5, {}), (1, {"Intent": "x"}), (2, {"Intent": "x", "Style": "y"}), (2, thoughts(3))],
)
def test_writing_refuses_a_mode_or_sections_it_does_not_know(mode: int, thinking: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"mode {mode}"):
        render_reply(mode, ANSWER, thinking)


def test_writing_refuses_texts_that_cannot_be_read_back() -> None:
    with pytest.raises(FormatError, match="quotation"):
        render_reply(1, "no quotes")
    with pytest.raises(FormatError, match="Style"):
        render_reply(2, ANSWER, thoughts(2) | {"Intent": "x\n\nStyle:\ny"})


# Where we speak other words than the reference on purpose, with the number of the reference's defect:
# D9  truncated thinking output speaks headers or tags;
# D10 a plain string of a reasoning API is cut to its first character;
# D26 a reply with a single quotation mark speaks nothing.
SPOKEN_DIFFERENTLY = {
    "thinking_no_end_tag_L1": ("D9", '"Let us split the bill and fix it on Saturday."'),
    "thinking_no_end_tag_L3": ("D9", '"Let us split the bill and fix it on Saturday."'),
    "thinking_cut_before_response": ("D9", None),
    "thinking_end_tag_only": ("D9", None),
    "baseline_one_quote": ("D26", '"let us"'),
    "reasoner_string": ("D10", '"Fine by me."'),
}


@pytest.mark.parametrize("case", cases("answer_extract"))
def test_golden_spoken_words(case: dict[str, Any]) -> None:
    output = case["raw_model_output"]
    # A reasoning API hands over (content, hidden reasoning); only the content reaches this function.
    text = output[0] if isinstance(output, list) else output
    spoken = spoken_text(text, thinking=case["thinking"] and not case["baseline"])
    if case["name"] in SPOKEN_DIFFERENTLY:
        _, ours = SPOKEN_DIFFERENTLY[case["name"]]
        assert spoken == ours != case["expected_spoken"]
    else:
        assert spoken == case["expected_spoken"]


def test_every_difference_names_a_vector() -> None:
    names = {case.values[0]["name"] for case in cases("answer_extract")}
    assert set(SPOKEN_DIFFERENTLY) <= names


DRAFT = "Thinking Level: 2\n<|begin_of_thinking|>\nIntent:\nx\n\nResponse:\n"


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        pytest.param(LEVEL_2[: LEVEL_2.index("me.")], '"response text"', id="answer cut, draft complete"),
        pytest.param(LEVEL_1[: LEVEL_1.index("by")], None, id="answer cut, no draft"),
        pytest.param(LEVEL_2[: LEVEL_2.index("<|end_of_thinking")], None, id="cut before the draft is over"),
        pytest.param(LEVEL_2[: LEVEL_2.index("response text")], None, id="cut before the draft"),
        pytest.param(LEVEL_2[: LEVEL_2.index("text\n<|end_of_thinking")], None, id="cut inside the draft"),
        pytest.param(LEVEL_2[: LEVEL_2.index("|end_of_thinking")], '"response text"', id="cut at the first sign after it"),
        pytest.param(DRAFT + "I would never tell her that I se", None, id="draft cut inside a word"),
        pytest.param(DRAFT + "I agree. I would never tell her that I se", None, id="draft cut inside its second sentence"),
        pytest.param(DRAFT + 'I agree, as I said: "Yes!"', '"I agree, as I said: "Yes!"', id="draft ends with its sentence"),
        pytest.param(DRAFT + "Hello\n\nStyle:\nmanipulate him", '"Hello"', id="heading after the draft"),
        pytest.param(DRAFT + "Hello\nStyle: manipulate him", '"Hello"', id="heading and text on one line after it"),
        pytest.param(DRAFT + "Hello\n\nSty", None, id="draft cut inside the heading after it"),
        pytest.param(DRAFT.replace("\n", "\r\n") + "Hello.\r\n\r\nStyle:\r\ncold", '"Hello."', id="other line breaks"),
        pytest.param(LEVEL_1.replace("Fine", "Fine\n\nStyle:\ncold"), None, id="heading inside the answer"),
        pytest.param("Thinking Level: 3", None, id="level line only"),
        pytest.param("Intent:\nwin\n\nStyle:\ncold", None, id="sections without tags"),
        pytest.param('Thinking Level: 1\n<|begin_of_answer|>\n"Hi', None, id="open quotation"),
        pytest.param(LEVEL_1.replace("Fine", "<|begin_of_thinking|>"), None, id="tag inside the answer"),
        pytest.param("I see.\nI agree.", '"I agree."', id="plain text"),
    ],
)
def test_thinking_is_never_spoken(text: str, spoken: str | None) -> None:
    assert spoken_text(text) == spoken


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ('let us"', '"let us"'),
        ('She said "let us', '"let us"'),
        ("Thinking Level: 1\nhello", None),
        ("<|begin_of_answer|>", None),
        ('Thinking Level: 2\n<|begin_of_thinking|>\nIntent:\nHe said "no" and I will make him pay', None),
        ('Thinking Level: 2\n<|begin_of_thinking|>\nIntent:\nHe will "lie" and "cheat"', None),
        ('Intent:\nHe will "lie" and "cheat"', None),
        ('He will "lie" and\u2028Intent:\u2028"cheat"', None),
        ('He will "lie" <|begin_of_th', None),
        (LEVEL_2.replace("intent text", 'He said "no"'), ANSWER),
    ],
)
def test_plain_speakers(text: str, spoken: str | None) -> None:
    assert spoken_text(text, thinking=False) == spoken


@given(st.integers(len("Thinking Level:"), 400), st.sampled_from(sorted(MODES)), st.booleans())
def test_a_reply_cut_anywhere_speaks_its_draft_its_answer_or_nothing(end: int, mode: int, thinking: bool) -> None:
    spoken = spoken_text(reply(mode)[:end], thinking)
    assert spoken in {None, ANSWER, '"response text"'}


def test_every_kind_of_line_break_becomes_a_blank() -> None:
    assert one_line("a \n\n b\rc\r\nd\ve\ff\x1cg\x85h\u2028i\u2029 two  blanks") == "a b c d e f g h i two  blanks"
