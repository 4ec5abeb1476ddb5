"""Presets and knobs: what a preset is, what overrides it, what is refused, and that every knob does something."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nemo_ampo.algo.algorithm import KNOBS, PRESETS, Aggregate, AlgorithmConfig, KlKind, check_algorithm
from nemo_ampo.algo.credit import assign_credit, kl_penalties
from nemo_ampo.algo.loss import AGGREGATES, KL_KINDS, Totals, token_loss, update_weights, weighted_sum
from nemo_ampo.algo.mismatch import importance_weights
from nemo_ampo.config.compose import compose
from nemo_ampo.config.reading import read_config
from nemo_ampo.config.stages import AmpoConfig
from nemo_ampo.errors import ConfigError
from nemo_ampo.types import RewardParts, Sample

GIVEN = ["run.dir=r", "run.init_from=m", "data.train=t", "judge.base_url=http://localhost:1/v1"]


def read(*overrides: str) -> AlgorithmConfig:
    return read_config(compose("ampo", "tiny", [*GIVEN, *overrides]), AmpoConfig).algorithm


# presets


def test_the_default_preset_is_the_default_of_every_knob() -> None:
    assert read() == AlgorithmConfig() == PRESETS["ampo"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_chosen_by_name_and_is_possible(name: str) -> None:
    assert read(f"algorithm.preset={name}") == PRESETS[name]
    check_algorithm(PRESETS[name])


@pytest.mark.parametrize("order", [1, -1])
def test_one_knob_can_be_changed_whatever_the_order(order: int) -> None:
    overrides = ["algorithm.preset=dapo", "algorithm.clip_high=0.4", "algorithm.drop_decided_groups=false"]
    assert read(*overrides[::order]) == replace(PRESETS["dapo"], clip_high=0.4, drop_decided_groups=False)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("other", ["ampo", "gspo"])
def test_every_knob_can_be_given_any_presets_value(name: str, other: str) -> None:
    values = {knob: getattr(PRESETS[other], knob) for knob in KNOBS}
    given = [f"algorithm.{knob}={'null' if value is None else value}" for knob, value in values.items()]
    assert read(f"algorithm.preset={name}", *given) == replace(PRESETS[other], preset=name)


def test_a_section_without_composition_follows_its_preset_too() -> None:
    """Also `off` without quotes, which YAML reads as false."""
    raw = compose("ampo", "tiny", GIVEN)
    raw.algorithm = OmegaConf.create("{preset: rloo, kl: off, kl_coef: 0}")
    assert read_config(raw, AmpoConfig).algorithm == replace(PRESETS["rloo"], kl="off", kl_coef=0.0)


def test_a_composed_config_shows_the_presets_numbers() -> None:
    shown = OmegaConf.to_container(compose("ampo", "tiny", ["algorithm.preset=gspo"]), resolve=False)
    assert isinstance(shown, dict)
    assert (shown["algorithm"]["clip_high"], shown["algorithm"]["ratio"]) == (4e-4, "sequence")


def test_presets_are_different_algorithms() -> None:
    values = [tuple(getattr(preset, knob) for knob in KNOBS) for preset in PRESETS.values()]
    assert len(set(values)) == len(PRESETS)


def test_every_name_a_knob_allows_has_its_function() -> None:
    assert set(KlKind) == set(KL_KINDS)
    assert set(Aggregate) == set(AGGREGATES)


def test_nothing_in_the_library_asks_for_a_presets_name() -> None:
    """A preset is nothing but values: outside of the file that lists them no name is compared."""
    library = Path(__file__).resolve().parents[3] / "nemo_ampo"
    for path in library.rglob("*.py"):
        assert ".preset ==" not in path.read_text(encoding="utf-8"), path


# what is refused


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.preset=ppo"], "algorithm.preset: expected one of ampo-paper, ampo, "),
        (["algorithm.preset=3"], "algorithm.preset: expected one of"),
        (["algorithm.scale=std"], "algorithm.scale"),
        (["algorithm.ratio=group"], "algorithm.ratio"),
        (["algorithm.clip_low=1.0"], "algorithm.clip_low: must be a number of at least 0 and below 1"),
        (["algorithm.clip_high=-0.1"], "algorithm.clip_high"),
        (["algorithm.dual_clip=1.0"], "algorithm.dual_clip: must be a number above 1"),
        (["algorithm.constant_tokens=0"], "algorithm.constant_tokens"),
        (["algorithm.constant_tokens=100"], "algorithm.constant_tokens: 100 has no effect with algorithm.aggregate=token"),
        (["algorithm.kl_coef=-1"], "algorithm.kl_coef"),
        (["algorithm.kl=off"], "algorithm.kl_coef: 0.001 has no effect with algorithm.kl=off"),
        (["algorithm.preset=dapo", "algorithm.kl_coef=0.1"], "algorithm.kl_coef"),
        (["algorithm.tie_tolerance=0.1"], "algorithm.tie_tolerance: 0.1 has no effect with algorithm.advantage=ampo;"),
        (
            ["algorithm.preset=ampo-robust", "algorithm.tie_tolerance=0"],
            "algorithm.tie_tolerance: must be a number of at least 1e-06",
        ),
        (["algorithm.preset=grpo", "algorithm.mode_credit=mode_tokens"], "algorithm.mode_credit: .*needs? ampo or"),
        (["algorithm.preset=ampo-paper", "algorithm.scale=none"], "algorithm.advantage: ampo_paper knows only"),
        (["algorithm.mismatch_high=3"], "algorithm.mismatch_high: 3.0 has no effect with algorithm.mismatch=off"),
        (["algorithm.mismatch=truncate", "algorithm.mismatch_low=0.1"], "algorithm.mismatch_low"),
        (
            ["algorithm.mismatch=mask", "algorithm.mismatch_high=0.9"],
            "algorithm.mismatch_high: must be a number of at least 1",
        ),
    ],
)
def test_impossible_knobs_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_algorithm(read(*overrides))


# every knob does something


def sample(group: int, reward: float | None, mode: int, tokens: int, goal: float | None) -> Sample:
    valid = reward is not None
    parts = RewardParts(reward, goal, None, mode, valid, None if mode else "level")
    return Sample(
        group=group,
        row_id="row",
        turn=0,
        dialogue="",
        tag=None,
        text="",
        num_tokens=tokens,
        answer_tokens=tokens // 2,
        finish="eos",
        parts=parts,
        mode_tokens=(0, 2) if mode else (0, 0),
    )


SAMPLES = [
    *(sample(0, 0.1 * i, mode, 2 + i, 0.1 * i) for i, mode in enumerate([1, 1, 2, 2, 3, 3, 4, 4])),
    *(sample(1, r, mode, n, 0.5) for r, mode, n in [(0.5, 1, 3), (0.5, 1, 4), (0.505, 3, 7), (0.5, 3, 5)]),
    *(
        sample(2, r, mode, n, g)
        for r, mode, n, g in [(0.9, 1, 4, 0.9), (None, 2, 5, None), (-2.0, 0, 6, None), (0.3, 4, 7, 0.3)]
    ),
    # Sums of this constant are not exact in float32, which is where the paper's arithmetic shows.
    *(sample(3, 5 / 6, mode, 3, 5 / 6) for mode in [1, 1, 2, 2, 3, 3, *[4] * 10]),
]
B, T = len(SAMPLES), 10


def training_signal(rules: AlgorithmConfig) -> torch.Tensor:
    """Gradient of the loss of all samples, in two micro-batches, by the log-probabilities and the entropies."""
    g = torch.Generator().manual_seed(11)
    old_BT = -torch.rand(B, T, generator=g, dtype=torch.float64) * 2
    logprobs_BT = (old_BT + 0.4 * torch.randn(B, T, generator=g, dtype=torch.float64)).requires_grad_()
    sampling_BT = old_BT + 0.5 * torch.randn(B, T, generator=g, dtype=torch.float64)
    ref_BT = old_BT + 0.5 * torch.randn(B, T, generator=g, dtype=torch.float64)
    entropy_BT = torch.rand(B, T, generator=g, dtype=torch.float64).requires_grad_()
    mask_BT = torch.arange(T) < torch.tensor([s.num_tokens for s in SAMPLES])[:, None]
    credit = assign_credit(SAMPLES, kl_penalties(old_BT, ref_BT, mask_BT, rules), rules)
    trained_BT = mask_BT & credit.shares.trained_B[:, None]
    weights_BT = importance_weights(old_BT, sampling_BT, mask_BT, rules)
    batch = {
        "old_logprobs_BT": old_BT,
        "ref_logprobs_BT": ref_BT,
        "advantages_BT": credit.shares.per_token(mask_BT) * weights_BT,
        "mask_BT": trained_BT,
    }
    totals = Totals.of(trained_BT) if rules.aggregate_over == "batch" else None
    tokens = token_loss(logprobs_BT, entropy_BT, batch, rules)
    loss = weighted_sum(tokens.loss_BT, update_weights(trained_BT, 2, rules, totals, 1) / 2)
    loss.backward()
    assert logprobs_BT.grad is not None and entropy_BT.grad is not None
    return torch.cat([logprobs_BT.grad, entropy_BT.grad])


CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"advantage": "grpo"}),
    ({}, {"advantage": "ampo_robust"}),
    ({}, {"advantage": "ampo_paper"}),
    ({"advantage": "ampo_robust"}, {"tie_tolerance": 0.2}),
    ({}, {"baseline": "leave_one_out"}),
    ({}, {"scale": "batch_std"}),
    ({}, {"scale": "none"}),
    ({}, {"judge_failure": "zero"}),
    ({}, {"drop_decided_groups": True}),
    ({}, {"mode_credit": "mode_tokens"}),
    ({}, {"ratio": "sequence"}),
    ({}, {"clip_low": 0.1}),
    ({}, {"clip_high": 0.3}),
    ({}, {"dual_clip": 1.1}),
    ({}, {"aggregate": "sequence_mean"}),
    ({}, {"aggregate": "constant"}),
    ({"aggregate": "constant"}, {"constant_tokens": 10}),
    ({}, {"aggregate_over": "batch"}),
    ({}, {"kl": "in_reward"}),
    ({}, {"kl": "off", "kl_coef": 0.0}),
    ({}, {"kl_coef": 0.1}),
    ({}, {"kl_kind": "k1"}),
    ({}, {"kl_kind": "k2"}),
    ({"kl": "in_reward"}, {"kl_kind": "k2"}),
    ({}, {"entropy_coef": 0.0}),
    ({}, {"mismatch": "truncate"}),
    ({}, {"mismatch": "mask"}),
    ({"mismatch": "truncate"}, {"mismatch_level": "sequence"}),
    ({"mismatch": "truncate"}, {"mismatch_high": 1.2}),
    ({"mismatch": "mask"}, {"mismatch_low": 0.9}),
]


@pytest.mark.parametrize(("before", "change"), CHANGES, ids=lambda knobs: ",".join(f"{k}={v}" for k, v in knobs.items()))
def test_every_knob_changes_what_is_learned(before: dict[str, Any], change: dict[str, Any]) -> None:
    one, other = AlgorithmConfig(**before), AlgorithmConfig(**(before | change))
    moved = (training_signal(one) - training_signal(other)).abs().max()
    assert moved > 1e-6


def test_no_knob_is_left_out() -> None:
    tried = {knob for _, change in CHANGES for knob in change}
    assert tried == {f.name for f in fields(AlgorithmConfig)} - {"preset"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_learns_something_else(name: str) -> None:
    signal = training_signal(PRESETS[name])
    assert signal.isfinite().all() and signal.abs().max() > 0
    for other in PRESETS:
        assert other == name or (training_signal(PRESETS[other]) - signal).abs().max() > 1e-9


def test_the_reward_pays_for_its_distance_from_the_reference() -> None:
    """Two tokens at x = ref - old = 0.1 and -0.3: k1 sums to 0.2, k2 to 0.05, k3 to e^0.1 + e^-0.3 - 1.8."""
    old_BT = torch.tensor([[-1.0, -1.0, -9.0]], dtype=torch.float64)
    ref_BT = torch.tensor([[-0.9, -1.3, -1.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, False]])
    expected = {"k1": 0.2, "k2": 0.05, "k3": math.exp(0.1) + math.exp(-0.3) - 1.8}
    for kind, kl in expected.items():
        rules = AlgorithmConfig(kl="in_reward", kl_coef=0.5, kl_kind=kind)
        assert kl_penalties(old_BT, ref_BT, mask_BT, rules) == pytest.approx([0.5 * kl])
    assert kl_penalties(old_BT, ref_BT, mask_BT, AlgorithmConfig()) == [0.0]
