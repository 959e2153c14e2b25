"""Success by published group: each group counts the same in the mean, however many tasks it has."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reports import synthetic
from vlaflow.cli.eval import table
from vlaflow.evaluation import results
from vlaflow.evaluation.groups import by_group
from vlaflow.evaluation.results import Evaluation
from vlaflow.evaluation.statistics import Interval, mean_interval, wilson
from vlaflow.reports import evaluation_plots as plots
from vlaflow.reports.evaluation import headline, success_table
from vlaflow.reports.evaluation_plots import places
from vlaflow.simulators.base import published_groups

GROUPS = published_groups("metaworld")
EPISODES = 10
counts = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)).map(lambda t: (min(t), max(t))), min_size=1, max_size=6)


def evaluations(successes) -> list[Evaluation]:
    """One per task, with so many successes of each group's tasks, all of them by step 400 but the first one of a task."""
    template = synthetic.results().evaluations[0].per_episode[0]
    found = []
    for group, envs in GROUPS.items():
        for env in envs:
            for seed in range(EPISODES):
                step = (450 if seed == 0 else 100) if seed < successes[group] else None
                found.append(
                    replace(template, env=env, seed=1000 + seed, success=step is not None, first_success_step=step, steps=500)
                )
    return list(results.count(found, [], n_action_steps=8, max_steps=500, render="fast", solver_steps=10))


@given(counts=counts)
def test_the_interval_of_a_mean_holds_the_mean_and_is_narrower_than_the_single_ones(counts):
    rates, intervals = [k / n for k, n in counts], [wilson(k, n) for k, n in counts]
    found, mean = mean_interval(rates, intervals), sum(rates) / len(rates)
    assert 0 <= found.low <= mean <= found.high <= 1
    assert found.high - found.low <= max(i.high - i.low for i in intervals) + 1e-12


@pytest.mark.parametrize("n", [1, 4])
def test_equal_rates_have_the_single_interval_divided_by_the_root_of_their_number(n):
    one = wilson(7, 10)
    found = mean_interval([0.7] * n, [one] * n)
    assert found == Interval(pytest.approx(0.7 - (0.7 - one.low) / n**0.5), pytest.approx(0.7 + (one.high - 0.7) / n**0.5))


@pytest.mark.parametrize("suite", ["metaworld", "libero"])
def test_no_task_is_in_two_published_groups(suite):
    envs = [env for group in published_groups(suite).values() for env in group]
    assert len(envs) == len(set(envs)) == {"metaworld": 50, "libero": 40}[suite]


def test_each_group_counts_the_same():
    """28 easy tasks solved and nothing else: a quarter, not 56 %."""
    (overall,) = results.pool(evaluations({"easy": EPISODES, "medium": 0, "hard": 0, "very_hard": 0}))
    (mean,) = overall.by_group
    assert [(g.group, g.envs, g.episodes) for g in mean.groups] == [
        ("easy", 28, 280), ("medium", 11, 110), ("hard", 6, 60), ("very_hard", 5, 50)
    ]  # fmt: skip
    assert (mean.mean, overall.mean_over_envs) == (0.25, 0.56)
    easy = wilson(280, 280)
    assert mean.groups[0].interval == (easy.low, easy.high)
    assert mean.groups[0].within == {"lerobot": 280, "evo1": 28 * (EPISODES - 1)}
    assert mean.within == {"lerobot": 0.25, "evo1": pytest.approx(0.9 / 4)}


def test_a_missing_task_leaves_no_mean():
    """A table that misses a task would compare with nothing published."""
    all_but_one = evaluations({"easy": 5, "medium": 5, "hard": 5, "very_hard": 5})[:-1]
    assert by_group(all_but_one, [{}] * 49) == ()
    assert results.pool(all_but_one)[0].by_group == ()


def test_results_and_pages_hold_the_groups(tmp_path):
    found = evaluations({"easy": 9, "medium": 7, "hard": 5, "very_hard": 3})
    made = replace(
        synthetic.results(), evaluations=tuple(found), overall=results.pool(found), paired=(), latency=(), language=()
    )
    results.write(made, tmp_path / "results.json")
    assert results.read(tmp_path / "results.json").overall == made.overall
    cells = {row[0]: row[1:] for row in success_table(made).rows}
    assert cells["metaworld/very_hard, 5 tasks"][0][0] == "15/50"
    assert cells["mean of metaworld's groups"][0][0] == "60.0 %"
    assert cells["mean of metaworld's groups, within evo1's limits"] == ["50.0 %"]
    assert any("Mean of the 4 groups of metaworld, dense: 60.0 %" in sentence for sentence in headline(made))
    assert places(made) == {f"metaworld/{group}": envs for group, envs in GROUPS.items()}
    assert plots.success(made).count("very_hard") == plots.first_success(made).count("very_hard") > 0
    assert list(places(synthetic.results())) == list(synthetic.ENVS)
    grid = table(made).renderables[0]
    assert "mean of 4 groups" in list(grid.columns[0].cells)
