"""The page of an exit calibration."""

import warnings

import numpy as np

from vlaflow.compute.calibration import Calibration, ExitEffect, RiskTarget
from vlaflow.compute.early_exit import ExitPlan
from vlaflow.compute.thresholds import ExitMeasurements
from vlaflow.reports.calibration import write_page


def test_a_page_of_two_exits_has_no_curves_to_name(tmp_path):
    """A chunk of the first depth has none before it to be compared with, so all leave at the second, and that is no warning."""
    target, effect = RiskTarget(0.1, 0.1, 0.05, "max_abs"), ExitEffect(4, (1.0,), 2.0, 2.0, 3.0, 0.1, 0.0, 0.1, 0.0)
    made = Calibration("c", "d", ExitPlan((1, 2)), (None,), target, 4, effect, "vlaflow calibrate", {})
    ones, half = np.ones((8, 1)), np.arange(8) < 4
    table = ExitMeasurements(ones, 0 * ones, 0 * ones, np.ones((8, 1)), half, half)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "Calibration page" in write_page(made, table, tmp_path / "page.html").read_text()
