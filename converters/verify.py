"""Command: is a ``.nemo`` file the same model as a Hugging Face folder?

Four checks, all of them run and reported: every weight bit for bit after NeMo -> Hugging Face; every other file by
SHA-256; the architecture keys of the config; and logits in fp32 on a short and a long prompt, where a mapping
that is wrong in both directions, or a wrong rotary base, shows. Exit status 1 when one fails, with the worst
tensor's name. Weights are read where they lie, and both models compute with one layer in memory at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters import cli
from converters.hf_folder import HfFolder, asset_files, open_hf_folder
from converters.model_config import ARCHITECTURE_KEYS, first_difference, nemo_config
from converters.nemo_weights import NemoWeights, open_weights
from nemo_ampo.checkpoint.nemo_file import read_model_config, unpack_assets
from nemo_ampo.model_folder.loading import model_without_weights
from nemo_ampo.model_folder.portable import same_when_portable
from nemo_ampo.output.staging import place_with_room, scratch_folder
from nemo_ampo.overrides import typed_path

PROMPT_LENGTHS = (32, 512)
TOLERANCE = 1e-4
ASSETS_ROOM = 100_000_000
"""Bytes asked for before a model's files that are no weights are unpacked."""


@dataclass(frozen=True)
class Check:
    """Outcome of one check.

    Attributes:
        name: what was compared.
        passed: whether it held.
        worst: the tensor, file or config key that differs most; empty if none does.
        difference: size of the worst difference, in words.
    """

    name: str
    passed: bool
    worst: str = ""
    difference: str = ""


def shared_type(stored: torch.dtype, hf: torch.dtype) -> torch.dtype:
    """The type both sides can be compared in: Hugging Face's, unless NeMo's is narrower."""
    return hf if torch.promote_types(stored, hf) == stored else stored


def check_weights(hf: HfFolder, stored: NemoWeights) -> Check:
    """Every Hugging Face weight, against the one that export would write, bit for bit.

    Where one side is kept on purpose in a narrower type, the other is rounded to it, and the result says so.
    """
    bindings = hf.bindings()
    stored.check(bindings, hf.facts)
    stored_type, hf_type = stored.dtype(), hf.weights.dtype()
    shared = shared_type(stored_type, hf_type)
    differences: dict[str, float] = {}
    count = 0
    for name, exported in stored.hf_tensors(bindings, hf.facts):
        count += 1
        expected, found = hf.weights.load(name).to(shared), exported.to(shared)
        if not torch.equal(expected.view(_bits(expected)), found.contiguous().view(_bits(found))):
            differences[name] = _max_difference(expected, found)
    name = f"weights ({count} tensors{_rounding_note(stored_type, hf_type)})"
    if not differences:
        return Check(name, True, difference="bitwise equal")
    worst = max(differences, key=lambda key: differences[key])
    return Check(name, False, worst, f"max {differences[worst]:.3g}; {len(differences)} tensors differ")


def _rounding_note(stored: torch.dtype, hf: torch.dtype) -> str:
    if stored == hf:
        return ""
    return f", .nemo {_word(stored)}, hf {_word(hf)}, compared in {_word(shared_type(stored, hf))}"


def _bits(tensor: Tensor) -> torch.dtype:
    """Integer type of the same width: compares NaN and signed zero by their bits."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]


def _max_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite. Logits of a large vocabulary are gigabytes: in place."""
    difference = (a.float() - b.float()).abs_()
    return float(difference.nan_to_num_(nan=torch.inf, posinf=torch.inf).max())


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_assets(hf: HfFolder, assets: Path) -> Check:
    """Every file of the folder that is not a weight has travelled byte for byte. The ``.nemo`` may hold more.

    Allowed in the two configs is what an export changes in them: the type of the weights on request, and the spelling that
    every reader understands.
    """
    files = list(asset_files(hf.path))
    name = f"files ({len(files)} by sha256)"
    outcome = "bitwise equal"
    for relative in files:
        if not (assets / relative).is_file():
            return Check(name, False, relative.as_posix(), "not in the .nemo file")
        if _sha256(assets / relative) != _sha256(hf.path / relative):
            if len(relative.parts) > 1 or not same_when_portable(assets / relative, hf.path / relative):
                return Check(name, False, relative.as_posix(), "other bytes")
            outcome = "bitwise equal, but for weight type and spelling in the configs"
    return Check(name, True, difference=outcome)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_config(hf: HfFolder, stored: dict[str, Any]) -> Check:
    """The architecture keys of ``model_config.yaml`` are those that config.json asks for."""
    name = f"config ({len(ARCHITECTURE_KEYS)} keys)"
    if wrong := first_difference(stored, hf.facts):
        key, found, expected = wrong
        return Check(name, False, key, f"is {found!r}, expected {expected!r}")
    return Check(name, True, difference="equal")


