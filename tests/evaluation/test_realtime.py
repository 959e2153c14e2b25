"""Episodes in real time: one clock for every hand-over, jerk in closed form, and a real server at the end."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from tests import helpers
from tests.serving.live import serving
from vlaflow.cli.main import main as command
from vlaflow.compute.dense import Dense
from vlaflow.compute.sampler_choice import CalibrationEpisodes
from vlaflow.config import to_json
from vlaflow.errors import ConfigError, RequestError, SpecError
from vlaflow.evaluation import realtime
from vlaflow.evaluation.episode_log import EpisodeLog
from vlaflow.evaluation.realtime_results import count, results
from vlaflow.policies.seeds import chunk_seed
from vlaflow.reports.realtime import write_page
from vlaflow.robot.realtime import Move
from vlaflow.simulators.metaworld_tasks import ACTION
from vlaflow.spec import Observation

CHUNK_SIZE = 12
METADATA = {
    "chunk_size": CHUNK_SIZE,
    "n_action_steps": 4,
    "max_action_prefix": 8,
    "action_spec": to_json(ACTION),
    "images": {"observation/image": 16},
    "views": ["image"],
    "state": ["observation/state"],
    "system": "test",
    "compute": "dense",
    "compute_settings": "Dense()",
    "guided": False,
    "checkpoint": "runs/test",
    "fingerprint": "0123",
    "dtype": "fp32",
}
ENV = "metaworld/drawer-open-v3"


class World:
    """Ends after 40 steps; achieved when x has moved by 20, which takes 20 full steps."""

    name, action_spec, _max_episode_steps = ENV, ACTION, 40

    def restart(self, seed=None):
        self.x, self.steps, self.first = 0.0, 0, -1
        return {}

    def observe(self):
        return Observation({"image": np.zeros((16, 16, 3), np.uint8)}, np.array([self.x, 0, 0, 0], np.float32), "Go")

    def advance(self, action):
        self.x, self.steps = self.x + float(action[0]), self.steps + 1
        if self.x >= 20 and self.first < 0:
            self.first = self.steps
        return 0.0, self.first > 0, self.steps >= 40, {"first_success_step": self.first}


class Forward:
    """A policy that always moves on; remembers its requests."""

    def __init__(self):
        self.requests = []

    def __call__(self, request):
        self.requests.append(request)
        return {"actions": np.tile(np.array([1, 0, 0, 0], np.float32), (CHUNK_SIZE, 1))}


def play(mode, delay_ms, seed=1000, infer=None, **config):
    job = realtime.RealtimeJob(ENV, mode, delay_ms, seed, trace=True)
    return realtime.play(infer or Forward(), METADATA, World(), job, realtime.RealtimeEvaluationConfig(**config))


@pytest.mark.parametrize(("mode", "steps"), [("wait", 28), ("switch", 20), ("ensemble", 20), ("commit", 20)])
def test_only_waiting_costs_time(mode, steps):
    """25 ms are 2 steps at 80 Hz: five chunks of four actions with four waits of 2 steps between them."""
    episode = play(mode, 25.0)
    assert episode.success
    assert episode.first_success_step == steps
    assert episode.idle == steps - 20


def test_a_delay_is_rounded_up_to_whole_steps():
    assert play("wait", 12.5).idle == 4
    assert play("wait", 12.6).idle == 8


def test_jitter_only_lengthens_and_is_the_same_for_every_hand_over(monkeypatch):
    delays: dict[str, list[int]] = {}

    class Noting(realtime.SimulatedTransport):
        def __init__(self, infer, delay):
            steps = delays.setdefault(mode, [])
            super().__init__(infer, lambda: steps.append(delay()) or steps[-1])

    monkeypatch.setattr(realtime, "SimulatedTransport", Noting)
    for mode in ("wait", "switch", "commit"):
        play(mode, 25.0, jitter_ms=50.0)
    shortest = min(map(len, delays.values()))
    assert shortest > 3
    assert len({tuple(steps[:shortest]) for steps in delays.values()}) == 1
    assert all(2 <= step <= 6 for steps in delays.values() for step in steps)
    assert len(set(delays["wait"])) > 1


def test_every_mode_gets_the_same_noise_for_the_same_chunk():
    asked = {}
    for mode in ("wait", "commit"):
        infer = Forward()
        play(mode, 25.0, infer=infer)
        asked[mode] = [request["seed"] for request in infer.requests]
    assert asked["wait"][:5] == asked["commit"][:5]
    assert len(set(asked["wait"])) == len(asked["wait"])


@pytest.mark.parametrize("delay_ms", [0.0, 25.0])
def test_an_episode_in_which_a_request_failed_is_no_result(delay_ms):
    class Busy(Forward):
        def __call__(self, request):
            if len(self.requests) == 2:
                raise RequestError("32 requests are waiting already; try again later.")
            return super().__call__(request)

    with pytest.raises(RequestError, match=r"during an episode.*: 32 requests are waiting"):
        play("switch", delay_ms, infer=Busy())


def test_a_request_has_the_keys_of_the_servers_layout():
    infer = Forward()
    play("wait", 0.0, infer=infer)
    assert set(infer.requests[0]) == {"observation/image", "observation/state", "prompt", "seed", "reset"}
    assert infer.requests[0]["prompt"] == "Go"


def move(x, fresh=False, idle=False, gripper=0.0):
    return Move(np.array([x, 0, 0, gripper], np.float32), 1, 0, fresh, idle)


def test_jerk_at_a_step_of_the_velocity_is_the_step_on_both_sides_of_it():
    """0, 0, 0, then ½ for ever: the second difference is ½ at the change, −½ after it and 0 elsewhere."""
    moves = [move(0), move(0), move(0), move(0.5, fresh=True), move(0.5), move(0.5), move(0.5)]
    motion = realtime.Motion.of(moves, ACTION)
    assert motion.boundaries == (3,)
    assert motion.mean(at_boundaries=True) == pytest.approx(0.5)
    assert motion.mean(at_boundaries=False) == 0


def test_the_gripper_is_no_motion_and_coming_to_a_stand_is_a_boundary():
    moves = [move(0.5, gripper=-1), move(0.5, gripper=1), move(0.5), move(0, idle=True), move(0, idle=True)]
    motion = realtime.Motion.of(moves, ACTION)
    assert motion.boundaries == (3,)
    assert motion.idle == (3, 4)
    assert motion.mean(at_boundaries=False) == 0
    assert realtime.Motion.of(moves[:2], ACTION).mean(at_boundaries=True) is None


def test_cells_and_pairs_count_what_happened():
    jobs = realtime.plan((ENV,), ("wait", "commit"), (0.0, 100.0), 3)
    episodes = [play(job.mode, job.delay_ms, job.seed, max_steps=30) for job in jobs]
    cells, pairs = count(episodes)
    found = {(c.mode, c.delay_ms): c for c in cells}
    assert {key: cell.successes for key, cell in found.items()} == {
        ("wait", 0.0): 3,
        ("commit", 0.0): 3,
        ("wait", 100.0): 0,  # four waits of 8 steps
        ("commit", 100.0): 3,
    }
    assert found["wait", 100.0].idle_share > 0.4
    assert [(p.first, p.second, p.delay_ms, p.success[0]) for p in pairs] == [
        ("wait", "commit", 0.0, 0.0),
        ("wait", "commit", 100.0, 1.0),
    ]
    assert [episode.trace is not None for episode in episodes] == [True] * 12
    assert [job.trace for job in jobs] == [job.seed == 1000 for job in jobs]


@pytest.mark.parametrize(
    ("change", "config", "error", "sentence"),
    [
        ({"action_spec": to_json(helpers.action_spec())}, {}, SpecError, "do not mean the same"),
        ({"chunk_size": None}, {}, SpecError, "lacks chunk_size"),
        ({"fingerprint": None}, {}, SpecError, "lacks fingerprint"),
        ({"views": ["wrist"]}, {}, SpecError, "needs view 'wrist'"),
        ({"state": ["a", "b"]}, {}, SpecError, "in parts"),
        ({"max_action_prefix": 0}, {}, ConfigError, "cannot continue"),
        ({}, {"n_action_steps": 12}, ConfigError, "at most 11"),
        ({}, {"n_action_steps": 0}, ConfigError, "at least 1"),
        ({}, {"max_steps": 501}, ConfigError, r"1\.\.500"),
        ({"calibrated_on": to_json(CalibrationEpisodes((ENV,), 990, 12))}, {}, ConfigError, "chosen on seeds 990 to 1001"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_episode(change, config, error, sentence):
    jobs = realtime.plan((ENV,), ("commit",), (0.0,), 1)
    metadata = {key: value for key, value in {**METADATA, **change}.items() if value is not None}
    with pytest.raises(error, match=sentence):
        realtime.require_fit(metadata, "ws://here", jobs, realtime.RealtimeEvaluationConfig(**config))


def test_a_sampler_that_was_chosen_on_other_episodes_can_be_measured():
    jobs = realtime.plan((ENV,), ("commit",), (0.0,), 3)
    for calibrated in (
        None,
        to_json(CalibrationEpisodes((ENV,), 1003, 9)),
        to_json(CalibrationEpisodes(("metaworld/x",), 0, 9999)),
    ):
        metadata = {**METADATA, "calibrated_on": calibrated}
        realtime.require_fit(metadata, "ws://here", jobs, realtime.RealtimeEvaluationConfig())


def test_two_tasks_are_compared_apart_and_together():
    """What one gains and the other loses is no difference over all, and must not be hidden by it."""
    episodes = [
        replace(play(mode, 0.0, seed), env=env, success=(mode == "commit") == (env == "a"))
        for env in ("a", "b")
        for seed in (1000, 1001)
        for mode in ("switch", "commit")
    ]
    _, pairs = count(episodes)
    assert {p.env: p.success[0] for p in pairs} == {"a": 1.0, "b": -1.0, "all": 0.0}


def test_repetitions_that_never_differ_add_nothing():
    """Three repetitions of each scene are worth the scenes, in the intervals and in both tests."""
    once = [
        replace(play(mode, 0.0, seed), success=mode == "commit" or seed == 1000, boundary_jerk=0.1 if mode == "commit" else 0.3)
        for seed in range(1000, 1006)
        for mode in ("switch", "commit")
    ]
    thrice = [replace(episode, noise_seed=noise) for episode in once for noise in range(3)]
    (cells, (pair,)), (repeated, (again,)) = count(once), count(thrice)
    assert [cell.effective_episodes for cell in repeated] == [6, 6]
    assert [cell.episodes for cell in repeated] == [18, 18]
    assert [cell.interval for cell in repeated] == [cell.interval for cell in cells]
    assert [cell.boundary_jerk[0] for cell in repeated] == pytest.approx([0.3, 0.1])
    assert (again.success, again.success_p, again.jerk_p) == (pytest.approx(pair.success), pair.success_p, pair.jerk_p)
    assert (pair.success_p, pair.jerk_p) == (2 / 2**5, 2 / 2**6)
    assert (again.smoother, again.rougher) == (18, 0)


def test_another_noise_seed_is_other_noise_in_the_same_scene():
    jobs = realtime.plan((ENV,), ("switch", "commit"), (0.0,), 2, noise_seeds=2)
    assert [(job.seed, job.noise_seed) for job in jobs[::2]] == [(1000, 0), (1000, 1), (1001, 0), (1001, 1)]
    assert [job.trace for job in jobs] == [True, True, *[False] * 6]
    infer = Forward()
    job = replace(jobs[2], trace=True)
    episode = realtime.play(infer, METADATA, World(), job, realtime.RealtimeEvaluationConfig())
    assert [request["seed"] for request in infer.requests] == [chunk_seed(1000, n, 1) for n in range(len(infer.requests))]
    assert episode.noise_seed == 1
    assert "seed 1000, noise 1" in job.name


def test_steps_to_success_are_the_median_of_those_that_succeeded():
    episodes = [replace(play("wait", 0.0, seed), first_success_step=step) for seed, step in enumerate((10, None, 30))]
    assert count(episodes)[0][0].steps == 20


class Sometimes(Forward):
    """A client whose server was busy at the third request, or was exchanged after it."""

    def __init__(self, fails=0, becomes=None):
        super().__init__()
        self.fails, self.becomes, self.metadata = fails, becomes, METADATA

    def infer(self, request):
        if self.fails and len(self.requests) == 2:
            self.fails, self.requests = self.fails - 1, []
            raise RequestError("busy")
        if self.becomes:
            self.metadata = self.becomes
        return self(request)


@pytest.mark.parametrize(
    ("client", "sentence"),
    [
        (Sometimes(), None),
        (Sometimes(fails=2), None),
        (Sometimes(fails=3), "busy"),
        (Sometimes(becomes={**METADATA, "fingerprint": "other"}), "restarted with another policy"),
    ],
)
def test_a_failed_episode_is_begun_again_and_one_of_another_policy_counts_for_nothing(client, sentence, monkeypatch):
    monkeypatch.setattr(realtime, "cached", lambda *_, **__: World())
    job = realtime.RealtimeJob(ENV, "switch", 25.0, 1000)
    with pytest.raises(RequestError, match=sentence) if sentence else nullcontext():
        episode = realtime._play_job(job, client, config=realtime.RealtimeEvaluationConfig(), metadata=METADATA)
        assert episode == replace(play("switch", 25.0), trace=None)


@pytest.mark.parametrize("jitter_ms", [-1.0, float("nan"), float("inf")])
def test_jitter_that_is_none_is_refused(jitter_ms):
    with pytest.raises(ConfigError, match="jitter must be at least 0 ms"):
        realtime.RealtimeEvaluationConfig(jitter_ms=jitter_ms)


def test_impossible_plans_are_refused():
    with pytest.raises(ConfigError, match="name at least one environment"):
        realtime.plan((), ("wait",), (0.0,), 1)
    with pytest.raises(ConfigError, match="at least one"):
        realtime.plan((ENV,), ("wait",), (0.0,), 1, noise_seeds=0)
    for episodes, delays in ((0, (0.0,)), (1, ()), (1, (-1.0,)), (1, (float("inf"),))):
        with pytest.raises(ConfigError, match="at least one"):
            realtime.plan((ENV,), ("wait",), delays, episodes)


def test_a_real_server_drives_a_real_simulator_and_the_page_shows_it(tmp_path):
    policy = helpers.Policy.create(
        helpers.policy_config(max_action_prefix=3),
        ACTION,
        {"state": helpers.feature_stats(4, 1), "action": helpers.feature_stats(4, 2)},
        seed=0,
    )
    jobs = realtime.plan((ENV,), ("switch", "commit"), (0.0, 25.0), 1)
    config = realtime.RealtimeEvaluationConfig(n_action_steps=3, max_steps=8)
    with serving(policy, Dense(2)) as (server, address):
        once = realtime.evaluate(address, jobs, config, workers=0)
        again = realtime.evaluate(address, jobs, config, workers=0)
    assert once == again
    assert all(episode.steps == 8 for episode in once)
    outcome = results(address, server.metadata, config, once)
    outcome.write(tmp_path / "results.json")
    page = write_page(outcome, tmp_path / "report.html").read_text()
    assert "real-time chunking" in page
    assert "commit − switch" in page
    assert "Dense(steps=2" in page
    assert '"delay_ms": 25.0' in (tmp_path / "results.json").read_text()


def test_an_unusable_out_is_one_sentence_before_anything_is_driven(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command(["eval-realtime", "--env", ENV, "--server", "ws://127.0.0.1:9", "--out", str(tmp_path / "file/out")]) == 2
    said = capsys.readouterr().err
    assert "Choose another --out." in said
    assert said.count("\n") == 1


def test_an_interrupted_comparison_continues_to_the_same_episodes(tmp_path, monkeypatch):
    policy = helpers.Policy.create(
        helpers.policy_config(), ACTION, {"state": helpers.feature_stats(4, 1), "action": helpers.feature_stats(4, 2)}, seed=0
    )
    add = EpisodeLog.add

    def and_stop(self, number, episode):
        add(self, number, episode)
        raise KeyboardInterrupt

    with serving(policy, Dense(2)) as (_, address):
        words = ["eval-realtime", "--env", ENV, "--server", address, "--mode", "switch", "--delay-ms", "0", "--delay-ms", "25"]
        words += ["--n-action-steps", "3", "--max-steps", "6", "--episodes", "1", "--workers", "0"]
        assert command([*words, "--out", str(tmp_path / "whole")]) == 0
        with monkeypatch.context() as patch:
            patch.setattr(EpisodeLog, "add", and_stop)
            assert command([*words, "--out", str(tmp_path / "parts")]) == 130
        assert command([*words, "--out", str(tmp_path / "parts")]) == 0
    whole, parts = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts"))
    assert parts["episodes"] == whole["episodes"]
    assert len(parts["episodes"]) == 2
