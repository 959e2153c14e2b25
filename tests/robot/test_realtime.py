"""The real-time controller on a simulated clock: nothing sleeps, every delay is stated."""

import itertools
import logging
import threading

import numpy as np
import pytest

from vlaflow.errors import ConfigError, RequestError
from vlaflow.robot.realtime import RealtimeConfig, RealtimeController, Reply
from vlaflow.robot.transports import BackgroundTransport, SimulatedTransport

CHUNK_SIZE, DIM = 12, 2
METADATA = {
    "chunk_size": CHUNK_SIZE,
    "max_action_prefix": 6,
    "rate_hz": 50.0,
    "action_spec": {"dimensions": [{"mode": "delta"}, {"mode": "absolute"}]},
}


class Policy:
    """Answers with chunk number n: action i is (n, i), but for the beginning that it was given."""

    def __init__(self):
        self.requests, self.fail = [], set()

    def __call__(self, request):
        self.requests.append(request)
        number = len(self.requests)
        if number in self.fail:
            raise RequestError("the server is gone")
        actions = np.stack([np.full(CHUNK_SIZE, number), np.arange(CHUNK_SIZE)], 1).astype(np.float32)
        if "action_prefix" in request:
            actions[: request["inference_delay"]] = request["action_prefix"][: request["inference_delay"]]
        return {"actions": actions}


class Robot:
    """A controller on a simulated transport; ``run`` goes through control steps."""

    def __init__(self, delays=0, **config):
        delays = iter(delays) if isinstance(delays, list) else itertools.repeat(delays)
        self.policy = Policy()
        self.transport = SimulatedTransport(self.policy, lambda: next(delays))
        self.controller = RealtimeController(self.transport, METADATA, RealtimeConfig(**config))
        self.looks, self.now = [], 0

    def look(self):
        self.looks.append(self.now)
        return {"time": self.now}

    def begin(self):
        self.controller.begin(self.look())
        return self

    def run(self, steps):
        moves = []
        for _ in range(steps):
            moves.append(self.controller.act(self.look))
            self.transport.tick()
            self.now += 1
        return moves


def chunks(moves):
    return [None if m.idle else m.chunk for m in moves]


@pytest.mark.parametrize("mode", ["wait", "switch", "commit"])
def test_without_a_delay_every_mode_executes_each_chunks_first_actions(mode):
    robot = Robot(0, mode=mode, n_action_steps=4).begin()
    moves = robot.run(12)
    assert chunks(moves) == [1] * 4 + [2] * 4 + [3] * 4
    assert [m.place for m in moves] == [0, 1, 2, 3] * 3
    assert robot.looks == [0, 4, 8]  # what the robot sees is looked at only when it is asked about
    assert [i for i, m in enumerate(moves) if m.fresh] == [0, 4, 8]


def test_waiting_stands_still_for_the_delay_and_starts_the_chunk_where_it_stands():
    robot = Robot(3, mode="wait", n_action_steps=4).begin()
    moves = robot.run(14)
    assert chunks(moves) == [1] * 4 + [None] * 3 + [2] * 4 + [None] * 3
    assert [m.place for m in moves[7:11]] == [0, 1, 2, 3]
    assert robot.controller.counts.idle == 6


def test_standing_still_is_no_displacement_and_the_last_absolute_value():
    move = Robot(3, mode="wait", n_action_steps=4).begin().run(5)[-1]
    assert move.idle
    assert move.action.tolist() == [0.0, 3.0]


def test_switching_enters_the_new_chunk_at_the_action_that_is_due():
    moves = Robot(3, mode="switch", n_action_steps=4).begin().run(12)
    assert chunks(moves) == [1] * 7 + [2] * 4 + [3]  # asked for at its action 4, which is also when 3 is under way
    assert [m.place for m in moves] == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 3]


def test_committing_tells_the_policy_what_will_be_executed_and_never_jumps():
    robot = Robot(3, mode="commit", n_action_steps=4).begin()
    moves = robot.run(12)
    second = robot.policy.requests[1]
    assert second["inference_delay"] == 3
    np.testing.assert_array_equal(second["action_prefix"][:, 1], np.arange(4, CHUNK_SIZE))
    assert [m.place for m in moves if m.fresh] == [0, 3, 3]
    # at its action 3 the second chunk goes on exactly where the first was left
    assert [m.action[1] for m in moves[:7]] == [0, 1, 2, 3, 4, 5, 6]
    assert robot.controller.counts.late == robot.controller.counts.beyond == robot.controller.counts.idle == 0


def test_an_ensemble_averages_what_all_chunks_say_of_this_moment():
    moves = Robot(0, mode="ensemble", n_action_steps=4, rate=0.5).begin().run(6)
    weight = np.exp(-0.5)
    assert moves[3].action.tolist() == [1, 3]
    assert moves[4].action[0] == pytest.approx((1 + 2 * weight) / (1 + weight))
    assert moves[5].action[1] == pytest.approx((5 + 1 * weight) / (1 + weight))