Trace = dict[str, Tensor]
"""What a model computed for one prompt: each layer's output [T, hidden] by name, then ``logits`` [T, V]."""


def check_logits(
    hf: HfFolder,
    weights: NemoWeights,
    stored: dict[str, Any],
    assets: Path,
    prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
    tolerance: float = TOLERANCE,
) -> list[Check]:
    """Logits of NeMo and of transformers in fp32, one layer in memory at a time; a failure names the first that differs."""
    from nemo_ampo.compat import setup

    setup("cpu")
    from converters.nemo_model import build, checkpoint_place

    shared = shared_type(weights.dtype(), hf.weights.dtype())
    model, load = model_without_weights(hf.path, torch.float32)
    fill_on_demand(model, lambda name: load(name).to(shared).float())
    config = nemo_config(hf.facts, assets)
    config |= {key: stored[key] for key in ARCHITECTURE_KEYS if key in stored}
    module = build(config)
    tied = ["embedding.word_embeddings.weight"] if hf.facts.tied else []
    fill_on_demand(module, lambda name: weights.load(*checkpoint_place(name)).to(shared).float(), tied)
    checks = []
    for length in prompt_lengths:
        tokens = _prompt(min(length, hf.facts.max_positions), hf.facts.vocab)
        expected, found = _hf_trace(model, tokens), _nemo_trace(module, tokens, hf.facts.vocab)
        checks.append(_compare(f"logits, {len(tokens)} tokens", expected, found, tolerance))
    return checks


def _prompt(length: int, vocab: int) -> Tensor:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(length))


def _compare(name: str, expected: Trace, found: Trace, tolerance: float) -> Check:
    differences = {key: _max_difference(expected[key], found[key]) for key in expected}
    logits = differences["logits"]
    if logits <= tolerance:
        return Check(name, True, difference=f"max {logits:.3g}")
    culprit = next(key for key, difference in differences.items() if difference > tolerance)
    return Check(name, False, culprit, f"max {differences[culprit]:.3g} there, {logits:.3g} in the logits")


