"""Which measure ranks samplers as episodes do."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import foretelling
from vlaflow.errors import ConfigError


def test_a_measure_in_the_order_of_failures_ranks_perfectly_and_its_first_is_the_best():
    success_EC = np.array([[10, 20, 30], [5, 1, 3]])
    found = foretelling.Ranking.of(100.0 - success_EC, success_EC)
    assert found == foretelling.Ranking((1.0, 1.0), 1.0, (30, 5))
    assert found.mean == 1.0


def test_the_reverse_order_and_sums_over_environments():
    found = foretelling.Ranking.of(np.array([[1.0, 2.0], [5.0, 1.0]]), np.array([[1, 2], [1, 4]]))
    assert found.rank_E == (-1.0, 1.0)
    assert found.mean == 0.0
    assert found.together == 1.0  # 6 and 3 against 2 and 6 successes
    assert found.first_E == (1, 4)


def test_evaluations_of_another_checkpoint_and_too_few_samplers_are_refused(monkeypatch):
    class Found:
        fingerprint = "mine"
        evaluations = ()

    monkeypatch.setattr(foretelling, "read", lambda file: Found)
    with pytest.raises(ConfigError, match="evaluates another checkpoint"):
        foretelling.evaluations([Path("runs/eval")], "other")
    with pytest.raises(ConfigError, match="needs three compute policies"):
        foretelling.evaluations([Path("runs/eval")], "mine")