def test_a_chunk_that_leaves_the_average_is_a_boundary_as_one_that_enters_it():
    """Chunks of 12 are asked for at 0, 5, 10 and 15 and come a step later; the first has ended at 12, the second at 17."""
    moves = Robot(1, mode="ensemble", n_action_steps=5).begin().run(18)
    assert [i for i, move in enumerate(moves) if move.fresh] == [0, 6, 11, 12, 16, 17]


def test_a_fade_goes_from_the_old_chunk_to_the_new_in_equal_steps():
    moves = Robot(2, mode="switch", n_action_steps=4, fade=3).begin().run(10)
    shares = [0.25, 0.5, 0.75, 1.0]
    for move, share in zip(moves[6:10], shares, strict=True):
        assert move.action[0] == pytest.approx(1 + share)


def test_what_is_said_to_be_committed_is_executed_while_a_chunk_is_faded_in():
    """Asked again before the fade is over: the policy is told the actions as they will be, not those of either chunk."""
    robot = Robot([0, 3, 0] + [3] * 9, mode="commit", n_action_steps=4, fade=4).begin()
    executed = [move.action.tolist() for move in robot.run(23)]
    assert len(robot.looks) == 6
    for now, request in zip(robot.looks[1:], robot.policy.requests[1:], strict=True):
        count = request["inference_delay"]
        assert executed[now : now + count] == request["action_prefix"][:count].tolist()


def test_a_spike_at_the_start_is_forgotten():
    """The longest delay remembered decides what is committed: 6 at first, 1 once five later answers took 1."""
    robot = Robot([6] + [1] * 20, mode="commit", n_action_steps=4, memory=5).begin()
    robot.run(36)
    committed = [r["inference_delay"] for r in robot.policy.requests[1:]]
    assert committed[:5] == [6] * 5
    assert set(committed[5:]) == {1}
    assert robot.controller.counts.late == 0


def test_a_delay_longer_than_was_trained_commits_what_it_can_and_is_counted():
    """Of 7 expected it commits 5 where no more are left, and 6 where that is the most that the policy continues."""
    robot = Robot([1] + [7] * 9, mode="commit", n_action_steps=4, expected=1).begin()
    robot.run(30)
    assert [r["inference_delay"] for r in robot.policy.requests[1:]] == [
        1,
        5,
        6,
        5,
    ]
    assert robot.controller.counts.late == 2
    assert robot.controller.counts.beyond == 3


def test_a_robot_with_nothing_left_stands_and_loses_no_action():
    """Asked at action 4 of 12, answered after 10 steps: 8 actions were left, then 2 steps of standing still."""
    robot = Robot([0, 10, 9], mode="switch", n_action_steps=4).begin()
    moves = robot.run(15)
    assert chunks(moves) == [1] * 12 + [None] * 2 + [2]
    assert moves[-1].place == 8  # eight actions were executed since it was asked for, not ten
    assert robot.controller.counts.idle == 2


class Scripted:
    """A transport whose answers the test hands out."""

    def __init__(self):
        self.asked, self.due = [], []

    def ask(self, number, request):
        self.asked.append((number, request))

    def poll(self):
        due, self.due = self.due, []
        return due

    def wait(self):
        return self.poll(), 0.0

    def answer(self, number, value):
        self.due.append(Reply(number, {"actions": np.full((CHUNK_SIZE, DIM), value, np.float32)}))


def begun(transport, **config):
    controller = RealtimeController(transport, METADATA, RealtimeConfig(**config))
    transport.answer(1, 1.0)
    controller.begin({})
    return controller


def test_answers_out_of_order_are_dropped():
    transport = Scripted()
    controller = begun(transport, mode="switch", n_action_steps=1)
    controller.act(dict)
    controller.act(dict)  # asks for number 2
    transport.answer(1, 9.0)
    transport.answer(7, 9.0)
    assert controller.act(dict).action.tolist() == [1, 1]
    transport.answer(2, 2.0)
    assert controller.act(dict).action.tolist() == [2, 2]
    transport.answer(2, 9.0)
    assert controller.act(dict).action.tolist() == [2, 2]
    assert controller.counts.dropped == 3


def test_a_reset_in_mid_flight_drops_the_answer_of_the_episode_before():
    transport = Scripted()
    controller = begun(transport, mode="commit", n_action_steps=1)
    controller.act(dict)
    controller.act(dict)
    transport.answer(2, 9.0)  # on its way when the episode ends
    transport.answer(3, 3.0)
    controller.begin({})
    assert transport.asked[-1][1] == {"reset": True}
    move = controller.act(dict)
    assert move.action.tolist() == [3, 3]
    assert (move.place, controller.counts.dropped) == (0, 1)