@contextlib.contextmanager
def _layer_outputs(layers: Iterable[torch.nn.Module], batch_dim: int) -> Iterator[Trace]:
    """Collect what each layer returns for the only sequence of the batch."""
    outputs: Trace = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            outputs[name] = hidden.select(batch_dim, 0).clone()

        return hook

    hooks = [layer.register_forward_hook(hook_for(f"model.layers.{i} (output)")) for i, layer in enumerate(layers)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def fill_on_demand(model: torch.nn.Module, load: Callable[[str], Tensor], kept: Sequence[str] = ()) -> None:
    """Each parameter is in memory while the module that it belongs to computes, and empty before and after.

    Args:
        model: with parameters that hold nothing of value.
        load: a parameter's value by its name.
        kept: names of those that stay once they are loaded, since other modules use them too.
    """

    def fill(module: torch.nn.Module, names: dict[str, str]) -> None:
        for name, whole in names.items():
            if module.get_parameter(name).numel() == 0:
                module.get_parameter(name).data = load(whole)

    def empty(module: torch.nn.Module, names: dict[str, str]) -> None:
        for name, whole in names.items():
            if whole not in kept:
                module.get_parameter(name).data = torch.empty(0)

    for path, module in model.named_modules():
        own = {name: f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
        for name in own:
            # A new one where it has no device yet; Megatron's keep what is noted on them.
            if module.get_parameter(name).is_meta:
                setattr(module, name, torch.nn.Parameter(torch.empty(0), requires_grad=False))
            module.get_parameter(name).data = torch.empty(0)
        if own:
            module.register_forward_pre_hook(lambda module, _, own=own: fill(module, own))
            module.register_forward_hook(lambda module, _, output, own=own: empty(module, own))


@torch.inference_mode()
def _hf_trace(model: Any, tokens: Tensor) -> Trace:
    with _layer_outputs(model.model.layers, batch_dim=0) as trace:
        trace["logits"] = model(tokens[None], use_cache=False).logits[0]
    return trace


@torch.inference_mode()
def _nemo_trace(module: Any, tokens: Tensor, vocab: int) -> Trace:
    # Megatron's hidden states are [T, B, hidden]; a mask of None means causal.
    with _layer_outputs(module.decoder.layers, batch_dim=1) as trace:
        positions = torch.arange(len(tokens))[None]
        trace["logits"] = module(tokens[None], positions, None)[0, :, :vocab]
    return trace


def verify(
    hf_dir: Path,
    nemo_path: Path,
    logits: bool = True,
    prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
    tolerance: float = TOLERANCE,
    place: Path | None = None,
) -> list[Check]:
    """Run the checks.

    Args:
        hf_dir: Hugging Face model folder.
        nemo_path: ``.nemo`` file.
        logits: run both models; without it NeMo is not needed.
        prompt_lengths: tokens of each prompt, cut to ``max_position_embeddings``.
        tolerance: largest absolute difference of a logit.
        place: folder for the Hugging Face files of the ``.nemo``; None takes its own, or where that will not do, ``TMPDIR``.

    Raises:
        UserError: either side cannot be read, or its tensors are not those of the mapping table.
    """
    hf = open_hf_folder(hf_dir)
    stored = read_model_config(nemo_path)
    places = [place] if place else [nemo_path.absolute().parent, Path(tempfile.gettempdir())]
    place = place_with_room(places, ASSETS_ROOM, f"{nemo_path}: unpacking its Hugging Face files")
    with scratch_folder(place, nemo_path.name) as scratch, open_weights(nemo_path) as weights:
        assets = unpack_assets(nemo_path, scratch / "assets")
        checks = [check_weights(hf, weights), check_assets(hf, assets), check_config(hf, stored)]
        if logits:
            checks += check_logits(hf, weights, stored, assets, prompt_lengths, tolerance)
    return checks


def report(checks: Sequence[Check]) -> int:
    """Print the table; exit status 0 if all passed, 1 with a line that names the worst tensor otherwise."""
    width = max(len(c.name) for c in checks)
    for c in checks:
        print(f"{c.name:<{width}}  {'ok  ' if c.passed else 'FAIL'}  {c.difference}  {c.worst}".rstrip())
    failed = [c for c in checks if not c.passed]
    for c in failed:
        print(f"parity failed: {c.worst}: {c.difference}")
    return cli.DIFFERENT if failed else cli.OK


def parser() -> argparse.ArgumentParser:
    """Command line of ``python -m converters.verify``."""
    p = argparse.ArgumentParser(prog="python -m converters.verify", description=__doc__)
    p.add_argument("--hf", type=typed_path, required=True, metavar="DIR", help="Hugging Face model folder")
    p.add_argument("--nemo", type=typed_path, required=True, metavar="FILE.nemo", help="NeMo checkpoint")
    p.add_argument("--no-logits", action="store_true", help="compare weights, files and config only; no NeMo needed")
    p.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="largest difference of a logit in fp32 (%(default)s)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    args = parser().parse_args(argv)
    return cli.run(lambda: report(verify(args.hf, args.nemo, logits=not args.no_logits, tolerance=args.tolerance)))


if __name__ == "__main__":
    raise SystemExit(main())
