"""``nemo-ampo``: every command. :data:`COMMANDS` is the whole list; those of :data:`DOORS` are programs of their own.

Each command imports what it needs when it runs, so that ``--help`` is immediate. Something the user can fix
is one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_ampo.errors import ConfigError, FormatError, UserError
from nemo_ampo.files import disk_errors, full_or_read_only
from nemo_ampo.output.outcome import EXIT_USER_ERROR
from nemo_ampo.output.terminal import printable_output, show
from nemo_ampo.overrides import typed_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemo_ampo.types import Reply

EXIT_NOT_OK = 1


def _path(text: str) -> Path:
    """A path on this command line.

    Raises:
        typer.BadParameter: it starts with ``~``.
    """
    try:
        return typed_path(text)
    except argparse.ArgumentTypeError as problem:
        raise typer.BadParameter(str(problem)) from None


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Hydra overrides.")]
ConfigName = Annotated[str, typer.Option(help="A file of configs/STAGE.")]
ConfigDir = Annotated[Path | None, typer.Option(parser=_path, help="Read configs from here instead of configs/STAGE.")]
OtherModel = Annotated[Path | None, typer.Option(parser=_path, help="Hugging Face folder or .nemo file, for another model.")]
Nodes = Annotated[int, typer.Option(min=1)]
GpusPerNode = Annotated[int, typer.Option(help="Per node.", min=1)]
GpuKind = Annotated[str, typer.Option(help="Kind of GPU: h100, h200 or a100.")]


def doctor(
    compat: Annotated[bool, typer.Option("--compat", help="List what is replaced upstream on a CPU, and why.")] = False,
    judge_key_env: Annotated[
        str | None,
        typer.Option(help="Also look whether this environment variable holds a key (it is not shown)."),
    ] = None,
) -> None:
    """Say what this machine can run and what is missing. Exit status 1 when something is, or is of another version."""
    from nemo_ampo.commands import doctor as machine

    if compat:
        show(machine.compat_table())
        return
    report = machine.doctor(judge_key_env)
    show(report.table())
    if report.mend:
        typer.echo(f"to mend it, {report.mend}")
    if not report.ok:
        raise typer.Exit(EXIT_NOT_OK)


def check_config(
    stage: Annotated[str, typer.Argument(help="bc, ampo, evaluate or sotopia")],
    overrides: Overrides = None,
    config_name: ConfigName = "tiny",
    config_dir: ConfigDir = None,
    no_files: Annotated[bool, typer.Option("--no-files", help="Do not ask whether the files it names exist.")] = False,
    ranks: Annotated[int, typer.Option(help="Processes the job will have.", envvar="WORLD_SIZE", min=1)] = 1,
) -> None:
    """Check a stage's configuration as the stage would, and print it resolved. Loads no model, reads no data file."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # A program over both, like the recipes themselves: it must compose exactly what they compose.
    from nemo_ampo.config.check import check_stage
    from nemo_ampo.config.compose import compose
    from nemo_ampo.config.stages import STAGES

    if stage not in STAGES:
        raise ConfigError(f"STAGE: expected one of {', '.join(STAGES)}, got {stage!r}")
    raw = compose(stage, config_name, overrides or [], config_dir)
    check_stage(stage, raw, ranks, files=not no_files)
    try:
        typer.echo(OmegaConf.to_yaml(raw, resolve=True), nl=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'config'}: {str(error).splitlines()[0]}") from None


def score(
    file: Annotated[Path | None, typer.Argument(parser=_path, help="File with one reply; stdin without it.")] = None,
    before: Annotated[float | None, typer.Option(help="Judged goal achievement before the reply, 0..10.")] = None,
    after: Annotated[float | None, typer.Option(help="Judged goal achievement with the reply, 0..10.")] = None,
    answer_tokens: Annotated[int | None, typer.Option(help="Tokens of the answer with its quotes.", min=0)] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(parser=_path, help="Hugging Face folder that counts the answer's tokens.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Accept only the exact skeleton of the mode.")] = False,
) -> None:
    """Read one reply as the reward does: mode, sections, answer; with the judge's scores also the reward.

    One line feed at the end of the input is not part of the reply. Exit status 1 when the reply breaks the
    grammar.
    """
    from nemo_ampo.algo.rewards import RewardConfig
    from nemo_ampo.reply.grammar import parse_reply

    if (before is None) != (after is None):
        raise UserError("--before, --after: give both scores or neither")
    if answer_tokens is not None and tokenizer is not None:
        raise UserError("--answer-tokens, --tokenizer: give one of the two")
    # As bytes: the reward sees a reply's line ends as they are.
    with disk_errors(f"cannot read {file or 'stdin'}"):
        raw = sys.stdin.buffer.read() if file is None else file.read_bytes()
    try:
        text = raw.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file or 'stdin'}: not UTF-8 text (byte {error.start})") from None
    try:
        reply = parse_reply(text, strict=strict)
    except FormatError as error:
        typer.echo(f"format    broken, rule {error.rule}: {error}")
        if before is not None:
            typer.echo(f"reward    {RewardConfig().format_failure_reward:g}")
        raise typer.Exit(EXIT_NOT_OK) from None
    _show_reply(reply)
    if tokenizer is not None:
        answer_tokens = _count_tokens(tokenizer, reply.answer)
    if before is not None and after is not None:
        _show_reward(before, after, answer_tokens)


