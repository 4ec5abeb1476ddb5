"""The embedded world's checkpoint, converted and opened for training: what several benches measure on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any


def open_tiny(folder: Path, saves: bool = False, **sizes: int) -> tuple[Any, Path]:
    """A session on one process, and the Hugging Face folder that its random weights come from.

    Args:
        folder: for all files.
        saves: whether the session can write checkpoints.
        sizes: of the model, see :class:`nemo_ampo.world.tiny_model.TinyModel`.
    """
    from nemo_ampo import compat
    from nemo_ampo.checkpoint.config import CheckpointConfig
    from nemo_ampo.config.compose import compose
    from nemo_ampo.world.pack import make_pack
    from nemo_ampo.world.tiny_model import TinyModel, make_tiny_checkpoint

    make_pack(folder / "pack", seed=1, num_bc=200, num_rl=50, num_heldout=50)
    hf = make_tiny_checkpoint(folder / "hf", folder / "pack", 1, TinyModel(**sizes))
    nemo = str(folder / "model.nemo")
    convert = [sys.executable, "-m", "converters.hf_to_nemo", "--input", str(hf), "--output", nemo, "--no-verify"]
    subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
    compat.setup("cpu")
    from nemo_ampo.checkpoint.nemo_file import unpack_assets
    from nemo_ampo.training.actor import AmpoActor
    from nemo_ampo.training.session import Keep, open_session, prepare_config

    cfg = compose("ampo", "tiny", [])
    prepare_config(cfg, folder / "run", nemo, unpack_assets(nemo, folder / "assets"), "cpu")
    keep = Keep(folder / "run", CheckpointConfig(keep_best=0), {}) if saves else None
    return open_session(cfg, "reinforce", AmpoActor, nemo, 128, False, keep), hf
