"""What every stage's command line shares: ``--config-name NAME key=value ...``, checks first, one-line errors."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_ampo.config.compose import compose
from nemo_ampo.errors import EngineError, Stopped, UserError
from nemo_ampo.files import check_writable, full_or_read_only
from nemo_ampo.output.outcome import EXIT_UNFINISHED, EXIT_USER_ERROR
from nemo_ampo.output.terminal import printable_output
from nemo_ampo.overrides import typed_path
from nemo_ampo.ranks import settle_ranks
from nemo_ampo.run.interrupt import stop_while_nothing_is_lost
from nemo_ampo.run.watchdog import leave_ranks

MAIN_RANK_FIRST_S = 3.0
"""How long an error of another rank waits for the main rank's, seconds."""
AT_A_CHECKPOINT = "stopped at a checkpoint; the same command continues"


def world_size() -> int:
    """Number of ranks torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True on the one process that may print."""
    return os.environ.get("RANK", "0") == "0"


@printable_output()
def main(
    stage: str, run: Callable[[DictConfig], bool], argv: Sequence[str] | None = None, unfinished: str = AT_A_CHECKPOINT
) -> int:
    """Parse, compose, run.

    Args:
        stage: folder below ``configs``.
        run: the stage; True when finished, False when the same command continues it.
        argv: without the program name.
        unfinished: what to say when it returned False.

    Returns:
        Exit status: 0 finished, 2 for an error the user can fix, 75 stopped and resumable, 130 interrupted.

    Raises:
        EngineError: one that is a bug of the caller.
    """
    status = 1
    try:
        status = _run(stage, run, argv, unfinished)
    finally:
        leave_ranks(status)
    return status


def _run(stage: str, run: Callable[[DictConfig], bool], argv: Sequence[str] | None, unfinished: str) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m recipes.{stage}", description=run.__doc__)
    parser.add_argument("--config-name", default="tiny", help=f"a file of configs/{stage} (default: tiny)")
    parser.add_argument("--config-dir", type=typed_path, help=f"read configs from here instead of configs/{stage}")
    parser.add_argument("--print-config", action="store_true", help="print the composed config and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    args = parser.parse_intermixed_args(argv)
    stop_while_nothing_is_lost()
    try:
        settle_ranks()
        cfg = compose(stage, args.config_name, args.overrides, args.config_dir)
        if args.print_config:
            print(OmegaConf.to_yaml(cfg))
            return 0
        for key in ("run.dir", "checkpoint.dir"):
            folder = OmegaConf.select(cfg, key)
            if folder:
                check_writable(Path(str(folder)), key)
        with full_or_read_only():
            finished = run(cfg)
        _leave_together(finished)
    except (UserError, EngineError) as error:
        if isinstance(error, EngineError) and error.is_bug:
            raise
        _say(error)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except Stopped:
        finished, unfinished = False, "asked to stop while there was nothing to save; the same command continues"
    if not finished:
        print(unfinished, file=sys.stderr)
        return EXIT_UNFINISHED
    return 0


def _say(error: Exception) -> None:
    """One line, from the main rank where it fails too: its end has the starter end this process before it speaks."""
    if is_main_process():
        print(f"error: {error}", file=sys.stderr)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(MAIN_RANK_FIRST_S)
        print(f"error: rank {os.environ['RANK']}: {error}", file=sys.stderr)


def _leave_together(finished: bool) -> None:
    """No rank leaves before all have saved; one that stopped keeps its exit status.

    Under Slurm the first rank that ends with a status has the others terminated.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.barrier()
    if not finished:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