def _show_reply(reply: Reply) -> None:
    from nemo_ampo.reply.modes import MODES

    typer.echo("format    valid")
    typer.echo(f"mode      {reply.mode} ({MODES[reply.mode].name})")
    typer.echo(f"sections  {', '.join(reply.thinking) or 'none'}")
    typer.echo(f"answer    {reply.answer}")


def _show_reward(before: float, after: float, answer_tokens: int | None) -> None:
    from nemo_ampo.algo.rewards import answer_length_score, combine, goal_gain

    try:
        goal = goal_gain(before, after)
    except ValueError as error:
        raise UserError(f"--before, --after: {error}") from None
    typer.echo(f"goal      {goal:.4f}")
    if answer_tokens is None:
        typer.echo("length    unknown; give --answer-tokens or --tokenizer")
        return
    length = answer_length_score(answer_tokens)
    typer.echo(f"length    {length:.4f} ({answer_tokens} tokens)")
    typer.echo(f"reward    {combine(goal, length):.4f}")


def _count_tokens(folder: Path, answer: str) -> int:
    from nemo_ampo.model_folder.loading import load_tokenizer

    return len(load_tokenizer(folder).tokenize(answer))


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            parser=_path,
            metavar="RUN...",
            help="Run folder of a stage, or one with bc/, ampo/, evaluate/; or SOTOPIA results, to be compared if several.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(parser=_path, help="Page to write. [default: report.html in the run folder]")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="SOTOPIA: whose scores, where several judged.")] = None,
    sotopia_dir: Annotated[
        Path | None, typer.Option(parser=_path, help="SOTOPIA: scenario files behind others' result file.")
    ] = None,
    seed: Annotated[int, typer.Option(help="SOTOPIA: of the resampling behind intervals and p-values.")] = 0,
) -> None:
    """Write one self-contained HTML page about a run and print its tables.

    Two SOTOPIA results are compared, more stand in one table. Exit status 1 when a SOTOPIA result lacks scores.
    """
    from nemo_ampo.commands import sotopia_report as sotopia

    if sotopia.is_sotopia(paths):
        table, lines, partial = sotopia.report(paths, out, judge, sotopia_dir, seed)
        show(table)
        typer.echo("\n".join(lines))
        if partial:
            raise typer.Exit(EXIT_NOT_OK)
        return
    if judge is not None or sotopia_dir is not None:
        raise UserError(f"--judge, --sotopia-dir: {paths[0]} is no SOTOPIA result")
    _report_training(paths[0], out)


def _report_training(run_dir: Path, out: Path | None) -> None:
    from nemo_ampo.report.training.inputs import read_run
    from nemo_ampo.report.training.page import file_problems, write_report
    from nemo_ampo.report.training.tables import evaluation_table, training_table

    written = write_report(run_dir, out)
    run = read_run(run_dir)
    if run.evaluations:
        show(evaluation_table(run.evaluations))
    if run.ampo is not None and run.ampo.log.num_steps:
        show(training_table(run.ampo.log))
    for problem in file_problems(run):
        typer.echo(f"ALARM: {problem}", err=True)
    typer.echo(f"wrote {written}")


