from __future__ import annotations

import pytest

from nemo_ampo.ranks import slice_for


def test_slices_cover_everything_once() -> None:
    rows = list(range(12))
    assert [slice_for(rows, r, 3) for r in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_unequal_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="10 rows cannot be shared equally by 4"):
        slice_for(list(range(10)), 0, 4)
