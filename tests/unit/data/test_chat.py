import pytest

from nemo_ampo.data.chat import PROMPT_DATE, build_messages, check_tokenizer, encode_prompt
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
