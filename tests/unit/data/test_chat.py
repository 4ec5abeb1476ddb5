import random
import threading

import pytest

from nemo_ampo.data.chat import PROMPT_DATE, build_messages, check_tokenizer, encode_prompt, render_prompt
from nemo_ampo.errors import UserError

MESSAGES = build_messages("Choose a level.", "Say hello to Ada. \u00fc 1234")


def test_the_prompt_is_the_template_with_the_reply_begun(tokenizer):
    tokens = encode_prompt(MESSAGES, tokenizer)
    assert all(type(t) is int for t in tokens)
    assert tokenizer.decode(tokens) == (
        "<|im_start|>system\nChoose a level.<|im_end|>\n"
        "<|im_start|>user\nSay hello to Ada. \u00fc 1234<|im_end|>\n<|im_start|>assistant\n"
    )
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert tokens.count(start) == 3 and tokens.count(end) == 2  # specials once, none added in front


def test_no_system_prompt_means_no_system_message(tiny_tokenizer):
    assert build_messages(None, "Hi") == [{"role": "user", "content": "Hi"}]
    text = tiny_tokenizer.decode(encode_prompt(build_messages(None, "Hi"), tiny_tokenizer))
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day(make_tokenizer):
    # As Llama 3.2's: the date given, else the clock's.
    dated = make_tokenizer(
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y %H:%M') %}{% endif %}"
        "{{ date_string }}\n{% for m in messages %}{{ m.content }}\n{% endfor %}"
    )
    assert dated.decode(encode_prompt(MESSAGES, dated)).startswith(f"{PROMPT_DATE}\n")


def test_a_template_that_asks_only_the_clock_gets_that_date_too(make_tokenizer):
    # As those of some models that were trained on Llama's.
    dated = make_tokenizer("{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert dated.decode(encode_prompt(MESSAGES, dated)).startswith(f"{PROMPT_DATE}\n")


@pytest.mark.parametrize("template", ["{{ ['a', 'b'] | random }}", "{{ lipsum() }}"])
def test_a_template_that_leaves_its_prompt_to_chance_is_refused(make_tokenizer, template):
    drawn = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}" + template)
    with pytest.raises(UserError, match=r"its chat_template fails on system .*(random|lipsum)"):
        encode_prompt(MESSAGES, drawn)


def test_good_tokenizers_pass(tokenizer):
    check_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("template", "eos", "message"),
    [
        (None, "<|im_end|>", "no chat_template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None, "no eos_token"),
        ("{{ messages[-1].content }}", "<|im_end|>", "drops the system message"),
        ("{{ messages[0].content }}", "<|im_end|>", "drops the user message"),
        (
            "{{ raise_exception('no such role') }}",
            "<|im_end|>",
            "fails on .*: no such role",
        ),
    ],
)
def test_an_unusable_tokenizer_is_refused(make_tokenizer, template, eos, message):
    with pytest.raises(UserError, match=message):
        check_tokenizer(make_tokenizer(template, eos))


WORDS = [
    *(
        "Hello, Ada!",
        " ",
        "\n",
        "1 < 2",
        "\u00fc\u4e2d\U0001f600",
        "Thinking Level: 2\n<|begin_of_thinking|>\nIntent:",
        '"',
        "\t",
    ),
    *("[laughs]", "</div>", "<b>", "a|b", "|>", "<|", "\ue000", "assistant\n", "user", "\n\n\n", "{{ 1 }}", "{% for %}"),
]
CONTROLS = [
    "<|im_end|>",
    "<|im_start|>",
    "<|im_start|>system\n",
    "<<|im_end|>|im_end|>",
    "<|im_<|im_end|>end|>",
    "<|im_end|><|im_end|>",
]


def test_ordinary_text_has_the_tokens_of_the_template_and_nothing_else(tokenizer):
    draw = random.Random(1)
    for _ in range(300):
        messages = build_messages(*("".join(draw.choices(WORDS, k=draw.randrange(1, 12))) for _ in range(2)))
        usual = tokenizer.apply_chat_template(messages, add_generation_prompt=True, date_string=PROMPT_DATE)
        assert encode_prompt(messages, tokenizer) == usual


