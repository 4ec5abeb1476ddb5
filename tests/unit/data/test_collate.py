import pytest
import torch

from nemo_ampo.data.bc import BcExample, encode_bc_rows, read_bc_rows
from nemo_ampo.data.collate import BcDataset, collate_bc, whole_rows
from nemo_ampo.errors import ConfigError, DataError

PAD = 99
LONG = BcExample("a", tokens=(10, 11, 12, 20, 21, 2), prompt_len=3, mode=3)
SHORT = BcExample("b", tokens=(10, 30, 2), prompt_len=1, mode=1)


def test_items_are_unpadded_tensors():
    data = BcDataset([LONG, SHORT])
    assert len(data) == 2
    assert data[0]["tokens"].tolist() == [10, 11, 12, 20, 21, 2] and data[0]["tokens"].dtype == torch.int64
    assert (int(data[1]["prompt_len"]), int(data[1]["mode"])) == (1, 1)


def test_a_batch_worked_by_hand():
    data = BcDataset([LONG, SHORT])
    batch = collate_bc([data[0], data[1]], pad_id=PAD, seq_multiple=4)
    assert batch["tokens"].tolist() == [
        [10, 11, 12, 20, 21, PAD, PAD, PAD],
        [10, 30, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    assert batch["labels"].tolist() == [
        [11, 12, 20, 21, 2, PAD, PAD, PAD],
        [30, 2, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    # position 2 (the last of the prompt) predicts 20, position 4 predicts the end token
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert batch["loss_mask"].dtype == torch.float32
    assert batch["position_ids"].tolist() == [list(range(8))] * 2
    assert batch["modes"].tolist() == [3, 1]
    # What is scored is what is learned: at each position of the mask, its label.
    whole = whole_rows(batch["tokens"], batch["labels"])
    assert whole[:, :6].tolist() == [[10, 11, 12, 20, 21, 2], [10, 30, 2, PAD, PAD, PAD]]
    assert whole[:, 1:].tolist() == batch["labels"].tolist()


def test_an_end_token_used_as_padding_is_still_trained_once():
    # With pad = eos (SmolLM2, Llama) a mask made from the token ids would lose the end of every reply.
    batch = collate_bc([BcDataset([LONG])[0]], pad_id=2, seq_multiple=8)
    trained = batch["labels"][batch["loss_mask"].bool()]
    assert trained.tolist() == [20, 21, 2]


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (2, 6), (5, 5), (8, 8)])
def test_the_width_is_the_next_multiple(multiple, width):
    batch = collate_bc([BcDataset([LONG])[0]], pad_id=PAD, seq_multiple=multiple)
    assert batch["tokens"].shape == (1, width)


def test_the_limit_holds():
    item = BcDataset([LONG])[0]
    assert collate_bc([item], pad_id=PAD, seq_multiple=1, max_len=5)["tokens"].shape == (1, 5)
    with pytest.raises(DataError, match="fills 5 positions, the limit is 4"):
        collate_bc([item], pad_id=PAD, seq_multiple=1, max_len=4)
    with pytest.raises(ConfigError, match="max_len 12 must be a multiple of seq_multiple 8"):
        collate_bc([item], pad_id=PAD, seq_multiple=8, max_len=12)


def test_masked_labels_of_real_rows_spell_the_replies(tmp_path, tokenizer, mode_1, mode_2):
    import json

    path = tmp_path / "bc.json"
    path.write_text(json.dumps([{"instruction": "Speak.", "output": o} for o in (mode_1, mode_2)]))
    data = BcDataset(encode_bc_rows(read_bc_rows(path), tokenizer, max_len=1024).examples)
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, collate_fn=lambda items: collate_bc(items, pad_id=tokenizer.eos_token_id)
    )
    (batch,) = loader
    for row, output in enumerate((mode_1, mode_2)):
        reply = batch["labels"][row][batch["loss_mask"][row].bool()].tolist()
        assert reply[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(reply[:-1]) == output
