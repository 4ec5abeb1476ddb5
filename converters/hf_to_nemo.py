"""Command: a Hugging Face model folder to a ``.nemo`` file that NeMo-Aligner restores at any parallel layout.

The file is built beside its target, verified there (see :mod:`converters.verify`), and only then given its
name.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from converters import cli
from converters.hf_folder import HfFolder, asset_files, check_tokenizer_files, open_hf_folder
from converters.model_config import nemo_config
from converters.nemo_stream import write_tar
from converters.verify import report, verify
from nemo_ampo.checkpoint.nemo_writing import add_assets
from nemo_ampo.errors import UserError
from nemo_ampo.output.staging import place_with_room, publish, scratch_folder, staged
from nemo_ampo.overrides import typed_path

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def copy_assets(source: Path, target: Path) -> Path:
    """Copy every file that is not a weight, byte for byte, into the new folder ``target``."""
    for relative in asset_files(source):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)
    return target


def write_nemo(
    hf_dir: Path,
    nemo_path: Path,
    dtype: torch.dtype | None = None,
    allow_base_tokenizer: bool = False,
    shown: Path | None = None,
) -> None:
    """Convert without verifying.

    Args:
        hf_dir: Hugging Face model folder.
        nemo_path: ``.nemo`` file to write.
        dtype: type of the stored weights; None keeps the folder's.
        allow_base_tokenizer: accept a tokenizer without chat template or end-of-sequence token.
        shown: the user's name for it, if it is built elsewhere on the same disk.

    Raises:
        UserError: the folder is incomplete, unsupported, or its weights do not match the mapping table.
    """
    hf = open_hf_folder(hf_dir)
    config = nemo_config(hf.facts, hf_dir)
    check_tokenizer_files(hf_dir, allow_base_tokenizer)
    stored_type = dtype or hf.weights.dtype()
    if stored_type not in PRECISIONS.values():
        raise UserError(f"{hf_dir}: weights of type {stored_type} are not supported; give --dtype {'|'.join(PRECISIONS)}")
    shown = shown or nemo_path
    place_with_room([shown.resolve().parent], _bytes_of(hf, stored_type), f"--output {shown}")
    bindings = hf.bindings()
    tensors = ((binding, binding.to_nemo(hf.weights.load, hf.facts).to(stored_type)) for binding in bindings)
    with scratch_folder(nemo_path.absolute().parent, nemo_path.name) as staging:
        hashes = write_tar(nemo_path, config, tensors, hf.facts)
        add_assets(nemo_path, copy_assets(hf_dir, staging / "assets"), atomic=False, known=hashes)
        with nemo_path.open("rb") as file:
            os.fsync(file.fileno())


def _bytes_of(hf: HfFolder, dtype: torch.dtype) -> int:
    """Of the weights once they are stored in ``dtype``."""
    held = sum(file.stat().st_size for file in hf.path.glob("*.safetensors"))
    return held * dtype.itemsize // hf.weights.dtype().itemsize


def convert(
    hf_dir: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    allow_base_tokenizer: bool = False,
    check: str = "auto",
    overwrite: bool = False,
) -> int:
    """Write, verify, publish. Returns the exit status; a file that fails verification is removed.

    Args:
        hf_dir, output, dtype, allow_base_tokenizer: as :func:`write_nemo` has them.
        check: ``auto``, ``full``, ``weights`` or ``none``.
        overwrite: replace an existing file.

    Raises:
        UserError: as :func:`write_nemo`, or ``output`` exists and ``overwrite`` is not given.
    """
    if output.suffix != ".nemo":
        raise UserError(f"--output {output}: the name must end in .nemo")
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; a .nemo is a file")
    _check_absent(output, overwrite)
    with staged(output, "--output") as built:
        # Another command may have written it while this one waited for nobody or was starting.
        _check_absent(output, overwrite)
        write_nemo(hf_dir, built, dtype, allow_base_tokenizer, output)
        gc.collect()
        status = cli.OK
        if check != "none":
            status = report(verify(hf_dir, built, logits=cli.with_logits(check, built.stat().st_size)))
        if status == cli.OK:
            publish(built, output)
            print(f"wrote {output}")
        else:
            print(f"error: {output} was not written: the converted model differs", file=sys.stderr)
    return status


def _check_absent(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: exists; pass --overwrite to replace it")


def parser() -> argparse.ArgumentParser:
    """Command line of ``python -m converters.hf_to_nemo``."""
    p = argparse.ArgumentParser(prog="python -m converters.hf_to_nemo", description=__doc__)
    p.add_argument("--input", type=typed_path, required=True, metavar="DIR", help="Hugging Face model folder")
    p.add_argument("--output", type=typed_path, required=True, metavar="FILE.nemo", help="NeMo checkpoint to write")
    p.add_argument("--dtype", choices=("keep", *PRECISIONS), default="keep", help="type of the stored weights (%(default)s)")
    p.add_argument(
        "--allow-base-tokenizer",
        action="store_true",
        help="accept a tokenizer without chat template or EOS token",
    )
    cli.add_writing_options(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    args = parser().parse_args(argv)
    return cli.run(
        lambda: convert(
            args.input,
            args.output,
            dtype=PRECISIONS.get(args.dtype),
            allow_base_tokenizer=args.allow_base_tokenizer,
            check=args.verify,
            overwrite=args.overwrite,
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