def plan(
    stage: Annotated[str, typer.Argument(help="bc or ampo")],
    overrides: Overrides = None,
    config_name: ConfigName = "tiny",
    model: OtherModel = None,
    nodes: Nodes = 1,
    gpus: GpusPerNode = 1,
    gpu: GpuKind = "h100",
) -> None:
    """Say what a stage will need: memory per GPU, disk, tokens, judge calls, time. Loads no model.

    Exit status 1 when it does not fit.
    """
    from nemo_ampo.job.plan import compose_for_plan, lines, make_plan, model_of

    cfg = compose_for_plan(stage, config_name, overrides or [], nodes * gpus)
    needs = make_plan(stage, cfg, model_of(model, config_name), nodes * gpus, gpu)
    for line in lines(needs):
        typer.echo(line)
    if not needs.fits:
        raise typer.Exit(EXIT_NOT_OK)


def rehearse(
    stage: Annotated[str, typer.Argument(help="bc or ampo")],
    overrides: Overrides = None,
    config_name: ConfigName = "tiny",
    model: OtherModel = None,
    nodes: Nodes = 1,
    gpus: GpusPerNode = 1,
    gpu: GpuKind = "h100",
    rank: Annotated[str | None, typer.Option(help="all, or one rank. [default: those that differ]")] = None,
    search: Annotated[bool, typer.Option("--search", help="Instead, list the layouts that fit, by arithmetic.")] = False,
) -> None:
    """Carry a stage out rank by rank on tensors without values: shapes, collectives, memory. Needs no GPU and no weights.

    Exit status 1 when it does not fit or the ranks' collectives differ, 2 when the stage would stop with an error.
    """
    # A program over all packages, as the recipes are; nothing else of this one knows them.
    from recipes import rehearse as program

    job = program.read_job(stage, config_name, overrides or [], model, nodes, gpus, gpu)
    if search:
        from nemo_ampo.rehearse.search import candidates, table

        show(table(candidates(stage, job.cfg, job.facts, nodes, gpus, job.hardware), job.hardware))
    elif not program.run(job, rank, typer.echo):
        raise typer.Exit(EXIT_NOT_OK)


def status(run_dir: Annotated[Path, typer.Argument(parser=_path, help="Run folder of a slurm/*.sh job.")]) -> None:
    """Say what of a batch run is done, running and left, and what went wrong last."""
    from nemo_ampo.commands.status import read_status

    run = read_status(run_dir)
    show(run.table())
    typer.echo("\n".join(run.lines()))


def pack(
    checkpoint: Annotated[Path, typer.Argument(parser=_path, help="A training checkpoint: RUN/checkpoints/step-...")],
    output: Annotated[Path, typer.Option(parser=_path, help="The .nemo file to write.")],
    assets: Annotated[Path | None, typer.Option(parser=_path, help="Hugging Face files. [default: RUN/hf_assets]")] = None,
) -> None:
    """Make a .nemo file of a training checkpoint, a weights-only one too, for evaluation or export."""
    from nemo_ampo.checkpoint.nemo_file import MODEL_CONFIG_NAME, check_model_config
    from nemo_ampo.checkpoint.nemo_writing import pack_nemo
    from nemo_ampo.checkpoint.pickles import check_pickles
    from nemo_ampo.checkpoint.store import MANIFEST, WEIGHTS, Manifest, check_content

    manifest = Manifest.load(checkpoint / MANIFEST)
    needed = [name for name in manifest.files if name.split("/")[0] in (WEIGHTS, MODEL_CONFIG_NAME)]
    check_content(checkpoint, manifest, needed)
    check_model_config(checkpoint / MODEL_CONFIG_NAME)
    check_pickles(checkpoint / WEIGHTS)
    pack_nemo(checkpoint, output, assets or checkpoint.absolute().parent.parent / "hf_assets")
    typer.echo(f"wrote {output}")


PassedOn = Annotated[list[str] | None, typer.Argument(metavar="[OPTIONS]...", hidden=True)]


def estimate(
    stage: Annotated[str, typer.Argument(help="ampo or evaluate")],
    overrides: Overrides = None,
    config_name: ConfigName = "tiny",
    config_dir: ConfigDir = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(parser=_path, help="Hugging Face folder of the judge's tokenizer; 4 characters a token without it."),
    ] = None,
    reply_tokens: Annotated[int, typer.Option(help="Tokens of a judge's reply.", min=1)] = 350,
) -> None:
    """Estimate a stage's judge before it starts: calls, tokens, dollars. Asks nobody."""
    from nemo_ampo.commands import judge as commands
    from nemo_ampo.judge.estimate import estimate_table

    rows, notes = commands.estimate(stage, config_name, overrides or [], config_dir, tokenizer, reply_tokens)
    show(estimate_table(rows, "4 characters a token" if tokenizer is None else str(tokenizer)))
    for note in notes:
        typer.echo(note)


