"""What a batch job runs: a recipe and what Slurm gave become the command lines that ``slurm/*.sh`` start in order.

    python -m recipes.slurm show ampo.sh configs/pipeline/tiny.yaml run_dir=runs/mine ampo.rollout.group_size=32

``job`` prints them as assignments for the shell, ``show`` for a reader, ``submit`` the ``sbatch`` line; ``begin`` and
``end`` keep the record of attempts. Everything a user can get wrong is said here, before anything is started.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.job.attempts import AttemptLog, PlannedStage, Standing, write_plan
from nemo_ampo.output.lock import hold_run
from nemo_ampo.output.terminal import printable_output
from recipes.batch_checks import (
    DoesNotFitError,
    bytes_to_come,
    check_demo_judge,
    check_disk,
    check_stage_configs,
    check_submission,
    memory,
    own_rollout_server,
)
from recipes.batch_recipe import TRAINING, JudgeMode, PipelineConfig, read_recipe, start_of
from recipes.cluster import PORTS, Cluster, Image, Job, Line, Site
from recipes.pipeline import remember
from recipes.stages import stages_of

JUDGE_ONLY = "judge.sh"
PARTS: dict[str, tuple[str, ...]] = {
    "ampo.sh": (),
    "bc.sh": ("world", "checkpoint", "convert", "bc"),
    "evaluate.sh": ("export", "evaluate"),
    JUDGE_ONLY: (),
}
"""Stages of each script of ``slurm``, exports and evaluations without their policy's name; none named means all."""


@dataclass(frozen=True)
class Server:
    """A server of the job.

    Attributes:
        line: starts it.
        port: of its node.
        url: where it then answers,
        start_s: after at most so many seconds.
    """

    line: Line
    port: int
    url: str
    start_s: int


@dataclass(frozen=True)
class StageLine:
    """A stage of the pipeline and what starts it; its output shows that it is done."""

    name: str
    line: Line
    output: Path


@dataclass(frozen=True)
class BatchJob:
    """Everything that one attempt starts, in order.

    Attributes:
        run, logs: folders of the run and of this attempt's logs.
        port: first of the job's ports.
        images: containers, made before any clock runs.
        judge, rollout: servers that the job starts itself.
        model: Hugging Face folder the rollout server starts from, which a stage of the job may have to make first.
        preflight: without the rollout server's URL, which is known to answer only when it was started.
        stages: of the pipeline.
    """

    run: Path
    logs: Path
    port: int
    images: list[Image]
    judge: Server | None
    rollout: Server | None
    model: Path
    preflight: Line
    stages: list[StageLine]

    @property
    def for_shell(self) -> str:
        """Assignments of bash: a command line is an array; of several, each is one quoted word of an array."""
        named: dict[str, str | Sequence[str]] = {
            "RUN": str(self.run),
            "LOGS": str(self.logs),
            "PORT": str(self.port),
            "IMAGES": [image.name for image in self.images],
            "MAKE_IMAGES": [shlex.join(image.make) for image in self.images],
            "REMOVE_IMAGES": [shlex.join(image.remove) for image in self.images],
            "ROLLOUT_MODEL": str(self.model),
            "PREFLIGHT": self.preflight,
            "STAGES": [stage.name for stage in self.stages],
            "LINES": [shlex.join(stage.line) for stage in self.stages],
            "OUTPUTS": [str(stage.output) for stage in self.stages],
        }
        for name, server in (("JUDGE", self.judge), ("ROLLOUT", self.rollout)):
            named[name] = server.line if server else []
            named[f"{name}_PORT"] = str(server.port if server else 0)
            named[f"{name}_URL"] = server.url if server else ""
            named[f"{name}_START_S"] = str(server.start_s if server else 0)
        return "\n".join(
            f"{name}={shlex.quote(value) if isinstance(value, str) else f'({shlex.join(value)})'}"
            for name, value in named.items()
        )

    @property
    def for_reader(self) -> str:
        """Every line in the order in which they are started."""
        servers = [server.line for server in (self.judge, self.rollout) if server]
        rollout = ["--rollout-url", self.rollout.url] if self.rollout else []
        lines = [*(image.make for image in self.images), *servers, [*self.preflight, *rollout]]
        lines += [*(stage.line for stage in self.stages), *(image.remove for image in self.images)]
        return "\n".join(shlex.join(line) for line in lines if line)


def servers_of(script: str, recipe: PipelineConfig) -> list[str]:
    """Which servers the job must start itself, in the order of their groups."""
    drawn = script == "ampo.sh" and own_rollout_server(recipe) is not None
    judged = recipe.judge.mode is JudgeMode.hetjob
    return [] if script == JUDGE_ONLY else ["judge"] * judged + ["rollout"] * drawn


