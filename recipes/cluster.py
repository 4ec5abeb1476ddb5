"""The cluster of a batch job: what its users say of it, what Slurm gave, and the lines that start a job's steps there.

Words of a command line come out, decided by the arguments alone; nothing is started and no machine is asked.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from nemo_ampo.errors import ConfigError
from nemo_ampo.ranges import LARGEST_PORT

NO_CONTAINER, PYXIS, APPTAINER = "none", "pyxis", "apptainer"
CONTAINERS = (NO_CONTAINER, PYXIS, APPTAINER)
PORTS = 16
"""Of one job: the rendezvous of each stage in turn, then the two servers."""
ENROOT_REMOVE = ("enroot", "remove", "--force")
Line = list[str]


@dataclass(frozen=True)
class Site:
    """A cluster as ``slurm/site.env`` describes it: ``AMPO_`` with a field's name is its variable, ``ROLLOUT_GPUS`` and
    ``ROLLOUT_CONTAINER`` besides; ``slurm/site.env.example`` explains each.

    Attributes:
        root: the project's folder, the same on all nodes.
    """

    root: Path
    sbatch: str = ""
    nodes: int = 1
    gpus_per_node: int = 0
    gpu_kind: str = "h100"
    ranks_per_node: int = 0
    container: str = NO_CONTAINER
    image: str = ""
    mounts: str = ""
    python: str = "python"
    mpi: str = "pmix"
    judge_gpus: int = 0
    judge_image: str = ""
    judge_command: str = ""
    rollout_gpus: int = 1
    rollout_container: str = ""
    max_restarts: int = 20
    min_free_gb: float | None = None
    port: int = 0

    @classmethod
    def of(cls, root: Path, environment: Mapping[str, str]) -> Site:
        """Read from environment variables; an empty one counts as none.

        Raises:
            ConfigError: naming the variable.
        """
        given = dict[str, object]()
        for f in fields(cls)[1:]:
            name = f.name.upper() if f.name.startswith("rollout_") else f"AMPO_{f.name.upper()}"
            if text := environment.get(name, ""):
                given[f.name] = text if isinstance(f.default, str) else _number(name, text, isinstance(f.default, int))
        site = cls(root, **given)  # type: ignore[arg-type]
        site._check()
        return site if site.ranks_per_node else replace(site, ranks_per_node=max(1, site.gpus_per_node))

    def _check(self) -> None:
        try:
            shlex.split(self.sbatch)
        except ValueError as error:
            raise ConfigError(f"AMPO_SBATCH: {self.sbatch!r} is no options of sbatch ({error})") from None
        if self.container not in CONTAINERS:
            raise ConfigError(f"AMPO_CONTAINER: expected {', '.join(CONTAINERS)}, got {self.container!r}")
        if self.nodes < 1:
            raise ConfigError(f"AMPO_NODES: expected a whole number of at least 1, got {self.nodes}")
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ConfigError(
                f"AMPO_RANKS_PER_NODE: {self.ranks_per_node} processes would share the {self.gpus_per_node} GPUs of "
                "AMPO_GPUS_PER_NODE; at most one per GPU"
            )
        if self.port > LARGEST_PORT - PORTS + 1:
            raise ConfigError(f"AMPO_PORT: {PORTS} ports from here on must be below {LARGEST_PORT + 1}, got {self.port}")
        if self.container != NO_CONTAINER and not self.image:
            raise ConfigError(f"AMPO_IMAGE: an image is required for AMPO_CONTAINER={self.container}")
        if self.judge_image and self.container == NO_CONTAINER:
            raise ConfigError("AMPO_JUDGE_IMAGE: nothing starts it; set AMPO_CONTAINER to pyxis or apptainer")
        if self.judge_image and not self.judge_command:
            raise ConfigError(
                "AMPO_JUDGE_IMAGE: the demo judge runs in AMPO_IMAGE; set AMPO_JUDGE_COMMAND to what this image serves"
            )

    def shows(self, path: Path) -> bool:
        """Whether a path of this machine is the same file inside the job's containers; links are followed."""
        if self.container == NO_CONTAINER:
            return True
        mounts = [(self.root, self.root)]
        for mount in filter(None, self.mounts.split(",")):
            source, _, target = mount.partition(":")
            mounts.append((Path(source), Path(target.split(":")[0] or source)))
        place, real = Path(os.path.normpath(path)), path.resolve()
        by_name = any(
            place.is_relative_to(target) and (source / place.relative_to(target)).resolve() == real
            for source, target in mounts
        )
        return by_name and any(real.is_relative_to(source.resolve()) for source, _ in mounts)

    @property
    def judge_alone(self) -> Site:
        """The same cluster, for a job that is nothing but a judge."""
        return replace(self, nodes=1, ranks_per_node=1, gpus_per_node=self.judge_gpus)

    def sbatch_line(self, script: str, recipe: str, overrides: list[str], servers: list[str]) -> Line:
        """What submits the job, with a group of one node for each server."""
        common = shlex.split(self.sbatch)
        line = ["sbatch", *common, f"--nodes={self.nodes}", f"--ntasks-per-node={self.ranks_per_node}"]
        line += [f"--gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []
        for server in servers:
            gpus = self.judge_gpus if server == "judge" else self.rollout_gpus
            line += [":", *common, "--nodes=1", "--ntasks=1", *([f"--gpus-per-node={gpus}"] if gpus else [])]
        return [*line, str(self.root / "slurm" / script), recipe, *overrides]


def _number(name: str, text: str, whole: bool) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**31:
        raise ConfigError(f"{name}: expected a {'whole ' if whole else ''}number of at least 0, got {text!r}")
    return value


@dataclass(frozen=True)
class Job:
    """What Slurm gave, or what would be asked of it.

    Attributes:
        number: the job's id; 0 where there is none yet.
        restart: how often it was put back into the queue.
        nodes: of the trainer's group.
        hosts: address of the first node of each group, the trainer's first.
        cpus: processors per task; 0 when nobody said.
    """

    number: int
    restart: int
    nodes: int
    hosts: tuple[str, ...]
    cpus: int = 0


@dataclass(frozen=True)
class Image:
    """A container image on the nodes of one group.

    Attributes:
        name: of the image.
        make: imports it, which takes minutes, once per node.
        remove: removes the container; pyxis does so by itself only where the site has set ``container_scope=job``.
    """

    name: str
    make: Line
    remove: Line


@dataclass(frozen=True)
class Cluster:
    """One job on one cluster."""

    site: Site
    job: Job
    logs: Path

    def srun(
        self,
        name: str,
        *command: str,
        group: int = 0,
        nodes: int = 1,
        tasks: int = 1,
        gpus: int = 0,
        cpus_of: int = 1,
        log: str = "",
        mpi: str = "none",
        image: str | None = None,
    ) -> Line:
        """One step of the job.

        Args:
            name: of the step.
            command: of every process.
            group: of a heterogeneous job.
            nodes: of that group.
            tasks: processes per node.
            gpus: per node.
            cpus_of: tasks whose processors one process may use.
            log: file of each process; empty for the job's own output.
            mpi: what ``srun --mpi`` takes.
            image: container image; empty for the node itself, None for the site's.
        """
        site, image = self.site, self.site.image if image is None else image
        line, inside = ["srun", f"--job-name={name}"], Line()
        if len(self.job.hosts) > 1:
            line.append(f"--het-group={group}")
        line += [f"--nodes={nodes}", f"--ntasks={nodes * tasks}", f"--ntasks-per-node={tasks}"]
        line += ["--overlap", "--kill-on-bad-exit=1"]
        if self.job.cpus:
            line.append(f"--cpus-per-task={self.job.cpus * cpus_of}")
        if gpus:
            line.append(f"--gpus-per-node={gpus}")
        line.append(f"--mpi={mpi}")
        if log:
            line += [f"--output={log}", "--open-mode=append"]
        mounts = f"{site.root}:{site.root}" + (f",{site.mounts}" if site.mounts else "")
        if image and site.container == PYXIS:
            # Pyxis keeps the container under this name, so that the job's next line on the node starts at once.
            line += [f"--container-image={image}", f"--container-name={self._container(image)}"]
            line += [f"--container-mounts={mounts}", f"--container-workdir={site.root}", "--no-container-mount-home"]
        elif image and site.container == APPTAINER:
            inside = ["apptainer", "exec", *(["--nv"] if gpus else []), "--bind", mounts, "--pwd", str(site.root), image]
        return [*line, str(site.root / "slurm" / "rank.sh"), *inside, *command]

    def python(self, *command: str) -> Line:
        """Arguments behind ``python -m`` as a command of the site's Python."""
        return [self.site.python, "-m", *command]

    def stage(self, name: str, command: tuple[str, ...], *, everywhere: bool, mpi: bool) -> Line:
        """A stage of the pipeline, as one process of each GPU or as a single one.

        The single one runs between those of the ranks, so it may use the processors of them all.
        """
        ranks, gpus, site = self.site.ranks_per_node, self.site.gpus_per_node, self.site
        words, mpi_kind = self.python(*command), site.mpi if mpi else "none"
        if everywhere:
            log = f"{self.logs}/{name}-rank%t.log"
            return self.srun(name, *words, nodes=self.job.nodes, tasks=ranks, gpus=gpus, log=log, mpi=mpi_kind)
        return self.srun(name, *words, gpus=min(1, gpus), cpus_of=ranks, log=f"{self.logs}/{name}.log", mpi=mpi_kind)

    def preflight(self, shared: Path, run_gb: float, judge_url: str, needs: str = "") -> Line:
        """Is every node fit to train, and is the module ``needs`` there? Asked by every rank."""
        site, job = self.site, self.job
        needed = run_gb if site.min_free_gb is None else site.min_free_gb
        words = ["nemo_ampo.job.preflight", "--shared", str(shared), "--token", f"{job.number}-{job.restart}"]
        words += ["--gpus", str(site.gpus_per_node), "--run-gb", f"{needed:g}", "--judge-url", judge_url]
        words += ["--needs", needs] if needs else []
        tasks, gpus = site.ranks_per_node, site.gpus_per_node
        return self.srun("preflight", *self.python(*words), nodes=job.nodes, tasks=tasks, gpus=gpus)

    def judge(self, group: int, port: int) -> Line:
        """The judge: the site's command, shell text that may use ``$JUDGE_PORT``, or the embedded one."""
        site = self.site
        demo = self.python("nemo_ampo.world.judge_server", "--host", "0.0.0.0", "--port", str(port))
        command = ["bash", "-c", site.judge_command] if site.judge_command else demo
        log, image = f"{self.logs}/judge.log", site.judge_image or site.image
        return self.srun("judge", *command, group=group, gpus=site.judge_gpus, log=log, image=image)

    def rollout_server(self, group: int, port: int, run: Path, model: Path, limits: str, *, dry: bool = False) -> Line:
        """The script of a rollout server, with the variables that it takes."""
        site = self.site
        variables = {
            "AMPO_ROOT": str(site.root),
            "ROLLOUT_HET_GROUP": str(group),
            "ROLLOUT_PORT": str(port),
            "ROLLOUT_GPUS": str(site.rollout_gpus),
            "ROLLOUT_LOG": f"{self.logs}/rollout-server.log",
        }
        if site.container != NO_CONTAINER:
            variables["ROLLOUT_CONTAINER"] = site.rollout_container or site.container
        script = [str(site.root / "slurm" / "rollout_server.sh"), *(["--dry-run"] if dry else []), str(run), str(model)]
        return ["env", *(f"{name}={value}" for name, value in variables.items()), *script, *limits.split()]

    def images(self, judge_group: int | None, trainer: bool = True) -> list[Image]:
        """The container images of the job, each once per place.

        Args:
            judge_group: group that the judge runs in; None without one.
            trainer: whether stages run in group 0.
        """
        site = self.site
        places = [(site.image, 0, self.job.nodes)] if trainer else []
        if judge_group is not None:
            places.append((site.judge_image or site.image, judge_group, 1))
        if judge_group == 0 and trainer and not site.judge_image:
            places.pop()
        return [
            Image(
                image,
                self.srun("image", "true", group=group, nodes=nodes, image=image),
                self.srun("remove", *ENROOT_REMOVE, f"pyxis_{self._container(image)}", group=group, nodes=nodes, image=""),
            )
            for image, group, nodes in places
            if site.container == PYXIS
        ]

    def _container(self, image: str) -> str:
        return f"ampo-{self.job.number}{'-judge' if image == self.site.judge_image else ''}"
