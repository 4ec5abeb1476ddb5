import json

import pytest

from nemo_ampo.data.bc import (
    BcRow,
    encode_bc_row,
    encode_bc_rows,
    encode_prompt,
    read_bc_rows,
    system_prompt_of,
)
from nemo_ampo.data.episodes import chat_messages
from nemo_ampo.errors import DataError
from nemo_ampo.types import DialogueTurn


def write(path, rows):
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows))
    return path


def row(output, **changes):
    return {"system": "Choose a level.", "instruction": "Say hello.", "input": "", "output": output} | changes


@pytest.mark.parametrize("name", ["bc.json", "bc.jsonl"])
def test_rows_are_read_with_their_modes(tmp_path, name, mode_1, mode_2):
    path = write(tmp_path / name, [row(mode_1), row(mode_2, system="", input="It rains.")])
    first, second = read_bc_rows(path)
    word = "line" if name.endswith("l") else "row"
    assert first == BcRow(f"{path}, {word} 1", "Choose a level.", "Say hello.", "", mode_1, mode=1)
    assert (second.mode, second.system, second.user) == (2, None, "Say hello.\nIt rains.")
    assert first.messages == [
        {"role": "system", "content": "Choose a level."},
        {"role": "user", "content": "Say hello."},
    ]
    assert second.messages == [{"role": "user", "content": "Say hello.\nIt rains."}]


def test_system_and_input_may_be_absent(tmp_path, mode_1):
    (only,) = read_bc_rows(write(tmp_path / "bc.json", [{"instruction": "Hi", "output": mode_1}]))
    assert (only.system, only.input, only.user) == (None, "", "Hi")


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"instruction": " "}, "instruction", "is blank"),
        ({"instruction": None}, "instruction", "is missing"),
        ({"output": 3}, "output", "expected a string"),
        ({"output": ""}, "output", "is blank"),
        ({"input": 3}, "input", "expected a string"),
        ({"system": ["x"]}, "system", "expected a string"),
        ({"sytem": "x"}, "sytem", "unknown field"),
    ],
)
def test_a_bad_field_is_named(tmp_path, mode_1, changes, field, problem):
    path = write(tmp_path / "bc.jsonl", [row(mode_1), {**row(mode_1), **changes}])
    with pytest.raises(DataError, match=rf"bc\.jsonl, line 2, field '{field}': .*{problem}"):
        read_bc_rows(path)


def test_replies_that_break_the_grammar_are_all_listed_with_their_rules(tmp_path, mode_1, mode_2):
    rows = [
        row("hello"),
        row(mode_1),
        row(mode_1.replace('"', "")),
        row(mode_2.replace("Style:\n", "")),
    ]
    with pytest.raises(DataError) as error:
        read_bc_rows(write(tmp_path / "bc.jsonl", rows))
    summary, *lines = str(error.value).split("\n  ")
    assert summary.endswith("bc.jsonl: 3 replies break the grammar")
    found = [(line.split(", ")[1], line.split("rule '")[1].split("'")[0]) for line in lines]
    assert found == [("line 1", "level"), ("line 3", "answer"), ("line 4", "sections")]


def test_a_long_list_of_broken_replies_is_cut(tmp_path):
    with pytest.raises(DataError) as error:
        read_bc_rows(write(tmp_path / "bc.json", [row("hello")] * 23))
    lines = str(error.value).split("\n  ")
    assert len(lines) == 22 and "23 replies" in lines[0] and lines[-1] == "... and 3 more"


def test_the_system_prompt_is_one_for_all(tmp_path, mode_1):
    def rows(*systems):
        return read_bc_rows(write(tmp_path / "bc.json", [row(mode_1, system=s) for s in systems]))

    assert system_prompt_of(rows("A", "A")) == "A"
    assert system_prompt_of(rows("", None)) is None
    assert system_prompt_of([]) is None
    for systems in (("A", "A", "B"), ("A", "A", None)):
        with pytest.raises(DataError, match=r"row 1 and .*row 3, field 'system': 2 different"):
            system_prompt_of(rows(*systems))


