from __future__ import annotations

from dataclasses import replace

from nemo_ampo.model_folder.facts import facts_of
from nemo_ampo.rehearse.sizes import MODELS, parameters_of, parameters_on, state_bytes


def test_published_parameter_counts() -> None:
    assert parameters_of(MODELS["smollm2_135m"]) == 134_515_008
    # Qwen2.5-7B has 7,615,616,512 with its 152,064 rows; Llama-3.1-8B 8,030,261,248; Llama-3.1-70B 70,553,706,496.
    assert parameters_of(MODELS["qwen2.5_7b"]) == 7_615_616_512
    assert parameters_of(MODELS["llama3.1_8b"]) == 8_030_261_248
    assert parameters_of(MODELS["llama3.1_70b"]) == 70_553_706_496


def test_a_small_model_counted_by_hand() -> None:
    facts = replace(
        facts_of(
            {
                "model_type": "qwen2",
                "num_hidden_layers": 2,
                "hidden_size": 4,
                "intermediate_size": 6,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": 128,
                "max_position_embeddings": 64,
            }
        ),
        tied=False,
    )
    layer = (8 * 4 + 8) + 4 * 4 + 3 * 4 * 6 + 2 * 4  # qkv with bias, projection, MLP, two norms
    table = 128 * 4
    assert parameters_of(facts) == 2 * layer + 2 * table + 4
    assert parameters_of(replace(facts, tied=True)) == 2 * layer + table + 4
    # Two stages: the first has the embedding, the last the output layer (of a tied model, its copy) and the norm.
    assert parameters_on(facts, 0, 1, 2) == layer + table
    for tied in (False, True):
        assert parameters_on(replace(facts, tied=tied), 1, 1, 2) == layer + table + 4
    # Tensor parallelism splits matrices and biases, not norms.
    assert parameters_on(facts, 0, 2, 1) == 2 * ((layer - 8) // 2 + 8) + table + 4


def test_bytes_per_parameter() -> None:
    assert state_bytes(1000, half=True, data=4) == (2000, 4000, 12 * 1000 / 4)
    assert state_bytes(1000, half=False, data=1) == (4000, 4000, 8000)
