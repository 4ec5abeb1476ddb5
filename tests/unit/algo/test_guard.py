from __future__ import annotations

import math

import pytest
from omegaconf import OmegaConf

from nemo_ampo.algo.guard import GuardConfig, Streaks, small_groups, too_many_failed
from nemo_ampo.config.reading import read_config
from nemo_ampo.config.stages import AmpoConfig
from nemo_ampo.errors import ConfigError

SHARES = {f"mode/{k}/share": 0.25 for k in range(1, 5)}


def test_the_limit_itself_is_not_too_many() -> None:
    config = GuardConfig(max_failed_fraction=0.25)
    assert not too_many_failed(2, 8, config)
    assert too_many_failed(3, 8, config)
    assert not too_many_failed(0, 0, config)
    assert not too_many_failed(8, 8, GuardConfig(max_failed_fraction=1))
    assert too_many_failed(1, 1000, GuardConfig(max_failed_fraction=0))


def test_small_groups_by_hand() -> None:
    groups = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    valid = [True, True, True, True, False, True, False, False, False]
    assert small_groups(groups, valid, GuardConfig(min_valid=2)) == {2}
    assert small_groups(groups, valid, GuardConfig(min_valid=3)) == {1, 2}
    assert small_groups(groups, valid, GuardConfig(min_valid=1)) == {2}


def test_mismatch_over_the_limit_in_a_row_aborts_and_one_good_step_forgives() -> None:
    config = GuardConfig(max_mismatch_kl=0.1, abort_steps=3)
    bad, good = {"mismatch/kl": 0.2}, {"mismatch/kl": 0.1}
    streaks = Streaks.of([bad, bad, good, bad, bad], config)
    assert streaks.mismatch == 2 and streaks.abort_reason(config) is None
    reason = streaks.after(bad, config).abort_reason(config)
    assert reason is not None and "guard.max_mismatch_kl" in reason and "3 steps in a row" in reason


def test_a_mismatch_that_is_no_number_is_over_every_limit_and_a_missing_one_is_not() -> None:
    config = GuardConfig(abort_steps=1)
    assert Streaks().after({"mismatch/kl": math.nan}, config).abort_reason(config)
    assert Streaks().after({}, config).abort_reason(config) is None
    off = GuardConfig(abort_steps=1, max_mismatch_kl=None)
    assert Streaks().after({"mismatch/kl": 1e9}, off).abort_reason(off) is None


def test_skipped_updates_in_a_row_abort() -> None:
    config = GuardConfig(abort_steps=2)
    once = Streaks().after({"policy/skipped_updates": 1.0}, config)
    assert once.abort_reason(config) is None
    assert once.after({"policy/skipped_updates": 0.0}, config).skipped == 0
    reason = once.after({"policy/skipped_updates": 2.0}, config).abort_reason(config)
    assert reason is not None and "guard.abort_steps" in reason


def test_the_alarm_is_raised_once_per_mode_and_stops_only_if_told_to() -> None:
    config = GuardConfig(min_mode_share=0.05, collapse_steps=3)
    step = SHARES | {"mode/2/share": 0.04, "mode/4/share": 0.05}
    streaks, alarms = Streaks(), []
    for _ in range(5):
        before, streaks = streaks, streaks.after(step, config)
        alarms.append(streaks.new_alarm(before, config))
    assert [alarm is not None for alarm in alarms] == [False, False, True, False, False]
    assert alarms[2] is not None and "mode 2" in alarms[2] and "guard.min_mode_share" in alarms[2]
    assert streaks.collapsed(config) == [2]
    assert streaks.abort_reason(config) is None
    strict = GuardConfig(min_mode_share=0.05, collapse_steps=3, stop_on_collapse=True)
    assert "guard.stop_on_collapse: mode 2" in str(streaks.abort_reason(strict))
    assert streaks.after(SHARES, config).collapsed(config) == []


def test_metrics_of_the_streaks() -> None:
    config = GuardConfig(min_mode_share=0.05, collapse_steps=2, max_mismatch_kl=0.1)
    history = [SHARES | {"mode/1/share": 0.0, "mismatch/kl": 1.0, "policy/skipped_updates": 1.0}] * 2
    assert Streaks.of(history, config).metrics(config) == {
        "guard/mismatch_steps": 2,
        "guard/skipped_update_steps": 2,
        "guard/mode_1_low_steps": 2,
        "guard/mode_2_low_steps": 0,
        "guard/mode_3_low_steps": 0,
        "guard/mode_4_low_steps": 0,
        "guard/collapsed_modes": 1,
    }


@pytest.mark.parametrize(
    "key, value",
    [
        ("min_valid", 0),
        ("abort_steps", 0),
        ("collapse_steps", 0),
        ("max_failed_fraction", 1.5),
        ("min_mode_share", -0.1),
        ("step_retries", -1),
        ("retry_pause_s", -1.0),
        ("retry_pause_s", math.inf),
        ("max_mismatch_kl", 0.0),
    ],
)
def test_impossible_values_name_their_key(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"guard.{key}"):
        GuardConfig(**{key: value})  # type: ignore[arg-type]


def test_the_section_is_closed_and_null_switches_the_mismatch_limit_off() -> None:
    base = {"run": {"dir": "x", "init_from": "y"}, "judge": {"base_url": "http://h/v1", "model": "m"}}
    config = read_config(OmegaConf.create(base | {"guard": {"max_mismatch_kl": None}}), AmpoConfig)
    assert config.guard == GuardConfig(max_mismatch_kl=None)
    with pytest.raises(ConfigError, match=r"guard\.min_valdi"):
        read_config(OmegaConf.create(base | {"guard": {"min_valdi": 3}}), AmpoConfig)
