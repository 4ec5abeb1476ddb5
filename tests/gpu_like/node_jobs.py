"""Run with two ranks, TP=2 with sequence parallelism, bf16: what a GPU node's model does, with and without each fix."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch


def main(folder: Path) -> None:
    from nemo_ampo import compat

    compat.setup("gpu")
    result: dict[str, Any] = {}
    with without(*UNDO["extra_states"]()):
        result["extra_states_undone"] = outcome(lambda: open_model(folder))
    session = open_model(folder)
    result["classes"] = classes(session.model)
    g = torch.Generator().manual_seed(0)
    lengths = (32, 33, 7)
    rows = {n: torch.randint(3, 500, (2, n), generator=g) for n in lengths}
    result["logprobs"] = [logprobs(session, rows[n]).tolist() for n in lengths]
    result["oracle"] = [oracle(folder / "hf", rows[n]).tolist() for n in lengths]
    result["scatters"] = scatters(session.model)
    with without(*UNDO["embeddings"]()):
        result["embeddings_undone"] = [outcome(lambda n=n: logprobs(session, rows[n])) for n in lengths]  # type: ignore[misc]
    session.model._restore_sequence_parallelism_args()
    result["gradients"] = gradients(session)
    result["generated"] = generate(session)
    with without(*UNDO["cache"]()):
        result["cache_undone"] = outcome(lambda: generate(session))
    for name in ("saved", "saved_undone"):
        with without(*UNDO["synchronise"]()) if name == "saved_undone" else contextlib.nullcontext():
            result[name] = save(session, folder / name)
            result[f"{name}_verified"] = outcome(lambda n=name: verify(session, folder / n))  # type: ignore[misc]
    result["tensorrt_llm"] = "tensorrt_llm" in sys.modules
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(result))


def open_model(folder: Path) -> Any:
    from nemo_ampo.checkpoint.nemo_file import unpack_assets
    from nemo_ampo.config.compose import compose
    from nemo_ampo.training.actor import AmpoActor
    from nemo_ampo.training.session import open_session, prepare_config

    nemo = str(folder / "model.nemo")
    overrides = [
        *("trainer.precision=bf16", "model.megatron_amp_O2=true", "model.tensor_model_parallel_size=2"),
        *("model.sequence_parallel=true", "model.activations_checkpoint_granularity=selective"),
        *("model.global_batch_size=8", "model.micro_batch_size=2"),
    ]
    cfg = compose("ampo", "tiny", overrides)
    prepare_config(cfg, folder / "run", nemo, unpack_assets(nemo, folder / "assets"), "gpu")
    return open_session(cfg, "reinforce", AmpoActor, nemo, 8, keep_reference=False)


def classes(model: Any) -> list[str]:
    (module,) = model.get_model_module_list()
    layer = module.decoder.layers[0]
    parts = (layer.self_attention, layer.self_attention.core_attention, layer.self_attention.linear_qkv, layer.mlp)
    names = {type(part).__name__ for part in (*parts, module.decoder.final_layernorm)}
    return sorted(names | {str(p.dtype) for p in module.parameters()})


def logprobs(session: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    from nemo_ampo.megatron.forward import token_logprobs

    return token_logprobs(session.model, tokens_BT, torch.ones_like(tokens_BT[:, 1:], dtype=torch.bool), 2).cpu()


def oracle(hf: Path, tokens_BT: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(hf).eval()(tokens_BT).logits[:, :-1].float()
    return torch.log_softmax(logits, -1).gather(-1, tokens_BT[:, 1:, None])[..., 0]


def gradients(session: Any) -> dict[str, float]:
    """Of the update, by whether the output layer sees a few positions or all; the largest element and difference."""
    from nemo_ampo.algo.algorithm import AlgorithmConfig
    from nemo_ampo.megatron.vocab_parallel import next_token_logits
    from nemo_ampo.training import actor

    def of_all_positions(model: Any, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        logits_NV: torch.Tensor = next_token_logits(model, tokens_BT, torch.ones_like(mask_BT))
        return logits_NV.view(*mask_BT.shape, -1)[mask_BT]

    g = torch.Generator().manual_seed(2)
    batch = {
        "tokens_BT": torch.randint(3, 500, (8, 32), generator=g),
        "mask_BT": torch.arange(31).expand(8, 31) >= 20,
        **{name: torch.randn(8, 31, generator=g) for name in ("advantages_BT", "old_logprobs_BT", "ref_logprobs_BT")},
    }
    model, found = session.model, []
    model.algorithm = AlgorithmConfig(aggregate_over="batch")  # type: ignore[arg-type]
    model.prepare_for_training()
    for function in (next_token_logits, of_all_positions):
        with mock.patch.object(actor, "next_token_logits", function):
            session.optimizer.zero_grad()
            model.prepare_for_training_step()
            model.get_loss_and_metrics(batch=dict(batch), forward_only=False)
            model.finish_training_step()
            torch.cuda.synchronize()
            found.append(torch.cat([p.main_grad.double().flatten() for p in model.parameters()]))
    session.optimizer.zero_grad()
    return {"largest": float(found[1].abs().max()), "gap": float((found[0] - found[1]).abs().max())}


def scatters(model: Any) -> list[bool]:
    """Whether training scatters embeddings, after a pass without gradients."""
    (module,) = model.get_model_module_list()
    return [part.reduce_scatter_embeddings for part in module.modules() if hasattr(part, "reduce_scatter_embeddings")]


def generate(session: Any) -> list[float]:
    """Prompts of unequal lengths, each in a prefill pass of its own: the shorter leave columns of their cache unwritten."""
    from nemo_ampo.rollout import megatron
    from nemo_ampo.rollout.engine import Request, SamplingSpec
    from nemo_ampo.rollout.packing import pack

    g = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(3, 500, (n,), generator=g).tolist()) for n in (40, 12, 9)]
    requests = [Request(i, prompt, i) for i, prompt in enumerate(prompts)]
    with mock.patch.dict(megatron._PREFILL_TOKENS, {"cpu": 32, "cuda": 32}):
        responses = megatron.MegatronEngine(session.model, 8).generate(requests, SamplingSpec(6, (256,)))
    packed = pack(requests, responses, pad_id=0)
    gap = (packed.sampling_logprobs_BT - logprobs(session, packed.tokens_BT)).abs()[packed.mask_BT]
    return [len(gap), float(gap.max())]


def save(session: Any, folder: Path) -> int:
    """Weights that are not finite in a checkpoint as it lies on the disk."""
    from nemo_ampo.checkpoint.sharded_files import write_shards

    write_shards(session.model.sharded_state_dict(), folder)
    torch.cuda.synchronize()
    return damaged_tensors(folder)


def verify(session: Any, folder: Path) -> None:
    from nemo_ampo.checkpoint.sharded_files import verify_shards

    verify_shards(session.model.sharded_state_dict(), folder)


def damaged_tensors(folder: Path) -> int:
    from torch.distributed import checkpoint

    reader = checkpoint.FileSystemReader(str(folder))
    state = {
        key: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    checkpoint.load_state_dict(state, storage_reader=reader, no_dist=True)
    assert state
    return sum(not bool(tensor.isfinite().all()) for tensor in state.values())


def outcome(work: Callable[[], Any]) -> str:
    """How it failed; empty if it did not."""
    try:
        work()
    except BaseException as error:  # torch.distributed.checkpoint raises one
        return f"{type(error).__name__}: {error}"
    return ""


# --- one fix taken away -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without(*patches: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _extra_states() -> list[Any]:
    from megatron.core import dist_checkpointing

    return [mock.patch.object(dist_checkpointing, "load", dist_checkpointing.load.__wrapped__)]


def _embeddings() -> list[Any]:
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

    names = ("_reset_sequence_parallelism_args", "_restore_sequence_parallelism_args")
    return [mock.patch.object(MegatronGPTModel, name, getattr(MegatronGPTModel, name).__wrapped__) for name in names]


def _cache() -> list[Any]:
    from nemo_ampo.rollout import megatron

    return [mock.patch.object(megatron, "_zeros_for_cache", lambda allocate, *shape: allocate(*shape))]


def _synchronise() -> list[Any]:
    from nemo_ampo.checkpoint import sharded_files

    return [mock.patch.object(sharded_files, "device_is_done", lambda: None)]


UNDO: dict[str, Callable[[], list[Any]]] = {
    "extra_states": _extra_states,
    "embeddings": _embeddings,
    "cache": _cache,
    "synchronise": _synchronise,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
