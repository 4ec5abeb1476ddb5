"""One scripted server for the folder; each test gives it a script."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from scripted_chat import Act, ScriptedChat, serve

from nemo_ampo.chat.config import EndpointConfig


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedChat]:
    with serve(Act()) as running:
        yield running


@pytest.fixture(scope="module")
def other() -> Iterator[ScriptedChat]:
    with serve(Act()) as running:
        yield running


@pytest.fixture
def config() -> Any:
    def make(url: str, **changes: Any) -> EndpointConfig:
        quick = {"timeout_s": 20.0, "backoff_initial_s": 0.001, "backoff_max_s": 0.002}
        return EndpointConfig(url, "referee", **{**quick, **changes})

    return make
