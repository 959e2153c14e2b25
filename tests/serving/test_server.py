"""A server in this process, driven over real sockets: openpi's protocol, strict, and nobody sees anybody else's state."""

import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from websockets.sync.client import connect

from tests import helpers
from tests.serving.live import PLACE, POLICY, Slow, expected, request, serving, until
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubts import BelowThreshold
from vlaflow.compute.refine import Refine
from vlaflow.config import to_json
from vlaflow.errors import CalibrationError, CapabilityError, ConfigError, RequestError
from vlaflow.flows.sampling import Sampling
from vlaflow.robot import wire
from vlaflow.robot.client import Client
from vlaflow.serving import observation_keys
from vlaflow.serving.engine import EngineConfig
from vlaflow.serving.observation_keys import ObservationKeys, choose, read
from vlaflow.serving.openpi import roboarena_config
from vlaflow.serving.server import PolicyServer, ServerConfig
from vlaflow.spec import ActionPrefix


@pytest.fixture(scope="module")
def address():
    with serving() as (_, found):
        yield found


def test_the_metadata_comes_first_and_says_what_the_policy_is(address):
    with Client(address) as client:
        assert client.metadata["action_spec"] == to_json(POLICY.action_spec)
        assert client.metadata["chunk_size"] == 6
        assert client.metadata["images"] == {"observation/image": 16}
        assert client.metadata["compute"] == "dense"


def test_an_answer_is_the_policys_own_chunk(address):
    with Client(address) as client:
        reply = client.infer(request(1, seed=7))
        np.testing.assert_array_equal(reply["actions"], expected(1, 7))
        assert reply["nfe"] == 3
        assert reply["server_timing"]["infer_ms"] > 0
        assert reply["server_timing"]["total_ms"] >= reply["server_timing"]["infer_ms"]


def test_every_connection_has_its_own_noise_which_reset_starts_over(address):
    with Client(address) as one, Client(address) as other:
        first = [one.infer(request(0))["actions"] for _ in range(3)]
        mixed = [other.infer(request(0))["actions"]]
        one.reset()
        mixed.append(one.infer(request(0))["actions"])
    for number, actions in enumerate(first):
        np.testing.assert_array_equal(actions, expected(0, number))
    for actions in mixed:
        np.testing.assert_array_equal(actions, expected(0, 0))


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"prompt": "x"}, "lacks 'observation/image'"),
        ({**request(), "observation/image": 5}, "must be an image"),
        ({**request(), "observation/image": np.full((16, 16, 3), 2, np.float32)}, "floats must lie in [0, 1]"),
        ({**request(), "observation/state": np.zeros(9, np.float32)}, "state of length 4, got 9"),
        ({**request(), "observation/state": np.array([np.nan] * 4, np.float32)}, "not finite"),
        ({**request(), "observation/state": "abc"}, "vector of numbers"),
        ({**request(), "prompt": 3}, "in words"),
        ({**request(), "prompt": "x" * 500}, "at most 32"),
        ({**request(), "seed": -1}, "'seed' must be a number"),
        ({**request(), "endpoint": "delete"}, "no endpoint"),
        ([1, 2], "A request must be a map"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_the_connection_stays(address, bad, sentence):
    with connect(address) as raw:
        raw.recv()
        raw.send(wire.pack(bad))
        answer = raw.recv(10)
        assert isinstance(answer, str)
        assert sentence in answer
        assert "Traceback" not in answer
        raw.send(wire.pack(request(2, seed=1)))
        np.testing.assert_array_equal(wire.unpack(raw.recv(10))["actions"], expected(2, 1))


def test_given_actions_come_back_to_the_bit_and_shape_the_rest(address):
    given = np.random.default_rng(0).uniform(-0.9, 0.9, (4, 4)).astype(np.float32)
    with Client(address) as client:
        assert client.metadata["max_action_prefix"] == 5
        free = client.infer(request(1, seed=7))["actions"]
        held = client.infer(request(1, seed=7, action_prefix=given, inference_delay=3))["actions"]
        all_held = client.infer(request(1, seed=7, action_prefix=given))["actions"]
        none_held = client.infer(request(1, seed=7, action_prefix=given, inference_delay=0))["actions"]
    np.testing.assert_array_equal(held[:3], given[:3])
    np.testing.assert_array_equal(all_held[:4], given)
    np.testing.assert_array_equal(none_held, free)
    assert (held[3:] != free[3:]).any()
    action_prefix = ActionPrefix(given, 3)
    own = POLICY.act(helpers.observation(1), Dense(3), generator=torch.Generator().manual_seed(7), action_prefix=action_prefix)
    np.testing.assert_array_equal(held, own.actions)


def test_a_server_can_be_told_to_guide(address):
    given = np.full((5, 4), 0.5, np.float32)
    with serving(engine=EngineConfig(guided=True)) as (_, guided), Client(guided) as one, Client(address) as other:
        asked = request(1, seed=7, action_prefix=given, inference_delay=2)
        assert (one.infer(asked)["actions"][2:] != other.infer(asked)["actions"][2:]).any()


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"inference_delay": 2}, "send both"),
        ({"action_prefix": [["a"] * 4]}, "must be an array of actions"),
        ({"action_prefix": np.zeros((2, 4), np.float32), "inference_delay": 1.5}, "integer number"),
        ({"action_prefix": np.zeros((2, 4), np.float32), "inference_delay": 3}, "must lie in 0 .."),
        ({"action_prefix": np.zeros((2, 4), np.float32), "inference_delay": -1}, "must lie in 0 .."),
        ({"action_prefix": np.full((2, 4), np.inf, np.float32)}, "finite"),
        ({"action_prefix": np.array(1.0)}, "'action_prefix'"),
        ({"action_prefix": np.zeros((2, 3), np.float32)}, "4 dimensions here, got 3"),
        ({"action_prefix": np.zeros((6, 4), np.float32)}, "at most 5 committed"),
        ({"budget_ms": 5}, "no latency profile"),
    ],
)
def test_what_cannot_be_continued_or_budgeted_is_one_sentence(address, bad, sentence):
    with Client(address) as client, pytest.raises(RequestError, match=sentence):
        client.infer(request(1, **bad))


