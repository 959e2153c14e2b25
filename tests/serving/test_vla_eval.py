"""vla-eval's protocol over real sockets, spoken by hand: which actions leave, when the policy looks, what is refused.

``make test-vla-eval`` drives the same server with the harness itself.
"""

import io
import random
import time
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import connect

from tests import helpers
from tests.end_to_end import vla_eval_frames
from tests.serving import hostile
from tests.serving.live import POLICY, port_of, serving
from vlaflow.compute.dense import Dense
from vlaflow.errors import ConfigError
from vlaflow.policies.seeds import chunk_generator
from vlaflow.serving import vla_eval
from vlaflow.serving.observation_keys import choose
from vlaflow.serving.server import PolicyServer, ServerConfig
from vlaflow.simulators.libero_tasks import ACTION

PLACE = choose("vla-eval-simpler", ("image",))


def marked(array):
    return {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}


def picture(array, form="png", shape=None):
    file = io.BytesIO()
    Image.fromarray(array).save(file, form)
    return {"__image__": True, "format": form, "data": file.getvalue(), "shape": list(shape or array.shape)}


def observation(number=0, **more):
    """The payload that a benchmark makes of the observation that ``helpers`` draws."""
    seen = helpers.observation(number)
    images = {"primary": picture(seen.images["image"])}
    return {"images": images, "states": marked(seen.state.astype(np.float64)), "task_description": seen.instruction, **more}


def message(kind, payload, seq=0):
    return msgpack.packb({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()})


class Harness:
    """What vla-eval's client does with a connection."""

    def __init__(self, address):
        self._connection = connect(address, compression=None)
        self.seq = 0

    def send(self, kind, payload):
        self.seq += 1
        self.socket.send(message(kind, payload, self.seq))

    def ask(self, kind, payload):
        self.send(kind, payload)
        reply = msgpack.unpackb(self.socket.recv(10))
        assert set(reply) == {"type", "payload", "seq", "timestamp"}
        assert reply["seq"] == self.seq or (reply["type"] == "error" and reply["seq"] == 0)  # of a message that cannot be read
        return reply["type"], reply["payload"]

    def act(self, payload):
        kind, answer = self.ask("observation", payload)
        assert kind == "action", answer
        found = answer["actions"]
        assert found["__ndarray__"] is True
        return np.frombuffer(found["data"], found["dtype"]).reshape(found["shape"])

    def refusal(self, kind, payload):
        kind, answer = self.ask(kind, payload)
        assert kind == "error"
        return answer["error"]

    def __enter__(self):
        self.socket = self._connection.__enter__()
        return self

    def __exit__(self, *error):
        self._connection.__exit__(*error)


def expected(number, seed, chunk):
    return POLICY.act(helpers.observation(number), Dense(3), generator=chunk_generator(seed, chunk)).actions


@pytest.fixture(scope="module")
def address():
    with serving(place=PLACE) as (_, found):
        yield found


def test_the_client_speaks_first_and_learns_what_its_benchmark_has_to_send(address):
    with Harness(address) as harness:
        kind, payload = harness.ask("hello", {"harness_version": "0.8.0", "protocol_version": 1, "benchmark": "x"})
    assert kind == "hello"
    assert payload["protocol_version"] == 1
    assert payload["observation_params"] == {"send_state": True}
    assert payload["observation_spec"]["primary"] == {"name": "image", "dims": 0, "format": "rgb_hwc_uint8"}
    assert payload["vlaflow"]["compute"] == "dense"


def test_the_frames_of_the_harness_itself_are_understood(address):
    """Packed by vla-eval 0.8.0: a hello, an episode of four steps, of which the policy sees the first and the last."""
    frames, replies = msgpack.unpackb(vla_eval_frames.FILE.read_bytes()), []
    with Harness(address) as harness:
        for frame in frames:
            harness.socket.send(frame)
            if msgpack.unpackb(frame)["type"] in ("hello", "observation"):
                replies.append(msgpack.unpackb(harness.socket.recv(10)))
    assert [(reply["type"], reply["seq"]) for reply in replies] == [("hello", 1), *(("action", n) for n in (3, 4, 5, 6))]
    acted = [np.frombuffer(reply["payload"]["actions"]["data"], np.float32) for reply in replies[1:]]
    seed = 1000 + vla_eval_frames.EPISODE
    np.testing.assert_array_equal(acted, [*expected(0, seed, 0)[:3], expected(3, seed, 1)[0]])