def groups_of(servers: Sequence[str], groups: int, script: str, site: Site) -> dict[str, int]:
    """Which group of the job runs each server; group 0 is the trainer's.

    A job without a group for its judge runs it beside the trainer, as long as that takes no GPU.

    Raises:
        ConfigError: there are too few groups.
    """
    if groups == len(servers) and "judge" in servers and not site.judge_gpus:
        return {server: number for number, server in enumerate(servers)}
    if groups <= len(servers):
        raise ConfigError(
            f"this job has no group for each of: {' '.join(servers)}; submit with slurm/{script}, or "
            f"sbatch OPTIONS : OPTIONS slurm/{script}"
        )
    return {server: number for number, server in enumerate(servers, 1)}


def prepare(script: str, recipe: PipelineConfig, site: Site, job: Job, *, record: bool, dry: bool = False) -> BatchJob:
    """Everything that a job starts.

    Args:
        script: of ``slurm``, which says the part of the pipeline.
        recipe: checked.
        site: the cluster.
        job: what Slurm gave.
        record: keep the plan in the run folder.
        dry: let the rollout server's own script show its line.

    Raises:
        ConfigError: a stage, a server or the job's groups are wrong.
    """
    groups = groups_of(servers_of(script, recipe), len(job.hosts), script, site)
    run = Path(recipe.run_dir).resolve()
    cluster = Cluster(site, job, run / "logs" / f"{job.number}-{job.restart}")
    # Ports differ from job to job, and from stage to stage, so that none waits for its predecessor's to be released. They
    # end below the range from which systems hand out ports of their own.
    port = site.port or 20000 + job.number * PORTS % 12000
    judge_group = 0 if script == JUDGE_ONLY else groups.get("judge")
    judge = rollout = None
    if judge_group is not None:
        at = recipe.judge.port or port + PORTS - 1
        url = f"http://{job.hosts[judge_group]}:{at}/v1"
        if not site.judge_command:
            check_demo_judge(recipe)
        judge = Server(cluster.judge(judge_group, at), at, url, recipe.judge.start_s)
    images = cluster.images(judge_group, trainer=script != JUDGE_ONLY)
    if script == JUDGE_ONLY:
        return BatchJob(run, cluster.logs, port, images, judge, None, Path(), [], [])
    limits = own_rollout_server(recipe)
    if "rollout" in groups and limits is not None:
        at = recipe.rollout.port or port + PORTS - 2
        line = cluster.rollout_server(groups["rollout"], at, run, start_of(recipe), limits.options, dry=dry)
        if dry:
            line = shlex.split(subprocess.check_output(line, text=True))
        rollout = Server(line, at, f"http://{job.hosts[groups['rollout']]}:{at}", recipe.rollout.start_s)
    judge_url = judge.url if judge else recipe.judge.base_url or ""
    stages = stages_of(recipe, judge_url, rollout.url if rollout else "")
    if PARTS[script]:
        stages = [stage for stage in stages if stage.name.split("-")[0] in PARTS[script]]
    with_mpi = check_stage_configs(stages, job.nodes * site.ranks_per_node, site)
    if record:
        _record(recipe)
    lines = [
        StageLine(
            stage.name,
            cluster.stage(stage.name, stage.command, everywhere=stage.name in TRAINING, mpi=stage.name in with_mpi),
            stage.output,
        )
        for stage in stages
    ]
    needs = "tensorrt_llm" if with_mpi else ""
    preflight = cluster.preflight(run, math.ceil(bytes_to_come(recipe) / 1e9), judge_url, needs)
    return BatchJob(run, cluster.logs, port, images, judge, rollout, start_of(recipe), preflight, lines)


def _record(recipe: PipelineConfig) -> None:
    """The run folder's settings, and its plan for ``nemo-ampo status``."""
    folder = Path(recipe.run_dir)
    with hold_run(folder):
        remember(recipe)
        write_plan(folder, [PlannedStage(s.name, str(s.output), s.name in TRAINING) for s in stages_of(recipe, "")])


def _site(script: str) -> Site:
    site = Site.of(Path(os.environ.get("AMPO_ROOT") or Path(__file__).parents[1]), os.environ)
    return site.judge_alone if script == JUDGE_ONLY else site


def _recipe(args: argparse.Namespace) -> PipelineConfig:
    recipe = read_recipe(Path(args.recipe), args.overrides)
    if recipe.judge.mode is JudgeMode.demo:
        raise ConfigError("judge.mode: demo is for python -m recipes.pipeline; in a batch job it can be hetjob or external")
    return recipe