def test_a_request_can_bring_its_own_budget():
    asked = []

    def budget(milliseconds):
        asked.append(milliseconds)
        if milliseconds < 1:
            raise CalibrationError("Nothing fits 0.5 ms here.")
        return Dense(1, label="budget")

    with serving(budget=budget) as (_, found), Client(found) as client:
        assert client.infer(request(budget_ms=20))["nfe"] == 1
        assert client.infer(request())["nfe"] == 3
        with pytest.raises(RequestError, match=r"Nothing fits 0\.5 ms"):
            client.infer(request(budget_ms=0.5))
    assert asked == [20, 0.5]


def test_an_endpoint_may_be_named(address):
    with connect(address) as raw:
        raw.recv()
        raw.send(wire.pack({"endpoint": "reset"}))
        assert raw.recv(10) == "reset successful"
        raw.send(wire.pack(request(0, endpoint="infer")))
        np.testing.assert_array_equal(wire.unpack(raw.recv(10))["actions"], expected(0, 0))


def test_roboarenas_clients_get_their_metadata_and_a_bare_array_of_what_is_to_be_executed():
    """They build a config of exactly these fields, and execute all that they are sent."""
    keys = {"images": ("observation/exterior_image_0_left",), "state": ("observation/joint_position",)}
    seen = helpers.observation(1)
    asked = {"observation/exterior_image_0_left": seen.images["image"], "observation/joint_position": seen.state}
    with serving(place=choose("roboarena", ("image",), **keys)) as (_, address), connect(address) as raw:
        assert wire.unpack(raw.recv(10)) == {
            "image_resolution": [16, 16],
            "needs_wrist_camera": False,
            "n_external_cameras": 1,
            "needs_stereo_camera": False,
            "needs_session_id": False,
            "action_space": "test arm",
        }
        raw.send(wire.pack({**asked, "prompt": seen.instruction, "session_id": "a", "endpoint": "infer"}))
        answer = wire.unpack(raw.recv(10))
        assert len(answer) == POLICY.config.n_action_steps < POLICY.config.decoder.chunk_size
        np.testing.assert_array_equal(answer, expected(1, 0)[: POLICY.config.n_action_steps])


@pytest.mark.parametrize(("mode", "space"), [("absolute", "joint_position"), ("delta", "joint_velocity")])
def test_roboarenas_action_spaces_are_those_of_seven_joints_and_a_gripper(mode, space):
    dimensions = [{"mode": mode}] * 7 + [{"mode": "absolute"}]
    spec = {"robot": "arm", "dimensions": dimensions}
    images = dict.fromkeys(observation_keys.ROBOARENA.images, 224)
    found = roboarena_config({"images": images, "action_spec": spec})
    assert found["action_space"] == space
    assert found["needs_wrist_camera"]
    other = roboarena_config({"images": images, "action_spec": {**spec, "dimensions": dimensions[1:]}})
    assert other["action_space"] == "arm"


def test_every_array_of_a_reply_begins_with_the_chunk_size():
    """openpi's broker cuts all arrays of a reply into steps, so one of another length would break it."""
    with (
        serving(policy=helpers.policy(rater=True), compute=Refine(BelowThreshold(0.5), Sampling(3), Dense(3))) as (_, address),
        Client(address) as client,
    ):
        reply = client.infer(request(0))
    arrays = {name: value.shape[0] for name, value in reply.items() if isinstance(value, np.ndarray)}
    assert arrays == {"actions": 6, "confidence": 6}