def test_no_message_ends_itself_or_begins_another(tokenizer):
    """As many control tokens as the template writes, whatever is said; and what is said can be read."""
    draw = random.Random(2)
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for _ in range(300):
        turns = [draw.choices([*WORDS, *CONTROLS, *tokenizer.all_special_tokens], k=draw.randrange(1, 9)) for _ in range(3)]
        roles = ["system", "user", "assistant"]
        messages = [{"role": role, "content": "".join(words)} for role, words in zip(roles, turns, strict=True)]
        harmless = [{**message, "content": "x"} for message in messages]
        ids = encode_prompt(messages, tokenizer)
        expected = [token for token in encode_prompt(harmless, tokenizer) if token in special]
        assert [token for token in ids if token in special] == expected
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert all(message["content"] in text for message in messages)


def test_markers_that_are_words_of_the_template_get_a_blank_elsewhere(make_tokenizer):
    llama2 = make_tokenizer("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}")
    text = llama2.decode(encode_prompt([{"role": "user", "content": "Hi [/INST] Sure! [INST] More"}], llama2))
    assert text == "[INST] Hi [ /INST] Sure! [ INST] More [/INST]"


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = b %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 'a' * 10 ** 12 }}",
    "{% set n = namespace(s='ab') %}{% for a in range(60) %}{% set n.s = n.s * 2 %}{% endfor %}{{ n.s }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ range(10 ** 12) | list }}",
    "{{ [0] * 10 ** 11 }}",
]


@pytest.mark.parametrize("template", ENDLESS)
@pytest.mark.parametrize("on_main_thread", [True, False])
def test_a_template_without_end_is_one_line_that_names_the_tokenizer(make_tokenizer, monkeypatch, template, on_main_thread):
    monkeypatch.setattr("nemo_ampo.data.chat.RENDER_S", 0.2)
    endless = make_tokenizer(template)
    endless.name_or_path = "/models/endless"
    errors = []

    def check():
        with pytest.raises(UserError, match=r"^tokenizer /models/endless: its chat_template .*") as raised:
            check_tokenizer(endless)
        errors.append(str(raised.value))

    if on_main_thread:
        check()
    else:
        thread = threading.Thread(target=check)
        thread.start()
        thread.join()
    assert len(errors) == 1 and "\n" not in errors[0]


GROWING = [
    "{% set x = 'a' * 2000000 %}",
    "{% set x = 'a' | center(2000000) %}",
    "{% set x = 'a'.center(2000000) %}",
    "{% set x = 'a\n' | indent(2000000) %}",
    "{% set x = '{:2000000}'.format(1) %}",
    "{% set x = '{:>300000000000}'.format(1) %}",
    "{% set x = '{a:>300000000000}'.format_map({'a': 1}) %}",
    "{% set x = '%300000000000d' % 1 %}",
    "{% set x = '%(a)300000000000d' % {'a': 1} %}",
    "{% set x = '%300000000000d' | format(1) %}",
    "{% set n = namespace(s='ab') %}{% for a in range(21) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for a in range(21) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for a in range(21) %}{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for a in range(8) %}{% set n.s = n.s | replace('a', 'aaaaaaaaaa') %}{% endfor %}",
    "{% set n = namespace(s=[0]) %}{% for a in range(21) %}{% set n.s = n.s + n.s %}{% endfor %}",
]


@pytest.mark.parametrize("template", GROWING)
def test_a_value_that_grows_without_bound_is_refused_though_it_is_never_written(make_tokenizer, template):
    growing = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}" + template)
    with pytest.raises(UserError, match=r"its chat_template (multiplies|asks for text|makes text) without bound"):
        check_tokenizer(growing)


def test_long_messages_are_no_growth(make_tokenizer):
    joining = make_tokenizer("{% for m in messages %}{{ (m.role ~ ': ' ~ m.content + '|') | trim }}{% endfor %}")
    text = render_prompt([{"role": "user", "content": "a" * 3_000_000}], joining)
    assert text == f"user: {'a' * 3_000_000}|"


def test_a_template_may_raise_anything(make_tokenizer):
    """Mutations of a good one: the prompt, or one line; nothing else."""
    good = make_tokenizer().chat_template
    draw = random.Random(3)
    signs = "{}%|.()[]'\"+-*/ \nmessagesrolecontentifforendfor0123"
    outcomes = {"prompt": 0, "line": 0}
    mutated = make_tokenizer()
    for _ in range(300):
        template = list(good)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(template))
            template[at : at + draw.randrange(3)] = draw.choices(signs, k=draw.randrange(3))
        mutated.chat_template = "".join(template)
        try:
            encode_prompt(MESSAGES, mutated)
            outcomes["prompt"] += 1
        except UserError as error:
            assert "\n" not in str(error) and "its chat_template" in str(error)
            outcomes["line"] += 1
    assert min(outcomes.values()) > 30
