"""Which settings make a run the run it is? A resume under others would be a different run that looks like one."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_ampo.checkpoint.config import CheckpointConfig
from nemo_ampo.checkpoint.nemo_file import content_hash
from nemo_ampo.checkpoint.store import Store
from nemo_ampo.errors import ConfigError
from nemo_ampo.judge.client import verdict_protocol
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.overrides import dotted

WATCHED = (
    "run.seed",
    "algorithm",
    "reward",
    "rollout",
    "guard.min_valid",
    "judge.model",
    "judge.prompt",
    "judge.temperatures",
    "model.optim",
    "model.global_batch_size",
    "model.micro_batch_size",
    "trainer.precision",
    "trainer.gradient_clip_val",
)
"""Keys and sections that decide a run's numbers."""
SUPERSEDED = {"judge.prompt": "judge.prompt.text"}
"""A name, and the content that tells more: the name only counts where an older version wrote no content down."""
HARMLESS = ("rollout.batch_size", "rollout.probe", "rollout.trtllm", "rollout.trtllm_server")
"""Below a watched section, yet without influence on results."""
FREE_FORM = ("model.optim",)
"""Sections without a fixed set of keys: a key that appears is a change, not a newer version's default."""


def identity(cfg: DictConfig, hashes: Mapping[str, Any]) -> dict[str, Any]:
    """The watched settings, flat, with the hashes of what the run reads.

    Args:
        cfg: composed config, before NeMo changes it.
        hashes: of :func:`inputs` and :func:`verdict_identity`; a moved file is the same file.
    """
    flat = {key: value for key, value in dotted(OmegaConf.to_container(cfg, resolve=True)) if value != {}}
    watched = {key: value for key, value in flat.items() if _below(key, WATCHED) and not _below(key, HARMLESS)}
    if cfg.model.optim.get("sched") is not None:
        # The schedule is laid over these many steps; without one they only say when to stop.
        watched |= {key: value for key, value in flat.items() if key == "trainer.max_steps"}
    return watched | dict(hashes)


def inputs(data_hashes: Mapping[str, str], init_from: str, token_ids: Iterable[Sequence[int]]) -> dict[str, str]:
    """What a run reads, as :func:`identity` takes it.

    Args:
        data_hashes: sha256 by file.
        init_from: the starting policy, which is also the reference of the KL term.
        token_ids: of every row: tokenizer, chat template and system prompt show here.
    """
    tokens = hashlib.sha256()
    for row in token_ids:
        tokens.update(array("q", (len(row), *row)).tobytes())
    return {
        "data": " ".join(data_hashes.values()),
        "data.tokens": tokens.hexdigest(),
        "run.init_from": content_hash(init_from),
    }


def verdict_identity(judge: JudgeConfig) -> dict[str, Any]:
    """What decides a verdict, as :func:`identity` takes it: of the prompt its text, of the pool its models.

    Raises:
        ConfigError: no such prompt.
    """
    asked = verdict_protocol(judge)
    text = asked.pop("prompt")
    return {f"judge.{name}": value for name, value in asked.items()} | {"judge.prompt.text": text}


def check_resume(
    run_dir: Path,
    config: CheckpointConfig,
    settings: Mapping[str, Any],
    allowed: Sequence[str],
    defaults: Mapping[str, Any],
) -> None:
    """Before anything heavy is loaded: would this start continue its run folder as the same run?

    Args:
        run_dir, config: where the checkpoints are.
        settings: :func:`identity` of this start.
        allowed, defaults: as :func:`check_unchanged` has them.

    Raises:
        ConfigError: as :func:`check_unchanged`.
    """
    checkpoints = Store.of_run(run_dir, config).resumable()
    if checkpoints:
        check_unchanged(checkpoints[0].manifest.config, settings, allowed, str(checkpoints[0].path), defaults)


def check_unchanged(
    old: Mapping[str, Any], new: Mapping[str, Any], allowed: Sequence[str], where: str, defaults: Mapping[str, Any]
) -> list[str]:
    """May a run with the ``new`` identity continue one with the ``old``?

    Args:
        old: of the checkpoint. One that an older version wrote does not know all keys.
        new: of this start.
        allowed: keys or sections that may differ (``run.allow_changed``).
        where: the checkpoint, for the message.
        defaults: the identity of a run that changes nothing: a key that is unknown to ``old`` had this value.

    Returns:
        the keys that differ and may.

    Raises:
        ConfigError: naming each key that differs and may not.
    """
    old = {key: value for key, value in old.items() if SUPERSEDED.get(key) not in old}
    changed = sorted(key for key in old if key in new and old[key] != new[key])
    changed += sorted(key for key in old if key not in new)
    appeared = [key for key in new if key not in old and key not in SUPERSEDED]
    changed += sorted(key for key in appeared if _below(key, FREE_FORM) or new[key] != defaults.get(key, new[key]))
    refused = [key for key in changed if not _below(key, allowed)]
    if refused:
        told = "; ".join(f"{key}: {_short(old.get(key, 'absent'))} -> {_short(new.get(key, 'absent'))}" for key in refused)
        raise ConfigError(
            f"{told}: {where} was written under other settings; continuing would silently change the run. Choose another "
            f"run.dir, or allow it with 'run.allow_changed=[{','.join(refused)}]'"
        )
    return changed


def _below(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}…"
