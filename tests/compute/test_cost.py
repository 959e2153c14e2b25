"""A cost model is fitted to measurements, and its terms are times."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaflow.compute.cost import ChunkWork, CostModel, Work, fit
from vlaflow.errors import ConfigError

WORKS = [Work(8, 0.1, 0.02), Work(44, 0.4, 0.1), Work(44, 3.0, 0.1), Work(12, 1.0, 0.5), Work(20, 0.2, 0.05), Work(9, 0.9, 0.3)]


@given(st.floats(0, 10), st.floats(0.01, 1), st.floats(0.1, 100), st.floats(0, 100))
def test_what_a_cost_model_made_is_fitted_exactly(chunk, layer_pass, gflop, gigabyte):
    made = CostModel(chunk, layer_pass, gflop, gigabyte)
    found = fit(WORKS, [made.milliseconds(work) for work in WORKS])
    for work in (*WORKS, Work(100, 10, 1)):
        assert found.milliseconds(work) == pytest.approx(made.milliseconds(work), rel=1e-4)
    assert found.error < 1e-4
    assert found.points == len(WORKS)


def test_no_term_is_negative():
    """Plain least squares would give each chunk −4 ms, and predict that a small one ends before it begins."""
    found = fit(WORKS, [work.passes - 4 for work in WORKS])
    assert min(found.chunk, found.layer_pass, found.gflop, found.gigabyte) >= 0
    assert found.error > 0


def test_too_few_measurements_are_refused():
    with pytest.raises(ConfigError, match="at least 5 measurements, got 4"):
        fit(WORKS[:4], [1.0, 2.0, 3.0, 4.0])


def test_work_adds_up_and_a_batch_shares_passes_and_weights():
    parts = ChunkWork(Work(1, 0.5, 0.1), (Work(1, 0.5, 0.2), Work(2, 1.0, 0.4)), (Work(2, 0.25, 0.2), Work(3, 0.5, 0.4)))
    dense = parts.embed + parts.prefix[1] + parts.step[1] * 10
    assert dense == Work(33, 6.5, 4.5)
    assert parts.spent(10, 2 + 10 * 2) == dense
    assert dense.batched(8) == Work(33, 52.0, 4.5)
