"""Bad judge settings stop the run by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_ampo.chat.config import PoolMember, Price
from nemo_ampo.config.reading import read_config, read_section
from nemo_ampo.errors import ConfigError
from nemo_ampo.evaluate.config import EvaluateConfig
from nemo_ampo.judge.config import JudgeConfig, check_judge


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
        ("requests_per_minute", -1), ("tokens_per_minute", -1), ("retry_after_max_s", 0.0),
        ("max_calls", 0), ("max_usd", 0.0), ("max_usd", 5.0), ("replay", "r"), ("price", {"other": Price(1.0, 1.0)}),
        ("temperatures", [float("nan")]), ("temperatures", [2.5]), ("max_tokens", 0), ("max_concurrency", 0),
        ("connection_retries", -1), ("timeout_s", 0.0), ("timeout_s", float("nan")),
        ("timeout_s", float("inf")), ("backoff_initial_s", -1.0), ("backoff_max_s", 0.5),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_naming_its_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^judge\.{key}: "):
        config(**{key: value, **({"cache": "c"} if key == "replay" else {})})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"endpoints": [PoolMember("http://a/v1"), PoolMember("b")]}, r"endpoints\[1\]\.base_url"),
        ({"endpoints": [PoolMember("http://sk-secret@a/v1")]}, r"endpoints\[0\]\.base_url"),
        ({"extra_body": {"messages": None}}, r"extra_body\.messages"),
        ({"extra_body": {"top_p": 0.5, "temperature": 0.0}}, r"extra_body\.temperature"),
        ({"price": {"m": Price(-1.0, 1.0)}}, r"price\.m\.input_per_million"),
        ({"price": {"m": Price(1.0, float("nan"))}}, r"price\.m\.output_per_million"),
        ({"price": {"m": Price(1.0, 1.0)}, "endpoints": [PoolMember("http://a/v1", model="n")]}, "price"),
    ],
)
def test_a_bad_value_deeper_down_is_named(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^judge\.{key}: ") as caught:
        config(**changes)
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(("given", "read"), [(True, "on"), (False, "off"), ("on", "on"), ("auto", "auto")])
def test_yaml_makes_a_truth_value_of_on(given: object, read: str) -> None:
    assert (
        read_section("judge", JudgeConfig, {"base_url": "http://h/v1", "model": "m", "structured": given}).structured == read
    )


@pytest.mark.parametrize(
    "headers",
    [
        {"api-key": "pasted-secret"}, {"X-Access-Token": "pasted-secret"}, {"Host": "other"}, {"content-length": "1"},
        {"Accept-Encoding": "br"}, {"two words": "x"}, {"X-Team": ""}, {"X-Team": "a\nb"}, {"X-A": "1", "x-a": "2"},
    ],
)  # fmt: skip
def test_a_header_that_may_hold_a_secret_or_breaks_http_is_refused_and_not_repeated(headers: dict[str, str]) -> None:
    for at, keys in (
        ("", {"headers": headers}),
        (r"endpoints\[0\]\.", {"endpoints": [PoolMember("http://a/v1", headers=headers)]}),
    ):
        with pytest.raises(ConfigError, match=rf"^judge\.{at}headers") as caught:
            config(**keys)
        assert "pasted-secret" not in str(caught.value)


def test_a_key_is_given_once() -> None:
    with pytest.raises(ConfigError, match=r"^judge\.headers: give Authorization or judge\.api_key_env, not both"):
        config(api_key_env="KEY", headers={"authorization": "Basic $OTHER"})


def test_members_of_the_pool_inherit_model_and_key() -> None:
    pool = [PoolMember("http://a/v1"), PoolMember("http://b/v1", model="n", api_key_env="")]
    members = config(api_key_env="KEY", endpoints=pool).members
    assert [(m.base_url, m.model, m.api_key_env) for m in members] == [
        ("http://host:8000/v1", "m", "KEY"), ("http://a/v1", "m", "KEY"), ("http://b/v1", "n", ""),
    ]  # fmt: skip


def test_every_kind_of_value_is_read_from_yaml() -> None:
    yaml = """
    judge:
      base_url: http://host/v1
      model: gpt-4.1
      structured: on
      endpoints: [{base_url: http://b/v1}, {base_url: http://c/v1, model: other}]
      price: {gpt-4.1: {input_per_million: 2, output_per_million: 8}, other: {input_per_million: 1, output_per_million: 1}}
      max_usd: 10
      headers: {api-key: $AZURE_KEY, X-Team: social}
      ca_file: /etc/ca.pem
      extra_body: {chat_template_kwargs: {enable_thinking: false}, max_tokens: null}
      second: {base_url: http://d/v1, model: other, every: 5}
    data: {turns: t}
    run: {dir: r, name: n, checkpoint: c}
    """
    judge = read_config(OmegaConf.create(yaml), EvaluateConfig).judge
    assert judge.structured == "on" and judge.price["gpt-4.1"].usd(1_000_000, 1_000_000) == 10.0
    assert [member.model for member in judge.members] == ["gpt-4.1", "gpt-4.1", "other"]
    assert judge.extra_body == {"chat_template_kwargs": {"enable_thinking": False}, "max_tokens": None}
    assert judge.second is not None and (judge.second.every, judge.second_judge().model) == (5, "other")
    assert judge.headers == {"api-key": "$AZURE_KEY", "X-Team": "social"} and judge.ca_file == "/etc/ca.pem"
    assert (judge.second_judge().headers, judge.second_judge().ca_file) == ({}, "/etc/ca.pem")
    assert judge.second_judge().endpoints == [] and judge.second_judge().max_usd == 10.0


@pytest.mark.parametrize(
    "base_url", ["http://sk-secret@host/v1", "http://me:sk-secret@host/v1", "http://host/v1?key=sk-secret",
                 "http://host/v1?api-version=1&key=sk-secret", "http://host/v1#sk-secret",
                 "http://host:sk-secret/v1"],
)  # fmt: skip
def test_a_key_in_the_address_is_refused_and_not_repeated(base_url: str) -> None:
    with pytest.raises(ConfigError, match=r"^judge\.base_url") as caught:
        config(base_url=base_url)
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["a b", "a..b", "a" * 64 + ".de", "127.1:18111", "256.1.1.1", "a\tb", "a:99999"])
def test_an_address_that_no_server_can_have_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^judge\.base_url: must be a URL"):
        config(base_url=f"http://{host}/v1")


@pytest.mark.parametrize("host", ["127.0.0.1:1", "[::1]:80", "m\u00fcller.de", "node_1:80", "localhost"])
def test_an_address_that_a_server_can_have_is_taken(host: str) -> None:
    assert config(base_url=f"https://{host}/v1").base_url == f"https://{host}/v1"


@pytest.mark.parametrize("key", ["cache", "replay"])
def test_a_file_that_is_no_cache_is_refused_before_anything_starts(key: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match=rf"^judge\.{key}: {rows} is not a cache of replies"):
        check_judge(config(base_url="http://host/v1", **{key: str(rows)}))
    rows.write_text("")
    check_judge(config(base_url="http://host/v1", **{key: str(rows)}))
    with pytest.raises(ConfigError, match=r"^judge\.cache: /dev/null is not a cache of replies"):
        check_judge(config(base_url="http://host/v1", cache="/dev/null"))


def test_it_is_read_from_plain_values_and_checked() -> None:
    plain = {"base_url": "http://host/v1", "model": "m", "temperatures": [0, 1]}
    assert read_section("judge", JudgeConfig, plain) == config(base_url="http://host/v1", temperatures=[0.0, 1.0])
    with pytest.raises(ConfigError, match=r"^judge\.max_tokens: must be"):
        read_section("judge", JudgeConfig, plain | {"max_tokens": 0})
    with pytest.raises(ConfigError, match=r"^judge\.max_token: no such key; did you mean max_tokens\?"):
        read_section("judge", JudgeConfig, plain | {"max_token": 5})


@pytest.mark.parametrize("pasted", ["sk-SECRET123", "sk SECRET", "7KEYS", "a.b"])
def test_a_key_in_the_place_of_its_variable_is_refused_and_not_repeated(pasted: str) -> None:
    for keys in ({"api_key_env": pasted}, {"endpoints": [PoolMember("http://a:1/v1", api_key_env=pasted)]}):
        with pytest.raises(ConfigError, match=r"api_key_env: must be the name of an environment variable") as caught:
            JudgeConfig("http://a:1/v1", "m", **keys)  # type: ignore[arg-type]
        assert pasted not in str(caught.value)
