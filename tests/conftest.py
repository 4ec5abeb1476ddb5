"""What all tests share: which of them must run in one worker because they share a slow fixture."""

from __future__ import annotations

import pytest

SHARED = ("unit/converters", "pipeline", "nemo")
"""Folders whose tests share a session fixture that takes tens of seconds; each is kept on one worker."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.as_posix()
        group = next((folder for folder in SHARED if f"tests/{folder}/" in path), path)
        item.add_marker(pytest.mark.xdist_group(group))
