"""Command: a ``.nemo`` file to a Hugging Face folder that the Auto classes of transformers load untouched.

Weights are read with torch alone. The files that travelled inside the ``.nemo`` come back byte for byte. The
folder is written beside its target, verified there, and only then given its name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from converters import cli
from converters.families import FAMILIES
from converters.hf_to_nemo import PRECISIONS
from converters.hf_writing import save_shards
from converters.mapping import bind, hf_dims
from converters.model_config import check_architecture
from converters.nemo_weights import open_weights
from converters.verify import report, verify
from nemo_ampo.checkpoint.nemo_file import unpack_assets
from nemo_ampo.errors import UserError
from nemo_ampo.files import look_alike
from nemo_ampo.model_folder.facts import read_facts
from nemo_ampo.model_folder.portable import make_portable, note_for_transformers_5
from nemo_ampo.output.staging import place_with_room, publish, staged
from nemo_ampo.overrides import typed_path


def write_hf(nemo_path: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Export into the new folder ``folder`` without verifying.

    Args:
        nemo_path: ``.nemo`` file with Hugging Face files in it.
        folder: written to.
        dtype: type of the exported weights; None takes the one in the packed config.json, or the
            stored type where that is absent.

    Raises:
        UserError: the file is not readable, carries no Hugging Face files, or its weights do not match the
            table.
    """
    check_architecture(nemo_path, unpack_assets(nemo_path, folder))
    facts = read_facts(folder)
    bindings = bind(FAMILIES[facts.family].rows, facts)
    with open_weights(nemo_path) as stored:
        stored.check(bindings, facts)
        written_type = dtype or getattr(torch, facts.dtype or "", stored.dtype())
        save_shards(stored.hf_tensors(bindings, facts), hf_dims(bindings, facts), written_type, folder)
    # A type asked for on the command line must be the one that ``torch_dtype='auto'`` loads.
    word = str(dtype).removeprefix("torch.")
    make_portable(folder, None if dtype is None or word == facts.dtype else word)


def convert(
    nemo_path: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    check: str = "auto",
    overwrite: bool = False,
) -> int:
    """Write, verify, publish. Returns the exit status; a folder that fails verification is removed.

    Args:
        nemo_path, output, dtype: as :func:`write_hf` has them.
        check: ``auto``, ``full``, ``weights`` or ``none``.
        overwrite: replace an existing folder.

    Raises:
        UserError: as :func:`write_hf`, or ``output`` is not empty and ``overwrite`` is not given.
    """
    _check_free(output, overwrite)
    with staged(output, "--output") as built:
        _check_free(output, overwrite)
        size = _bytes_of(nemo_path)
        logits = check != "none" and cli.with_logits(check, size)
        place_with_room([output.resolve().parent], size, f"--output {output}")
        write_hf(nemo_path, built, dtype)
        status = cli.OK
        if check != "none":
            status = report(verify(built, nemo_path, logits=logits, place=built.parent))
        if status == cli.OK:
            publish(built, output)
            print(f"wrote {output}")
            if note := note_for_transformers_5(output):
                print(f"note: {note}", file=sys.stderr)
        else:
            print(f"error: {output} was not written: the exported model differs", file=sys.stderr)
    return status


def _bytes_of(nemo_path: Path) -> int:
    if not nemo_path.is_file():
        raise UserError(f"{nemo_path}: no such .nemo file{look_alike(nemo_path)}")
    return nemo_path.stat().st_size


def _check_free(output: Path, overwrite: bool) -> None:
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not overwrite):
        raise UserError(f"--output {output}: exists and is not an empty folder; pass --overwrite to replace a folder")


def parser() -> argparse.ArgumentParser:
    """Command line of ``python -m converters.nemo_to_hf``."""
    p = argparse.ArgumentParser(prog="python -m converters.nemo_to_hf", description=__doc__)
    p.add_argument("--input", type=typed_path, required=True, metavar="FILE.nemo", help="NeMo checkpoint")
    p.add_argument("--output", type=typed_path, required=True, metavar="DIR", help="Hugging Face folder to write")
    p.add_argument(
        "--dtype",
        choices=("config", *PRECISIONS),
        default="config",
        help="type of the exported weights (%(default)s: torch_dtype of config.json)",
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
            check=args.verify,
            overwrite=args.overwrite,
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
