"""Bad judge settings stop the run by name."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_ampo.errors import ConfigError
from nemo_ampo.judge import JudgeConfig


def config(**changes: Any) -> JudgeConfig:
    return JudgeConfig(**{"base_url": "http://host:8000/v1", "model": "m", **changes})


def test_default_schedule_is_the_reference_one() -> None:
    assert config().temperatures == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert (config().timeout_s, config().max_concurrency) == (60.0, 64)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_url", ""), ("base_url", "host:8000"), ("base_url", "ftp://host/v1"), ("base_url", "http://"),
        ("base_url", "http://[broken/v1"), ("base_url", "http://host:port/v1"),
        ("model", " "), ("prompt", ""), ("temperatures", []), ("temperatures", [0.0, -0.1]),
        ("temperatures", [float("nan")]), ("temperatures", [2.5]), ("max_tokens", 0), ("max_concurrency", 0),
        ("connection_retries", -1), ("timeout_s", 0.0), ("timeout_s", float("nan")),
        ("timeout_s", float("inf")), ("backoff_initial_s", -1.0), ("backoff_max_s", 0.5),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_naming_its_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^judge\.{key}: "):
        config(**{key: value})


@pytest.mark.parametrize(
    "base_url", ["http://sk-secret@host/v1", "http://me:sk-secret@host/v1", "http://host/v1?key=sk-secret",
                 "http://host:sk-secret/v1"],
)  # fmt: skip
def test_a_key_in_the_address_is_refused_and_not_repeated(base_url: str) -> None:
    with pytest.raises(ConfigError, match=r"^judge\.base_url") as caught:
        config(base_url=base_url)
    assert "sk-secret" not in str(caught.value)


def test_omegaconf_merges_and_checks_it() -> None:
    schema = OmegaConf.structured(JudgeConfig)
    merged = OmegaConf.merge(schema, {"base_url": "http://host/v1", "model": "m", "temperatures": [0, 1]})
    assert OmegaConf.to_object(merged) == config(base_url="http://host/v1", temperatures=[0.0, 1.0])
    with pytest.raises(ConfigError, match=r"judge\.max_tokens"):
        OmegaConf.to_object(OmegaConf.merge(merged, {"max_tokens": 0}))
    with pytest.raises(OmegaConfBaseException, match="max_token"):
        OmegaConf.merge(schema, {"max_token": 5})