def test_an_observation_gets_one_action_and_the_policy_looks_once_per_chunk(address):
    """The checkpoint executes 3 of 6 actions, so of 7 observations it sees those numbered 0, 3 and 6."""
    with Harness(address) as harness:
        harness.send("episode_start", {"task": {"name": "a task", "episode_idx": 4}})
        acted = [harness.act(observation(number)) for number in range(7)]
    chunks = [expected(3 * chunk, 1004, chunk) for chunk in range(3)]
    np.testing.assert_array_equal(acted, np.concatenate([chunk[:3] for chunk in chunks])[:7])


def test_what_the_policy_does_not_look_at_is_not_decoded(address):
    broken = {"images": {"primary": {"__image__": True, "format": "png", "data": b"no image", "shape": [16, 16, 3]}}}
    with Harness(address) as harness:
        first = harness.act(observation(0))
        rest = [harness.act(broken) for _ in range(2)]
        assert "not a valid PNG" in harness.refusal("observation", broken)
        again = harness.act(observation(1))
    np.testing.assert_array_equal([first, *rest], expected(0, 1000, 0)[:3])
    np.testing.assert_array_equal(again, expected(1, 1000, 1)[0])


def test_an_episode_begins_with_a_chunk_and_the_noise_of_its_own(address):
    """Where the benchmark numbers no episodes, those of the connection count."""
    with Harness(address) as harness, Harness(address) as other:
        for number in range(3):
            harness.send("episode_start", {"task": {"name": "a task"}})
            np.testing.assert_array_equal(harness.act(observation(0)), expected(0, 1000 + number, 0)[0])
            harness.send("episode_end", {"metrics": {"success": False}, "steps": 1})
        other.send("episode_start", {"task": {"name": "a task", "episode_idx": 1}})
        np.testing.assert_array_equal(other.act(observation(0)), expected(0, 1001, 0)[0])


def test_a_restart_within_an_episode_discards_the_rest_of_the_chunk(address):
    with Harness(address) as harness:
        harness.act(observation(0))
        np.testing.assert_array_equal(harness.act(observation(1, episode_restart=True)), expected(1, 1000, 1)[0])
        np.testing.assert_array_equal(harness.act(observation(2)), expected(1, 1000, 1)[1])


def test_another_number_of_executed_actions_can_be_asked_for():
    with serving(place=PLACE, n_action_steps=1) as (server, address), Harness(address) as harness:
        for number in range(2):
            np.testing.assert_array_equal(harness.act(observation(number)), expected(number, 1000, number)[0])
        assert server.metadata["n_action_steps"] == 1
    for wrong in (0, 7):
        with pytest.raises(ConfigError, match="1 to 6 can be executed"):
            PolicyServer(POLICY, Dense(3), ServerConfig(**PLACE, n_action_steps=wrong))


@pytest.mark.parametrize("form", ["png", "raw", "ndarray"])
def test_lossless_images_arrive_to_the_bit(address, form):
    image = helpers.observation(5).images["image"]
    ways = {"png": picture(image), "raw": {**marked(image), "__image__": True, "format": "raw"}, "ndarray": marked(image)}
    with Harness(address) as harness:
        np.testing.assert_array_equal(harness.act(observation(5, images={"primary": ways[form]})), expected(5, 1000, 0)[0])


IMAGE = np.zeros((16, 16, 3), np.uint8)
NOISE = picture(helpers.observation().images["image"])


@pytest.mark.parametrize(
    ("kind", "payload", "sentence"),
    [
        ("hello", {"protocol_version": 2}, "version 1"),
        ("record", {}, "no message of type 'record'"),
        ("observation", [1], "must be a map"),
        ("observation", {"task_description": "x"}, "lacks 'images/primary'"),
        ("observation", {**observation(), "states": marked(np.zeros(9))}, "state of length 4, got 9"),
        ("observation", observation(images={"primary": picture(IMAGE, shape=(16, 16, 1))}), "said to have shape [16, 16, 1]"),
        ("observation", observation(images={"primary": picture(IMAGE[..., 0], shape=(16, 16, 3))}), "is L of 16"),
        ("observation", observation(images={"primary": {**picture(IMAGE), "format": "jpeg"}}), "not a valid JPEG"),
        ("observation", observation(images={"primary": {**picture(IMAGE), "format": "gif"}}), "has type None"),
        ("observation", observation(images={"primary": {**picture(IMAGE), "shape": [-16, 16, 3]}}), "lacks its data"),
        ("observation", observation(images={"primary": picture(IMAGE, shape=(10**5, 10**5, 3))}), "at most 6220800"),
        (
            "observation",
            observation(images={"primary": {**NOISE, "data": NOISE["data"][:200]}}),
            "not a valid PNG",
        ),
    ],
)
def test_what_is_wrong_is_an_error_of_one_sentence_and_the_connection_stays(address, kind, payload, sentence):
    with Harness(address) as harness:
        refused = harness.refusal(kind, payload)
        assert sentence in refused
        assert "server failed" not in refused
        np.testing.assert_array_equal(harness.act(observation(2)), expected(2, 1000, 0)[0])