def test_tokens_are_prompt_reply_and_end(tmp_path, tokenizer, mode_1, mode_2):
    rows = read_bc_rows(write(tmp_path / "bc.json", [row(mode_1), row(mode_2, input="It rains.")]))
    for one in rows:
        example = encode_bc_row(one, tokenizer, max_len=2000)
        prompt, reply = example.tokens[: example.prompt_len], example.tokens[example.prompt_len :]
        assert list(prompt) == encode_prompt(one.messages, tokenizer)
        assert reply[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in reply[:-1]
        assert tokenizer.decode(reply, skip_special_tokens=True) == one.output
        assert (example.mode, example.row_id) == (one.mode, one.row_id)


def test_cloning_and_rl_build_the_same_prompt_tokens(tokenizer, tmp_path, mode_1):
    # The authors trained Llama on one prompt and sampled from another.
    (one,) = read_bc_rows(write(tmp_path / "bc.json", [row(mode_1)]))
    turn = DialogueTurn("r", ("Turn 0: A said:",), 0, one.user, "A", "B", "g", "h", 5.0, 5.0)
    rl = encode_prompt(chat_messages(turn, default_system=one.system), tokenizer)
    example = encode_bc_row(one, tokenizer, max_len=2000)
    assert list(example.tokens[: example.prompt_len]) == rl


def test_the_prompt_does_not_merge_with_the_reply(tiny_tokenizer, tmp_path, mode_2):
    # The prompt ends in a line feed, this reply begins with two, and the vocabulary has a token for several.
    (one,) = read_bc_rows(write(tmp_path / "bc.json", [row("\n\n" + mode_2)]))
    example = encode_bc_row(one, tiny_tokenizer, 2000)
    prompt = encode_prompt(one.messages, tiny_tokenizer)
    assert list(example.tokens[: example.prompt_len]) == prompt
    joint = tiny_tokenizer.encode(tiny_tokenizer.decode(prompt) + one.output)
    assert joint[: len(prompt)] != prompt


def test_a_too_long_row_is_an_error_or_dropped_by_name(tmp_path, tiny_tokenizer, mode_1, mode_2):
    path = write(tmp_path / "bc.json", [row(mode_1), row(mode_2)])
    rows = read_bc_rows(path)
    short, long = (len(encode_bc_row(r, tiny_tokenizer, 2000).tokens) for r in rows)
    assert short < long
    assert len(encode_bc_row(rows[1], tiny_tokenizer, long).tokens) == long  # the limit itself is allowed
    with pytest.raises(
        DataError,
        match=rf"row 2: {long} tokens \(\d+ of them prompt\) exceed data.max_tokens={long - 1}; .*data.on_too_long=drop",
    ):
        encode_bc_row(rows[1], tiny_tokenizer, long - 1)
    with pytest.raises(DataError, match="row 2"):
        encode_bc_rows(rows, tiny_tokenizer, long - 1)
    kept = encode_bc_rows(rows, tiny_tokenizer, long - 1, on_too_long="drop")
    assert [e.row_id for e in kept.examples] == [f"{path}, row 1"] and kept.dropped == (f"{path}, row 2",)
    assert encode_bc_rows(rows, tiny_tokenizer, long).dropped == ()
    with pytest.raises(DataError, match=r"all 2 rows are longer than data\.max_tokens=5"):
        encode_bc_rows(rows, tiny_tokenizer, 5, on_too_long="drop")


@pytest.mark.parametrize("token", ["<|im_end|>", "<|other|>"])
def test_a_reply_that_spells_a_special_token_is_refused(tmp_path, tiny_tokenizer, mode_1, token):
    (one,) = read_bc_rows(write(tmp_path / "bc.json", [row(mode_1.replace("Ada", f"Ada{token}"))]))
    with pytest.raises(DataError, match=r"row 1, field 'output': holds the tokenizer's special token '<\|"):
        encode_bc_row(one, tiny_tokenizer, 2000)
