"""What is said of a calibrated sampler agrees with how it was chosen."""

from dataclasses import replace

from tests.compute.test_sampler_choice import MADE
from vlaflow.reports.sampler import candidates, words


def test_what_exceeds_the_budget_is_no_better_choice_and_says_why():
    """It may be clearly better; it was not chosen for its time."""
    made = replace(MADE, criterion="plausible_error", envs=(), choice="dense:1", budget_ms=2.0)
    assert "The best is" not in words(made)
    remarks = {row[0]: row[-1] for row in candidates(made).rows}
    assert remarks == {"dense:1": "chosen", "dense:2": "slower than 2 ms at p99", "dense:10": "slower than 2 ms at p99"}
    assert "The best is dense:10" in words(replace(made, choice="dense:2", budget_ms=None))