def check_judge(
    stage: Annotated[str, typer.Argument(help="ampo or evaluate")],
    overrides: Overrides = None,
    config_name: ConfigName = "tiny",
    config_dir: ConfigDir = None,
    turns: Annotated[int, typer.Option(help="Dialogues of the stage's data to try each attack on.", min=1)] = 8,
    max_gain: Annotated[float, typer.Option(help="Mean gain of an attack that is still fine, points of 10.")] = 1.0,
) -> None:
    """Measure what hostile replies gain with a stage's judge. Exit status 1 when one gains more than --max-gain."""
    from nemo_ampo.commands import judge as commands

    results = commands.check_judge(stage, config_name, overrides or [], config_dir, turns)
    show(commands.injection_table(results))
    if any(result.gain is not None and result.gain > max_gain for result in results):
        raise typer.Exit(EXIT_NOT_OK)


DOORS = {
    "quickstart": ("recipes.quickstart", "Run everything in a row on a laptop: a tiny model in the embedded world."),
    "pipeline": ("recipes.pipeline", "Run a recipe of configs/pipeline on this machine."),
    "convert": ("converters.hf_to_nemo", "Make a .nemo file of a Hugging Face folder."),
    "bc": ("recipes.bc", "Clone the four modes of thinking."),
    "ampo": ("recipes.ampo", "Teach the policy when to think."),
    "export": ("converters.nemo_to_hf", "Make a Hugging Face folder of a .nemo file."),
    "verify": ("converters.verify", "Compare a .nemo file with a Hugging Face folder: weights, files, config, logits."),
    "evaluate": ("recipes.evaluate", "Answer held-out turns with an exported checkpoint, judge the answers."),
    "sotopia": ("recipes.sotopia", "Play and score SOTOPIA episodes."),
    "serve": ("nemo_ampo.commands.serve", "Serve a checkpoint as an OpenAI-compatible chat API."),
    "generate": ("nemo_ampo.commands.generate", "Write bc or rl rows with a teacher model."),
    "world": ("nemo_ampo.world", "Write the embedded world as data files."),
    "demo-judge": ("nemo_ampo.world.judge_server", "Serve the embedded rule-based judge."),
    "rollout-doctor": ("recipes.rollout_doctor", "Compare a rollout engine with the trainer before a run is trusted to it."),
}
"""Programs with a command line of their own: name to module, which ``python -m`` starts as well, and what it does."""


def _through(module: str, what: str) -> Callable[..., None]:
    def door(arguments: PassedOn = None) -> None:
        import runpy

        sys.argv[1:] = arguments or []
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    door.__doc__ = what
    return door


COMMANDS: dict[str, Callable[..., None]] = {
    **{name: _through(module, what) for name, (module, what) in DOORS.items()},
    "doctor": doctor,
    "check-config": check_config,
    "estimate": estimate,
    "check-judge": check_judge,
    "score": score,
    "report": report,
    "plan": plan,
    "rehearse": rehearse,
    "pack": pack,
    "status": status,
}
"""Name to function; a function's docstring is its help."""

_OWN_OPTIONS = {"ignore_unknown_options": True, "help_option_names": []}


def make_app() -> typer.Typer:
    """The command line of :data:`COMMANDS`."""
    app = typer.Typer(
        name="nemo-ampo",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_program)
    for name, function in COMMANDS.items():
        panel = "Stages and servers, with options of their own" if name in DOORS else "Around them"
        settings = _OWN_OPTIONS if name in DOORS else None
        app.command(name, context_settings=settings, rich_help_panel=panel)(printable_output()(function))
    return app


def _say_version(asked: bool) -> None:
    if asked:
        from nemo_ampo import __version__

        typer.echo(f"nemo-ampo {__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say it and end.")
    ] = False,
) -> None:
    """Teach a language model when to think: its stages, and the commands around them."""


def main() -> None:
    """Entry point of the ``nemo-ampo`` script."""
    try:
        with full_or_read_only():
            make_app()()
    except UserError as error:
        problem = str(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("nemo_ampo", "recipes", "converters"):
            raise
        problem = f"{sys.executable} has no module {error.name}, which this command needs; `make setup` installs everything"
    else:
        return
    with printable_output():
        typer.echo(f"error: {problem}", err=True)
    sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
