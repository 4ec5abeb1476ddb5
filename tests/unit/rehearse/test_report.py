from __future__ import annotations

import pytest

from nemo_ampo.rehearse.ledger import PARTS
from nemo_ampo.rehearse.report import Passes, RankReport, fullest


def passes(weights: int, activations: int) -> Passes:
    return Passes({"update": dict.fromkeys(PARTS, 0) | {"weights": weights, "activations": activations}}, {"update": []})


def test_other_lengths_lie_on_the_line_of_the_two_that_were_tried() -> None:
    report = RankReport(0, 1, {0.5: passes(10, 20), 1.0: passes(10, 40)}, None, 1.0, 1)
    assert report.peak("update", 2.0)["activations"] == 80 and report.peak("update", 2.0)["weights"] == 10
    assert report.largest(0.25) == ("update", 20)
    assert report.share_that_fits(90) == pytest.approx(2.0)
    assert report.share_that_fits(10) == 0.0
    other = RankReport(1, 1, {0.5: passes(10, 20), 1.0: passes(11, 40)}, None, 1.0, 1)
    assert fullest([report, other]).rank == 1
