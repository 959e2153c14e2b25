"""Confidence as a monitor: what an episode keeps of every chunk, and how early it foretells a failure."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.evaluation.conftest import ENV, make_policy
from vlaflow.compute.parse import parse
from vlaflow.evaluation.monitor import first_notice, foretold
from vlaflow.evaluation.rollout import EpisodeJob, EpisodeResult, _episode
from vlaflow.reports.monitor_plots import areas, notices
from vlaflow.spec import Observation


def episode(seed, success, confidence, spread=()):
    n = len(confidence or spread)
    step = 8 * n if success else None
    return EpisodeResult(ENV, "refine", seed, "", success, step, 8 * n, n, n, n, 0, confidence=confidence, spread=spread)


def half_fail(good, bad, count=6, **more):
    return [episode(seed, seed % 2 == 0, (good if seed % 2 == 0 else bad), **more) for seed in range(2 * count)]


def test_a_perfect_signal_has_all_of_the_area_and_no_signal_half():
    told = foretold(half_fail((0.9, 0.9), (0.2, 0.2)), 8, "confidence")
    assert [(each.step, each.running, each.failing, each.auc) for each in told] == [(0, 12, 6, 1.0), (8, 12, 6, 1.0)]
    assert [each.auc for each in foretold(half_fail((0.5,), (0.5,)), 8, "confidence")] == [0.5]
    assert [each.auc for each in foretold(half_fail((0.2,), (0.9,)), 8, "confidence")] == [0.0]


def test_a_large_spread_is_a_bad_sign():
    episodes = [episode(seed, seed % 2 == 0, (), (0.1 if seed % 2 == 0 else 0.4,)) for seed in range(12)]
    assert [each.auc for each in foretold(episodes, 8, "spread")] == [1.0]
    assert foretold(episodes, 8, "confidence") == []


def test_episodes_that_are_over_take_no_part():
    """Successes that end after one chunk leave only failures, of which nothing can be told."""
    told = foretold(half_fail((0.9,), (0.2, 0.1, 0.1)), 8, "confidence")
    assert [each.running for each in told] == [12]


def test_notice_is_taken_when_the_interval_leaves_chance_for_good():
    told = foretold(half_fail((0.5, 0.9, 0.9), (0.5, 0.1, 0.1), count=10), 8, "confidence")
    assert first_notice(told).step == 8
    assert first_notice(foretold(half_fail((0.5,), (0.5,)), 8, "confidence")) is None
    assert first_notice([]) is None


def test_repetitions_of_a_scene_make_no_interval_narrower():
    once = half_fail((0.5, 0.9), (0.5, 0.1), count=10)
    thrice = [replace(each, noise_seed=noise) for each in once for noise in range(3)]
    for one, repeated in zip(foretold(once, 8, "confidence"), foretold(thrice, 8, "confidence"), strict=True):
        assert (repeated.running, repeated.auc) == (3 * one.running, one.auc)
        assert (repeated.low, repeated.high) == pytest.approx((one.low, one.high))


class Still:
    """An environment of ten steps in which nothing happens, as ``ChunkEnv`` plays it: four actions of a chunk."""

    n_action_steps = 4

    def __init__(self):
        self.left = 10

    def restart(self, seed):
        pass

    def observe(self):
        return type("Seen", (), {"instruction": ""})()

    def execute(self, actions):
        steps = min(4, self.left)
        self.left -= steps
        return type("Done", (), {"steps": steps, "done": not self.left, "info": {"first_success_step": 0}})()


@pytest.mark.parametrize(
    ("name", "kept"), [("refine:1", "confidence"), ("refine-spread:1,draws=2", "spread"), ("dense:1", None)]
)
def test_an_episode_keeps_the_mean_over_what_every_chunk_is_to_execute(name, kept):
    """The last chunk executes two of four, because the episode is over; a mean of two would know that beforehand."""
    policy, compute = make_policy(), parse(name)
    chunk = policy.act(_observation(), compute, generator=torch.Generator().manual_seed(0))
    running = _episode(Still(), EpisodeJob(ENV, compute, 0))
    next(running)
    running.send(chunk)
    running.send(chunk)
    with pytest.raises(StopIteration) as over:
        running.send(chunk)
    found = over.value.value
    for signal in ("confidence", "spread"):
        wanted = () if signal != kept else [float(getattr(chunk, signal)[:n].mean()) for n in (4, 4, 4)]
        assert getattr(found, signal) == pytest.approx(wanted, abs=1e-5)


def _observation():
    return Observation({"image": np.zeros((32, 32, 3), np.uint8)}, np.zeros(4, np.float32), "Open a drawer")


def test_the_report_draws_every_signal():
    told = foretold(half_fail((0.5, 0.9, 0.9), (0.5, 0.1, 0.1), count=10), 8, "confidence")
    assert "<svg" in areas([("drawer-open, refine, confidence", told)])
    (row,) = notices([("drawer-open, refine, confidence", told)]).rows
    assert row[2][0] == "step 8: 1.00"