def test_a_client_with_another_action_spec_is_refused(address):
    ours = to_json(POLICY.action_spec)
    with Client(address) as client:
        np.testing.assert_array_equal(client.infer(request(0, action_spec=ours, seed=0))["actions"], expected(0, 0))
        with pytest.raises(RequestError, match="do not mean the same: rate_hz is"):
            client.infer(request(0, action_spec={**ours, "rate_hz": 20.0}))
        with pytest.raises(RequestError, match="must be a map"):
            client.infer(request(0, action_spec="mine"))


def test_batched_answers_equal_single_ones():
    with serving(engine=EngineConfig(batch=8, wait_ms=50)) as (server, address):

        def ask(number):
            with Client(address) as client:
                return client.infer(request(number, seed=number))["actions"]

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        assert server.engine.counts.batches < 8
    for number, actions in enumerate(answers):
        np.testing.assert_allclose(actions, expected(number, number), atol=1e-5)


def test_one_bad_request_in_a_batch_spoils_no_other():
    with serving(engine=EngineConfig(batch=4, wait_ms=100)) as (_, address):

        def ask(number):
            words = {"prompt": "x" * 500} if number == 2 else {}
            with Client(address) as client:
                try:
                    return client.infer({**request(number, seed=number), **words})["actions"]
                except RequestError as error:
                    return str(error)

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, range(4)))
    assert "at most 32" in answers[2]
    for number in (0, 1, 3):
        np.testing.assert_allclose(answers[number], expected(number, number), atol=1e-5)


def test_a_full_queue_is_busy_and_a_late_request_is_not_computed():
    with serving(compute=Slow(0.3), engine=EngineConfig(batch=1, queue=1)) as (server, address), ThreadPoolExecutor(6) as pool:

        def ask(_):
            with Client(address) as client:
                try:
                    return client.infer(request(0, deadline_ms=350))["actions"].shape
                except RequestError as error:
                    return str(error)

        answers = [str(a) for a in pool.map(ask, range(6))]
        counts = server.engine.counts
    assert any("waiting already" in a for a in answers)
    assert "(6, 4)" in answers
    assert counts.busy + counts.late + counts.answered == counts.requests == 6


@pytest.mark.parametrize("deadline_ms", [0, 50])
def test_a_deadline_is_told_when_it_passes_and_not_when_the_request_comes_up(deadline_ms):
    with serving(compute=Slow(1.0), engine=EngineConfig(batch=1)) as (server, address), ThreadPoolExecutor(1) as pool:
        with Client(address) as first, Client(address) as second:
            asked = pool.submit(first.infer, request(0))
            assert until(lambda: server.engine.counts.requests and not server.engine.waiting)
            with pytest.raises(RequestError, match="longer than its deadline"):
                second.infer(request(0, deadline_ms=deadline_ms))
            assert not asked.done()
            assert asked.result()["actions"].shape == (6, 4)
        assert server.engine.counts.late == 1


def test_what_nobody_waits_for_any_more_is_not_computed():
    with serving(compute=Slow(0.5), engine=EngineConfig(batch=1)) as (server, address):
        for number in range(4):
            with connect(address) as connection:
                connection.recv()
                connection.send(wire.pack(request(number)))
                assert until(lambda number=number: server.engine.counts.requests == number + 1)
        assert until(lambda: server.request_log.outcomes["gone"] == 4)
        with Client(address) as patient:
            patient.infer(request(4))
        assert server.engine.counts.batches == 2
        assert server.request_log.outcomes["answered"] == 1


def test_requests_that_wait_already_go_together_however_little_is_waited():
    with serving(compute=Slow(0.3), engine=EngineConfig(wait_ms=0)) as (server, address), ThreadPoolExecutor(4) as pool:
        clients = [Client(address) for _ in range(4)]
        asked = [pool.submit(clients[0].infer, request(0))]
        assert until(lambda: server.engine.counts.requests and not server.engine.waiting)
        asked += [pool.submit(client.infer, request(0)) for client in clients[1:]]
        for future in asked:
            future.result()
        assert server.engine.counts.batches == 2
        for client in clients:
            client.close()


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"queue": 0}, {"wait_ms": -1}, {"deadline_ms": 0}])
def test_a_queue_without_end_and_other_impossible_settings_are_refused(wrong):
    """asyncio takes a size of 0 for one without a limit."""
    with pytest.raises(ConfigError, match="at least 1"):
        EngineConfig(**wrong)


