"""Which measure ranks samplers as episodes do."""

from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize(
    "change", [{"n_action_steps": 4}, {"solver_steps": 2}, {"max_steps": 400}, {"seeds": (1001, 1002)}], ids=str
)
def test_successes_under_other_settings_are_not_ranked_with_these(monkeypatch, change):
    """Half as many episodes, or half as long ones, have fewer successes whatever the sampler."""
    settings = {
        "env": "metaworld/drawer-open-v3",
        "seeds": (1000, 1001),
        "noise_seeds": (0, 0),
        "n_action_steps": 8,
        "max_steps": 500,
    }
    settings |= {"render": "fast", "solver_steps": 10}
    of = {
        Path(name) / "results.json": SimpleNamespace(
            fingerprint="mine", evaluations=[SimpleNamespace(compute=f"dense:{n}", **settings | more) for n in numbers]
        )
        for name, numbers, more in (("one", (1, 2, 3), {}), ("two", (5, 10), {}), ("three", (4,), change))
    }
    monkeypatch.setattr(foretelling, "read", of.__getitem__)
    (found,) = foretelling.evaluations([Path("one"), Path("two")], "mine").values()
    assert [each.compute for each in found] == ["dense:1", "dense:2", "dense:3", "dense:5", "dense:10"]
    with pytest.raises(ConfigError, match=f"three evaluates metaworld/drawer-open-v3 with {next(iter(change))} "):
        foretelling.evaluations([Path("one"), Path("three")], "mine")


def test_evaluations_of_another_checkpoint_and_too_few_samplers_are_refused(monkeypatch):
    class Found:
        fingerprint = "mine"
        evaluations = ()

    monkeypatch.setattr(foretelling, "read", lambda file: Found)
    with pytest.raises(ConfigError, match="evaluates another checkpoint"):
        foretelling.evaluations([Path("runs/eval")], "other")
    with pytest.raises(ConfigError, match="needs three compute policies"):
        foretelling.evaluations([Path("runs/eval")], "mine")
