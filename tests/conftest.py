"""What all tests share: which of them must run in one worker because they share a slow fixture."""

from __future__ import annotations

import pytest

SHARED = ("unit/converters", "pipeline", "nemo")
"""Folders whose tests share a session fixture that takes tens of seconds; each is kept on one worker."""
ALONE = ("pipeline/test_smollm2.py",)
"""Files in such a folder that do not use its fixture, and are better off on the other worker."""


def group_of(path: str) -> str:
    """Name of the group whose tests run on one worker, in order."""
    if path.endswith(ALONE):
        return path
    return next((folder for folder in SHARED if f"tests/{folder}/" in path), path)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Not in ``pytest_collection_modifyitems``: xdist reads the groups there, before any conftest."""
    item.add_marker(pytest.mark.xdist_group(group_of(item.path.as_posix())))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The two long pipelines first, so that neither is left over at the end on one worker."""
    items.sort(key=lambda item: ("/pipeline/" not in item.path.as_posix(), not item.path.as_posix().endswith(ALONE)))
