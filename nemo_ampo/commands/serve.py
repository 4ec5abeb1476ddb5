"""``nemo-ampo serve CHECKPOINT``: the server that ``serve.engine`` would choose, in the foreground."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from nemo_ampo.errors import UserError
from nemo_ampo.files import no_model_folder
from nemo_ampo.output.terminal import printable_output
from nemo_ampo.overrides import typed_path
from nemo_ampo.serve.__main__ import main as embedded
from nemo_ampo.serve.config import ServeConfig, ServeEngine, check_serve, choose_engine
from nemo_ampo.serve.launch import foreign_command


@printable_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Serve a checkpoint; options that are not listed go to the chosen server's own command line."""
    parser = argparse.ArgumentParser(prog="nemo-ampo serve", description=main.__doc__)
    parser.add_argument("checkpoint", type=typed_path, help="Hugging Face folder")
    parser.add_argument("--engine", choices=[e.value for e in ServeEngine], default=ServeEngine.auto.value)
    parser.add_argument("--host", default=ServeConfig().host)
    parser.add_argument("--port", type=int, default=8000)
    args, others = parser.parse_known_args(argv)
    try:
        if not (args.checkpoint / "config.json").is_file():
            raise UserError(f"CHECKPOINT: {no_model_folder(args.checkpoint)}")
        config = ServeConfig(engine=ServeEngine(args.engine), host=args.host)
        check_serve(config)
        engine = choose_engine(config, checkpoints=[args.checkpoint])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if engine is ServeEngine.embedded:
        return embedded([str(args.checkpoint), "--host", args.host, "--port", str(args.port), *others])
    command, model = foreign_command(engine, args.checkpoint, replace(config, extra_args=others), args.port)
    sys.stderr.write(f"{' '.join(command)}  (model={model})\n")
    sys.stderr.flush()
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