def test_a_failed_answer_is_asked_for_again_while_the_robot_goes_on(caplog):
    robot = Robot(1, mode="commit", n_action_steps=4)
    robot.policy.fail = {2, 3}
    with caplog.at_level(logging.WARNING):
        moves = robot.begin().run(9)
    assert chunks(moves) == [1] * 7 + [4] * 2
    assert robot.controller.counts.failed == 2
    assert caplog.text.count("the server is gone") == 1  # two failures in a row, said once
    assert "succeeded again" in caplog.text


def test_no_first_chunk_is_an_error():
    robot = Robot(0)
    robot.policy.fail = {1}
    with pytest.raises(RequestError, match="the server is gone"):
        robot.begin()


@pytest.mark.parametrize(
    "reply",
    [
        {"actions": np.zeros((3, DIM))},
        {"actions": np.full((CHUNK_SIZE, DIM), np.nan)},
        {"actions": None},
        {"actions": "none"},
        {"actions": [[0.0, 0.0], [0.0]]},
        {},
        np.zeros((CHUNK_SIZE, DIM)),
        [],
    ],
)
def test_a_first_answer_that_is_no_chunk_is_an_error_and_not_waited_for_again(reply):
    transport = Scripted()
    transport.due.append(Reply(1, reply))
    controller = RealtimeController(transport, METADATA, RealtimeConfig())
    with pytest.raises(RequestError, match=r"not a finite chunk|no array of numbers"):
        controller.begin({})
    assert len(transport.asked) == 1


def test_acting_before_an_episode_was_begun_is_one_sentence():
    with pytest.raises(ConfigError, match="begin"):
        RealtimeController(Scripted(), METADATA, RealtimeConfig()).act(dict)


def test_a_chunk_of_another_shape_is_not_executed():
    transport = Scripted()
    controller = begun(transport, mode="switch", n_action_steps=1)
    controller.act(dict)
    controller.act(dict)
    transport.due.append(Reply(2, {"actions": np.full((CHUNK_SIZE, DIM), np.nan)}))
    assert controller.act(dict).chunk == 1
    assert controller.counts.failed == 1


def test_jitter_never_makes_committing_jump_within_what_it_remembers():
    delays = np.random.default_rng(0).integers(1, 6, 200).tolist()
    robot = Robot([5, *delays], mode="commit", n_action_steps=4, memory=1000).begin()
    moves = robot.run(300)
    assert robot.controller.counts.late == 0
    for before, after in itertools.pairwise(moves):  # the second number of an action is its place in its chunk
        if not after.fresh:
            assert after.action[1] == before.action[1] + 1


@pytest.mark.parametrize(
    ("config", "metadata", "sentence"),
    [
        ({"n_action_steps": 0}, METADATA, "at least 1"),
        ({"mode": "ensembles"}, METADATA, "no mode 'ensembles'; did you mean 'ensemble'"),
        ({"n_action_steps": CHUNK_SIZE}, METADATA, "n_action_steps must be at most 11"),
        ({"n_action_steps": CHUNK_SIZE + 1, "mode": "wait"}, METADATA, "n_action_steps must be at most 12"),
        ({"mode": "commit"}, {**METADATA, "max_action_prefix": 0}, "cannot continue committed actions"),
        ({}, {"rate_hz": 50.0}, "lacks 'chunk_size'"),
        (
            {},
            {**METADATA, "action_spec": {"dimensions": [{"name": "a0", "mode": "unstated"}]}},
            "whether 'a0' is a displacement or an absolute value",
        ),
    ],
)
def test_impossible_settings_are_refused(config, metadata, sentence):
    with pytest.raises(ConfigError, match=sentence):
        RealtimeController(Scripted(), metadata, RealtimeConfig(**config))


class Slow:
    """A client that answers when it is let."""

    metadata = METADATA

    def __init__(self):
        self.gate, self.policy = threading.Semaphore(0), Policy()

    def infer(self, request):
        assert self.gate.acquire(timeout=10)
        if request.get("defect"):
            raise ZeroDivisionError("a defect")
        return self.policy(request)


def test_the_robots_loop_never_waits_for_a_background_line():
    client = Slow()
    with BackgroundTransport(client) as transport:
        controller = RealtimeController(transport, METADATA, RealtimeConfig("switch", n_action_steps=2))
        client.gate.release()
        controller.begin({})
        assert [controller.act(dict).chunk for _ in range(6)] == [1] * 6
        client.gate.release()
        while controller.counts.answered < 2:
            move = controller.act(dict)
        assert (move.chunk, controller.counts.failed) == (2, 0)
        client.gate.release(8)


def test_a_defect_of_the_client_is_an_answer_too(caplog):
    client = Slow()
    client.gate.release()
    with BackgroundTransport(client) as transport:
        transport.ask(1, {"defect": True})
        answers, _ = transport.wait()
    assert "ZeroDivisionError" in answers[0].error


def test_a_server_that_does_not_say_its_rate_is_one_sentence():
    """openpi's own server says nothing of it."""
    client = Slow()
    client.metadata = {}
    with pytest.raises(ConfigError, match="'rate_hz'"):
        BackgroundTransport(client)