def test_a_small_file_of_a_huge_image_is_not_decoded(address):
    """White paper of 8192 × 8192 pixels is a file of 200 KB and an array of 200 MB."""
    file = io.BytesIO()
    Image.new("RGB", (8192, 8192)).save(file, "png")
    for shape in ([16, 16, 3], [8192, 8192, 3]):
        image = {"__image__": True, "format": "png", "data": file.getvalue(), "shape": shape}
        with Harness(address) as harness:
            began = time.perf_counter()
            refused = harness.refusal("observation", observation(images={"primary": image}))
            assert "8192" in refused or "bytes" in refused
            assert time.perf_counter() - began < 1.0


def test_damaged_messages_are_refused_and_nothing_else_happens(address):
    rng, whole = random.Random(0), message("observation", observation(3), 7)
    with Harness(address) as harness:
        for _ in range(200):
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            harness.send("episode_start", {"task": {}})
            harness.socket.send(bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])]))
            harness.socket.send(message("hello", {}, 99))  # a damaged type may be one that has no answer
            while (reply := msgpack.unpackb(harness.socket.recv(10)))["seq"] != 99 or reply["type"] != "hello":
                assert "server failed" not in str(reply["payload"])
        harness.send("episode_start", {"task": {"episode_idx": 0}})
        np.testing.assert_array_equal(harness.act(observation(2)), expected(2, 1000, 0)[0])


def test_a_simulator_that_builds_a_scene_need_not_answer_pings():
    """The harness resets its simulator on the event loop of its connection, which may take minutes."""
    with serving(place=PLACE, idle_s=0.2) as (server, address), hostile.Raw(port_of(address)) as busy:
        time.sleep(1.0)
        assert len(server.request_log.clients) == 1
        busy.socket.sendall(hostile.frame(message("observation", observation(0), 1)))
        while (found := busy.read())[0] != 2:
            pass
        assert msgpack.unpackb(found[1])["type"] == "action"


def test_a_step_from_the_current_chunk_is_counted_and_not_logged(caplog):
    caplog.set_level("INFO")
    with serving(place=PLACE) as (server, address), Harness(address) as harness:
        for number in range(4):
            harness.act(observation(number))
        assert server.request_log.outcomes == {"answered": 2, "continued": 2}
    assert sum("answered" in record.getMessage() for record in caplog.records) == 2
    assert not any("continued" in record.getMessage() for record in caplog.records)


def test_liberos_actions_are_described_in_the_words_of_the_harness():
    """Its specs.py: three deltas, an axis-angle, and a gripper that closes at positive values."""
    assert vla_eval.action_components(ACTION) == {
        "position": {"name": "position", "dims": 3, "format": "delta_xyz"},
        "rotation": {"name": "rotation", "dims": 3, "format": "axis_angle"},
        "gripper": {"name": "gripper", "dims": 1, "format": "binary_close_positive"},
    }
    assert vla_eval.action_components(POLICY.action_spec) == {}


def test_a_benchmark_that_sends_no_state_gives_the_policy_the_mean_of_its_training_data():
    mean = POLICY.stats["state"].mean
    seen = observation(2)
    del seen["states"]
    with serving(place=choose("vla-eval-vlabench", ("image",))) as (_, address), Harness(address) as harness:
        assert harness.ask("hello", {})[1]["observation_params"] == {}
        acted = harness.act(seen)
    known = replace(helpers.observation(2), state=np.array(mean, np.float32))
    np.testing.assert_array_equal(acted, POLICY.act(known, Dense(3), generator=chunk_generator(1000, 0)).actions[0])
