"""A cost model is fitted to measurements, and its terms are times."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaflow.compute.cost import ChunkWork, CostModel, Work, fit
from vlaflow.errors import ConfigError

WORKS = [Work(8, 0.1), Work(44, 0.4), Work(44, 3.0), Work(12, 1.0), Work(20, 0.2)]
PARTS = ChunkWork(0.5, (0.5, 1.0, 1.5), (0.25, 0.5, 0.75))


@given(st.floats(0, 10), st.floats(0.01, 1), st.floats(0.1, 100))
def test_what_a_cost_model_made_is_fitted_exactly(chunk, layer_pass, gflop):
    made = CostModel(chunk, layer_pass, gflop)
    found = fit(WORKS, [made.milliseconds(work) for work in WORKS])
    assert (found.chunk, found.layer_pass, found.gflop) == pytest.approx((chunk, layer_pass, gflop), abs=1e-6)
    assert found.error < 1e-6
    assert found.points == len(WORKS)


def test_no_term_is_negative():
    """Plain least squares would give each chunk −4 ms, and predict that a small one ends before it begins."""
    found = fit(WORKS, [work.layer_passes - 4 for work in WORKS])
    assert min(found.chunk, found.layer_pass, found.gflop) >= 0
    assert found.error > 0


def test_too_few_measurements_are_refused():
    with pytest.raises(ConfigError, match="at least 4 measurements, got 3"):
        fit(WORKS[:3], [1.0, 2.0, 3.0])


def test_work_adds_up_over_depths_steps_and_batches():
    """Layers run once for a batch, operations for every observation of it."""
    assert PARTS.ladder((3,), 10) == Work(33, 0.5 + 1.5 + 7.5)
    assert PARTS.ladder((1, 3), 2, batch=4) == Work(3 + 2 * 4, 4 * (0.5 + 1.5 + 2 * (0.25 + 0.75)))
    assert PARTS.spent(33) == PARTS.ladder((3,), 10)
