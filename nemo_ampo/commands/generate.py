"""``nemo-ampo generate bc|rl``: the command line of :mod:`nemo_ampo.generate.job`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from nemo_ampo.chat.config import Price
from nemo_ampo.dialogue.prompts import View
from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.files import check_writable, disk_errors, full_or_read_only, place_of
from nemo_ampo.generate.job import JobConfig, TeacherConfig, most_calls, run
from nemo_ampo.generate.situations import Situations, from_sotopia, from_world
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.output.terminal import printable_output
from nemo_ampo.overrides import typed_path
from nemo_ampo.prompts import load_prompt
from nemo_ampo.ranges import LARGEST_SEED, YEAR_S, Range, told

FIRST_TEMPERATURES, LATER_TEMPERATURE = (0.7, 0.7), 1.0
OPTION_RANGES = {
    "world": Range(1, 1_000_000),
    "seed": Range(0, LARGEST_SEED),
    **dict.fromkeys(("limit", "max_tokens", "max_calls"), Range(1)),
    **dict.fromkeys(("rollouts", "max_turns", "tries"), Range(1, 1000)),
    "max_concurrency": Range(1, 65536),
    "timeout_s": Range(0, YEAR_S, whole=False, above=True),
    "max_usd": Range(0, whole=False, above=True),
}
"""What the options may be."""
_OF_FOLDER = {"limit": None, "rollouts": 1, "max_turns": 20, "view": "sotopia"}
_OF_JUDGE = {"judge_model": None, "judge_key_env": "", "judge_price": None}
_OF_BC = {"modes_per_turn": 1}
"""Options that only one source or kind of rows has, with their defaults."""


@printable_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Write training rows from scenarios. Exit status 75 when situations ended early, 2 when a limit cut them short."""
    args = _parser().parse_args(argv)
    try:
        _check(args)
        situations = _situations(args)
        config = _config(args)
        _say(f"{len(situations.chosen)} situations, at most {most_calls(config, situations.chosen)} answers to ask for")
        if args.estimate:
            return 0
        check_writable(config.out.parent, "--out")
        with full_or_read_only():
            summary = run(config, situations)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for line in summary.lines():
        _say(line)
    if summary.rows:
        _say(f"wrote {config.out} and {config.beside('meta.json')}")
    return summary.outcome.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nemo-ampo generate", description=main.__doc__)
    parser.add_argument("kind", choices=("bc", "rl"), help="bc: replies in the four modes; rl: dialogue prefixes with state")
    parser.add_argument("--out", type=typed_path, required=True, help="row file, .jsonl or .json; the same command goes on")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--sotopia-dir", help="folder with the four SOTOPIA files; evaluation situations are left out")
    source.add_argument("--world", type=int, metavar="N", help="N scenes of the embedded world")
    for name, what in (("teacher", "model that speaks"), ("judge", "model that scores (rl)")):
        group = parser.add_argument_group(name)
        required = name == "teacher"
        group.add_argument(f"--{name}", metavar="URL", required=required, help=f"address of the {what}, ending in /v1")
        group.add_argument(f"--{name}-model", metavar="NAME", required=required, help="its name there")
        key = "environment variable with the key"
        group.add_argument(f"--{name}-key-env", default="" if required else None, metavar="VARIABLE", help=key)
        group.add_argument(
            f"--{name}-price",
            type=float,
            nargs=2,
            metavar=("IN", "OUT"),
            help="US dollars per million tokens, for --max-usd",
        )
    rows = parser.add_argument_group("rows")
    rows.add_argument("--seed", type=int, default=0, help="of everything drawn (default %(default)s)")
    rows.add_argument("--limit", type=int, help="draw at most so many pairings of the folder")
    rows.add_argument("--rollouts", type=int, help="dialogues per pairing of the folder (default 1)")
    rows.add_argument("--max-turns", type=int, help="of a dialogue of the folder (default 20)")
    rows.add_argument("--modes-per-turn", type=int, help="bc: rows per turn, 1..4 (default 1)")
    rows.add_argument("--view", choices=get_args(View), help="what a speaker sees of the folder's partner (default sotopia)")
    rows.add_argument(
        "--system-prompt", default="modes_system", help="of the rows: shipped name or file (default %(default)s)"
    )
    cost = parser.add_argument_group("cost and patience")
    cost.add_argument("--tries", type=int, default=4, help="for a reply in the grammar (default %(default)s)")
    cost.add_argument("--max-tokens", type=int, default=1024, help="longest reply (default %(default)s)")
    cost.add_argument("--max-concurrency", type=int, default=16, help="calls in flight (default %(default)s)")
    cost.add_argument("--timeout-s", type=float, default=120.0, help="of one call (default %(default)s)")
    cost.add_argument("--max-calls", type=int, help="stop after so many calls, earlier starts included")
    cost.add_argument("--max-usd", type=float, help="stop at this cost, earlier starts included")
    cost.add_argument("--estimate", action="store_true", help="say how much would be asked, and stop")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Hold the options to their ranges, refuse one that nothing would read, and fill in the others' defaults."""
    for name, allowed in OPTION_RANGES.items():
        value = getattr(args, name)
        if value is not None and not allowed.holds(value):
            raise ConfigError(f"--{name.replace('_', '-')}: must be {told(allowed, value)}")
    for defaults, there, needed in (
        (_OF_FOLDER, args.sotopia_dir is not None, "--sotopia-dir"),
        (_OF_JUDGE, args.judge is not None, "--judge"),
        (_OF_BC, args.kind == "bc", "bc rows"),
    ):
        for name, default in defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
            elif not there:
                raise ConfigError(f"--{name.replace('_', '-')}: has no effect without {needed}")


def _situations(args: argparse.Namespace) -> Situations:
    if args.world is not None:
        return from_world(args.world, args.seed)
    return from_sotopia(args.sotopia_dir, args.rollouts, args.max_turns, args.view, args.limit, args.seed)


def _config(args: argparse.Namespace) -> JobConfig:
    try:
        system = load_prompt(args.system_prompt)
        system.require(())  # nothing fills a placeholder in it
    except ConfigError as error:
        raise ConfigError(f"--system-prompt: {error}") from None
    temperatures = (*FIRST_TEMPERATURES, *[LATER_TEMPERATURE] * args.tries)[: args.tries]
    if args.judge is not None and args.judge_model is None:
        raise ConfigError("--judge-model: needed with --judge")
    judge = None
    if args.judge is not None:
        judge = JudgeConfig(
            base_url=args.judge,
            model=args.judge_model,
            api_key_env=args.judge_key_env,
            timeout_s=args.timeout_s,
            max_concurrency=args.max_concurrency,
            price=_price(args.judge_model, args.judge_price),
        )
    with disk_errors(f"--out: cannot write {args.out}"):
        out = place_of(args.out)
    return JobConfig(
        kind=args.kind,
        out=out,
        teacher=TeacherConfig(
            base_url=args.teacher,
            model=args.teacher_model,
            api_key_env=args.teacher_key_env,
            max_tokens=args.max_tokens,
            timeout_s=args.timeout_s,
            max_concurrency=args.max_concurrency,
            price=_price(args.teacher_model, args.teacher_price),
        ),
        judge=judge,
        system=system.text,
        seed=args.seed,
        temperatures=temperatures,
        modes_per_turn=args.modes_per_turn,
        max_calls=args.max_calls,
        max_usd=args.max_usd,
        max_concurrency=args.max_concurrency,
    )


def _price(model: str, price: list[float] | None) -> dict[str, Price]:
    return {model: Price(*price)} if price is not None else {}


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
