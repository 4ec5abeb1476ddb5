"""One converted file, every parallel layout: NeMo-Aligner's own loading, log-probs against transformers.

One process converts, and then forks the ranks of each layout in turn; the ranks see the environment that torchrun would
give them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from forking import fork, fork_ranks
from nemo_process import run_nemo

CASES = {
    "llama-untied": ("llama", False, {}),
    "llama-tied": ("llama", True, {}),
    "qwen2-untied": ("qwen2", False, {}),
    "qwen2-tied": ("qwen2", True, {}),
}
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))
"""Tensor- and pipeline-parallel sizes."""
NUM_PROMPTS, PROMPT_TOKENS = 2, 300
"""Long enough for the llama3 rope scaling (256 original positions) to matter."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("layouts")
    finished = run_nemo([__file__, folder])
    assert finished.status == 0, finished.out[-4000:] + finished.err[-8000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_log_probs_equal_transformers(results: dict[str, Any], case: str, tp: int, pp: int) -> None:
    ranks = results[f"{case} tp{tp} pp{pp}"]
    assert len(ranks) == tp * pp
    for rank in ranks:
        # As Aligner restores it, padded rows are tokens with logit 0; with the mask it is exactly HF's model.
        assert rank["as_restored"] < 1e-4
        assert rank["padding_masked"] < 1e-4
        assert rank["sft_weights_equal"]


@pytest.mark.slow
def test_padding_is_visible_without_the_mask(results: dict[str, Any]) -> None:
    assert results["effect of padding"] > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_saved_on_four_ranks_is_the_same_model(results: dict[str, Any], case: str) -> None:
    saved = results[f"{case} saved tp2 pp2"]
    assert saved["checks"] == [True, True, True]
    assert saved["left_beside_it"] == []


# --- the process that imports NeMo --------------------------------------------------------------------------


def run_all(folder: Path) -> dict[str, Any]:
    from nemo_ampo.compat import setup

    setup("cpu")
    import nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor  # noqa: F401 - imported once, before the forks

    for case, (family, tied, changes) in CASES.items():
        _in_fork(folder, _convert, case, family, tied, changes)
    results: dict[str, Any] = {}
    for tp, pp in LAYOUTS:
        _launch(folder, tp, pp)
        for case in CASES:
            results[f"{case} tp{tp} pp{pp}"] = [
                json.loads((folder / f"{case}-{tp}{pp}-{rank}.json").read_text()) for rank in range(tp * pp)
            ]
    results["effect of padding"] = json.loads((folder / "padding.json").read_text())
    results |= _check_saved(folder)
    return results


def _in_fork(folder: Path, function: Any, *args: Any) -> None:
    pid = fork(lambda: function(folder, *args))
    assert os.waitpid(pid, 0)[1] == 0, f"{function.__name__}{args} failed"


def _convert(folder: Path, case: str, family: str, tied: bool, changes: dict[str, Any]) -> None:
    import torch
    from tiny_hf import write_model
    from transformers import AutoModelForCausalLM

    from converters import hf_to_nemo

    hf = write_model(folder / case, family, tied, seed=len(case), **changes)
    status = hf_to_nemo.main(["--input", str(hf), "--output", str(folder / f"{case}.nemo"), "--no-verify"])
    assert status == 0
    model = AutoModelForCausalLM.from_pretrained(hf).eval()
    vocab = model.config.vocab_size
    tokens_BT = torch.randint(0, vocab, (NUM_PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits_BTV = model(tokens_BT).logits[:, :-1]
    padding = torch.zeros(*logits_BTV.shape[:-1], -vocab % 128)
    target = tokens_BT[:, 1:, None]
    torch.save(
        {
            "tokens": tokens_BT,
            "padding_masked": logits_BTV.log_softmax(-1).gather(-1, target)[..., 0],
            "as_restored": torch.cat((logits_BTV, padding), -1).log_softmax(-1).gather(-1, target)[..., 0],
        },
        folder / f"{case}.pt",
    )


def _launch(folder: Path, tp: int, pp: int) -> None:
    """Fork the ranks of one layout, wait for all, fail if one fails."""
    size = tp * pp
    statuses = [os.waitpid(pid, 0)[1] for pid in fork_ranks(lambda: _rank(folder, tp, pp, size), size)]
    assert statuses == [0] * size, f"tp{tp} pp{pp}: {statuses}"


def _rank(folder: Path, tp: int, pp: int, size: int) -> None:
    import torch

    from nemo_ampo.checkpoint.nemo_file import unpack_assets
    from nemo_ampo.checkpoint.nemo_writing import save_nemo
    from nemo_ampo.megatron.padding import mask_padded_vocab

    rank = int(os.environ["RANK"])
    for case in CASES:
        assets = unpack_assets(folder / f"{case}.nemo", folder / f"{case}-{tp}{pp}-assets")
        model, sft = _restore(folder / f"{case}.nemo", assets, tp, pp, size)
        expected = torch.load(folder / f"{case}.pt")
        model.prepare_for_inference()
        plain = model.get_inference_log_probs(expected["tokens"])
        mask_padded_vocab(model)
        masked = model.get_inference_log_probs(expected["tokens"])
        differences = {
            "as_restored": float((plain - expected["as_restored"]).abs().max()),
            "padding_masked": float((masked - expected["padding_masked"]).abs().max()),
            "sft_weights_equal": _same_weights(model, sft),
        }
        (folder / f"{case}-{tp}{pp}-{rank}.json").write_text(json.dumps(differences))
        if rank == 0:
            (folder / "padding.json").write_text(json.dumps(float((plain - masked).abs().max())))
        if (tp, pp) == (2, 2):
            save_nemo(model, folder / "saved" / f"{case}.nemo", assets)
    torch.distributed.barrier()


def _restore(nemo: Path, assets: Path, tp: int, pp: int, size: int) -> tuple[Any, Any]:
    """Aligner's REINFORCE actor and its SFT model from one file."""
    from lightning.pytorch import Trainer
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
    from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel
    from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
    from nemo_aligner.utils.train_script_utils import init_distributed
    from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo
    from omegaconf import OmegaConf

    from nemo_ampo.checkpoint.nemo_file import load_overrides

    trainer = Trainer(
        accelerator="cpu",
        devices=size,
        num_nodes=1,
        precision=32,
        strategy=NLPDDPStrategy(),
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    layout = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "reinforce": {
            "forward_micro_batch_size": NUM_PROMPTS,
            "offload_adam_states": False,
            "length_params": {"max_length": 8, "min_length": 1},
            "sampling_params": {"end_strings": ["<|im_end|>"]},
        },
    }
    overrides = OmegaConf.create(layout | load_overrides(nemo, assets))
    cfg = load_and_override_model_config(str(nemo), overrides)
    actor, sft = (
        load_from_nemo(model_class, cfg, trainer, strict=True, restore_path=str(nemo))
        for model_class in (MegatronGPTReinforceActorModel, GPTSFTModel)
    )
    init_distributed(trainer, actor, False)
    return actor, sft


def _same_weights(one: Any, other: Any) -> bool:
    a, b = (dict(m.get_model_module_list()[0].named_parameters()) for m in (one, other))
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def _check_saved(folder: Path) -> dict[str, Any]:
    from converters.verify import verify

    names = [f"{case}.nemo" for case in CASES]
    beside = sorted(p.name for p in (folder / "saved").iterdir() if p.name not in names)
    return {
        f"{case} saved tp2 pp2": {
            "checks": [c.passed for c in verify(folder / case, folder / "saved" / f"{case}.nemo", logits=False)],
            "left_beside_it": beside,
        }
        for case in CASES
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "results.json").write_text(json.dumps(run_all(out)))
