"""The embedded server: ``python -m nemo_ampo.serve CHECKPOINT``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from nemo_ampo.errors import UserError
from nemo_ampo.files import no_model_folder
from nemo_ampo.output.terminal import printable_output
from nemo_ampo.overrides import typed_path
from nemo_ampo.serve.config import ServeConfig, check_serve
from nemo_ampo.serve.local import run_app

_log = logging.getLogger(__name__)


@printable_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Serve a Hugging Face folder as an OpenAI-compatible chat API, with transformers."""
    defaults = ServeConfig()
    parser = argparse.ArgumentParser(prog="python -m nemo_ampo.serve", description=main.__doc__)
    parser.add_argument("checkpoint", type=typed_path, help="Hugging Face folder")
    parser.add_argument("--model-name", help="name under which it is served (default: the folder's name)")
    parser.add_argument("--host", default=defaults.host)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default=defaults.device)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default=defaults.dtype)
    parser.add_argument("--max-batch", type=int, default=defaults.max_batch, help="requests decoded together")
    parser.add_argument("--ready-file", type=typed_path, help="gets the base URL once the server listens")
    parser.add_argument("--parent-pid", type=int, help="stop when this process is no longer the parent")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    name = args.model_name or args.checkpoint.resolve().name
    try:
        check_serve(ServeConfig(host=args.host, device=args.device, dtype=args.dtype, max_batch=args.max_batch))
        if not (args.checkpoint / "config.json").is_file():
            raise UserError(f"CHECKPOINT: {no_model_folder(args.checkpoint)}")

        from nemo_ampo.compat import resolve_device

        device = "cuda" if resolve_device(args.device) == "gpu" else "cpu"

        from nemo_ampo.serve.app import create_app
        from nemo_ampo.serve.engine import ServingEngine

        engine = ServingEngine(args.checkpoint, device=device, dtype=args.dtype, max_batch=args.max_batch)
        try:
            run_app(
                create_app(engine, name),
                host=args.host,
                port=args.port,
                ready_file=args.ready_file,
                parent_pid=args.parent_pid,
                on_ready=lambda base_url: _log.info("serving %s: base_url=%s model=%s", args.checkpoint, base_url, name),
            )
        finally:
            engine.close()
    except UserError as error:
        _log.error("error: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