def _job(args: argparse.Namespace, recipe: PipelineConfig, site: Site) -> Job:
    """What Slurm gave; outside of a job, what will be asked of it, with names made up."""
    if args.hosts:
        return Job(args.job, args.restart, args.nodes, tuple(args.hosts.split(",")), args.cpus)
    hosts = ("node1", *(f"{server}1" for server in servers_of(args.script, recipe)))
    return Job(args.job, args.restart, site.nodes, hosts, args.cpus)


def job_command(args: argparse.Namespace) -> None:
    """Print what the job starts, for the shell, and write the plan into the run folder."""
    site, recipe = _site(args.script), _recipe(args)
    print(prepare(args.script, recipe, site, _job(args, recipe, site), record=True).for_shell)


def submit_command(args: argparse.Namespace) -> None:
    """Print the sbatch line; what is wrong, or does not fit its GPUs, is refused, the latter with ``--force`` only said."""
    site, recipe = _site(args.script), _recipe(args)
    prepare(args.script, recipe, site, _job(args, recipe, site), record=False)
    if args.script != JUDGE_ONLY:
        check_submission(recipe, PARTS[args.script], site)
        _say_what_does_not_fit(args.script, recipe, site, forced=args.force)
    print(shlex.join(_sbatch(args, recipe, site)))


def show_command(args: argparse.Namespace) -> None:
    """Print the sbatch line, the script, every line of the job, its memory and the resolved recipe."""
    site, recipe = _site(args.script), _recipe(args)
    batch = prepare(args.script, recipe, site, _job(args, recipe, site), record=False, dry=True)
    script = site.root / "slurm" / args.script
    print(f"# submit\n{shlex.join(_sbatch(args, recipe, site))}\n\n# script: {script}\n{script.read_text()}\n# srun")
    print(batch.for_reader)
    if site.gpus_per_node and args.script != JUDGE_ONLY:
        print("\n# memory", flush=True)
        _say_what_does_not_fit(args.script, recipe, site, forced=True)
    print(f"\n# recipe\n{OmegaConf.to_yaml(OmegaConf.structured(recipe))}", end="")


def _sbatch(args: argparse.Namespace, recipe: PipelineConfig, site: Site) -> Line:
    return site.sbatch_line(args.script, args.recipe, args.overrides, servers_of(args.script, recipe))


def _say_what_does_not_fit(script: str, recipe: PipelineConfig, site: Site, forced: bool) -> None:
    try:
        for line in memory(recipe, PARTS[script], site) if site.gpus_per_node else ():
            print(line, file=sys.stderr)
        check_disk(recipe, site)
    except DoesNotFitError as error:
        if not forced:
            raise
        print(f"warning: {error}", file=sys.stderr)


def begin_command(args: argparse.Namespace) -> None:
    """Note the start of an attempt; refuse one that would only repeat what failed."""
    folder = Path(args.run_dir)
    AttemptLog(folder).begin(args.job, args.restart, _site("").max_restarts, Standing.of(folder))


def end_command(args: argparse.Namespace) -> None:
    """Note the end of an attempt and print ``requeue`` or why not."""
    folder = Path(args.run_dir)
    log = AttemptLog(folder)
    log.end(args.status, args.reason, Standing.of(folder))
    print(log.decide(_site("").max_restarts))


@printable_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Command line for the shell scripts; exit status 2 for what the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m recipes.slurm", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for function in (job_command, submit_command, show_command):
        sub = commands.add_parser(function.__name__.partition("_")[0], description=function.__doc__)
        sub.set_defaults(function=function)
        sub.add_argument("--job", type=int, default=0, help="id of the job")
        sub.add_argument("--restart", type=int, default=0, help="how often it was put back into the queue")
        sub.add_argument("--nodes", type=int, default=1, help="of the trainer's group")
        sub.add_argument("--hosts", default="", help="first node of each group, with commas; none outside of a job")
        sub.add_argument("--cpus", type=int, default=0, help="processors per task")
        sub.add_argument("--force", action="store_true", help="also what does not fit its GPUs")
        sub.add_argument("script", choices=PARTS)
        sub.add_argument("recipe")
        sub.add_argument("overrides", nargs="*", metavar="key=value")
    for function in (begin_command, end_command):
        sub = commands.add_parser(function.__name__.partition("_")[0], description=function.__doc__)
        sub.set_defaults(function=function)
        sub.add_argument("run_dir")
        if function is begin_command:
            sub.add_argument("--job", required=True)
            sub.add_argument("--restart", type=int, required=True)
        else:
            sub.add_argument("--status", type=int, required=True)
            sub.add_argument("--reason", required=True)
    args = parser.parse_args(argv)
    try:
        args.function(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