def test_stopping_finishes_what_runs():
    answers = []
    with serving(compute=Slow(0.4)) as (server, address):
        client = Client(address)
        asking = threading.Thread(target=lambda: answers.append(client.infer(request(0))["actions"].shape))
        asking.start()
        while not server.engine.counts.requests:
            time.sleep(0.01)
        time.sleep(0.1)
    asking.join(10)
    assert answers == [(6, 4)]


def test_health_metrics_and_the_token():
    with serving(token="secret") as (_, address):
        web = address.replace("ws", "http")
        assert urllib.request.urlopen(f"{web}/healthz").read() == b"OK\n"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{web}/metrics")
        with pytest.raises(RequestError, match="refuses this client: Send 'Authorization: Api-Key TOKEN'"):
            Client(address)
        with Client(address, token="secret") as client:
            client.infer(request(0))
        asked = urllib.request.Request(f"{web}/metrics", headers={"Authorization": "Api-Key secret"})
        assert b'vlaflow_requests_total{outcome="answered"} 1' in urllib.request.urlopen(asked).read()


def test_a_spec_with_endless_ranges_matches_itself():
    spec = POLICY.action_spec
    endless = replace(spec, dimensions=tuple(replace(d, low=-np.inf, high=np.inf) for d in spec.dimensions))
    with serving(policy=replace(POLICY, action_spec=endless)) as (_, address), Client(address) as client:
        assert client.infer(request(0, action_spec=client.metadata["action_spec"]))["actions"].shape == (6, 4)
        with pytest.raises(RequestError, match="low of action dimension"):
            client.infer(request(0, action_spec=to_json(spec)))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"token": ""}, "token is empty"), ({"port": 70_000}, r"0\.\.65535"), ({"connections": 0}, "must be at least 1")],
)
def test_impossible_places_are_refused(wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ServerConfig(**PLACE, **wrong)


def test_an_address_with_colons_can_be_connected_to_as_the_log_says_it(caplog):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    caplog.set_level("INFO")
    with serving(host="::1"):
        (note,) = [record.getMessage() for record in caplog.records if "ws://" in record.getMessage()]
    with pytest.raises(RequestError, match="cannot be reached"):
        Client(note[note.index("ws://") :])  # it is over, but the address is one
    assert "ws://[::1]:" in note


def test_other_machines_need_a_token():
    with pytest.raises(ConfigError, match="give a --token"):
        ServerConfig(**PLACE, host="0.0.0.0")
    ServerConfig(**PLACE, host="0.0.0.0", token="x")


def test_a_restarted_server_is_found_again():
    with serving() as (_, address):
        client = Client(address)
        client.infer(request(0))
        port = int(address.rsplit(":", 1)[1])
    with serving(port=port):
        np.testing.assert_array_equal(client.infer(request(0, seed=3))["actions"], expected(0, 3))
        assert client.reconnected == 1
        client.close()
    with pytest.raises(RequestError, match="Start the server: vlaflow serve"):
        Client(address)


def test_layouts_read_what_openpis_clients_send():
    image = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(4, 5, 3)
    droid = {
        "observation/exterior_image_1_left": image,
        "observation/wrist_image_left": image[::-1],
        "observation/joint_position": np.arange(7.0),
        "observation/gripper_position": np.array([0.5]),
        "prompt": "x",
    }
    seen = read(droid, **choose("droid", ("left", "wrist")))
    assert np.array_equal(seen.images["wrist"], image[::-1])
    assert seen.state.tolist() == [*range(7), 0.5]
    aloha = {
        "state": np.zeros(14),
        "images": {k.rsplit("/")[1]: image.transpose(2, 0, 1) for k in observation_keys.ALOHA.images},
        "prompt": "y",
    }
    seen = read(aloha, **choose("aloha", ("a", "b", "c", "d")))
    assert all(np.array_equal(seen.images[v], image) for v in "abcd")
    own = choose("libero", ("front",), images=("cam",), state=("joints", "grip"))
    assert own["observation_keys"] == replace(observation_keys.LIBERO, images=("cam",), state=("joints", "grip"))
    assert read({"cam": image, "joints": [1, 2], "grip": 3, "prompt": "z"}, **own).state.tolist() == [1, 2, 3]
    with pytest.raises(ConfigError, match="Name the keys of the images with --image"):
        choose("libero", ("front",))
    with pytest.raises(ConfigError, match="no observation keys 'libro'; did you mean 'libero'"):
        choose("libro", ("a", "b"))
    with pytest.raises(RequestError, match="lacks 'prompt'"):
        read({"a": image, "s": [1]}, ObservationKeys(("a",), ("s",)), ("v",))


def test_a_compute_policy_that_the_checkpoint_cannot_run_is_refused_at_once():
    with pytest.raises(CapabilityError, match="needs a confidence rater"):
        PolicyServer(POLICY, Refine(), ServerConfig(**PLACE))
