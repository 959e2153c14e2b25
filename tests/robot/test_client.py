"""The client against servers that misbehave: every mishap is one sentence, in time, and leaves nothing behind."""

import base64
import hashlib
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from websockets.sync.server import serve

from tests import helpers
from tests.serving.live import POLICY, expected, port_of, request, serving, until
from vlaflow.errors import RequestError
from vlaflow.robot import wire
from vlaflow.robot.client import Client

MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


@contextmanager
def mute(metadata):
    """A server that shakes hands, says its metadata or not, and never speaks or listens again."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run():
            connection, head = listening.accept()[0], b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            key = next(line.split()[1] for line in head.splitlines() if line.lower().startswith(b"sec-websocket-key"))
            answer = b"HTTP/1.1 101 OK\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n"
            connection.sendall(answer % base64.b64encode(hashlib.sha1(key + MAGIC).digest()) + metadata)
            done.wait(30)
            connection.close()

        thread = threading.Thread(target=run)
        thread.start()
        yield f"ws://127.0.0.1:{listening.getsockname()[1]}"
        done.set()
        thread.join()


@contextmanager
def answering(handler):
    """A server of the library's, with a handler of ours."""
    with serve(handler, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


def frame(message):
    data = wire.pack(message)
    return bytes([0x82, len(data)]) + data


def test_a_server_that_does_not_answer_is_given_up_when_it_was_said():
    """Nor is its goodbye waited for much longer."""
    with mute(frame({"chunk_size": 6})) as address:
        client, began = Client(address, timeout_s=0.3), time.monotonic()
        with pytest.raises(RequestError, match="did not answer within 0"):
            client.infer({})
        assert time.monotonic() - began < 5


def test_a_server_without_metadata_is_given_up_and_leaves_no_thread():
    with mute(b"") as address:
        before = threading.active_count()
        with pytest.raises(RequestError, match="cannot be reached: timed out"):
            Client(address, timeout_s=0.3)
        assert until(lambda: threading.active_count() <= before)


@pytest.mark.parametrize(("first", "sentence"), [("hello", "text instead of its metadata"), (wire.pack([1]), "sent a list")])
def test_metadata_is_a_map(first, sentence):
    with answering(lambda connection: connection.send(first)) as address, pytest.raises(RequestError, match=sentence):
        Client(address)


def test_a_server_that_hangs_up_at_every_request_is_one_sentence():
    def once(connection):
        connection.send(wire.pack({"server": "test"}))
        connection.recv()

    with answering(once) as address, Client(address) as client:
        with pytest.raises(RequestError, match="closed the connection twice"):
            client.infer({})
        assert client.reconnected == 1


def test_a_server_that_was_restarted_and_continues_less_is_refused():
    """Every request of a robot that commits more would fail, and it would stand for ever."""
    with serving(policy=helpers.policy(masks="synchronous", max_action_prefix=3)) as (_, address):
        client = Client(address)
        client.infer(request(0))
    with client:
        less = serving(policy=helpers.policy(masks="synchronous", max_action_prefix=2), port=port_of(address))
        with less, pytest.raises(RequestError, match="another max action prefix than this client was created with"):
            client.infer(request(0))
        with serving(policy=helpers.policy(masks="synchronous", max_action_prefix=4), port=port_of(address)):
            client.infer(request(0))


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux alone has it")
def test_data_that_nobody_acknowledges_ends_the_connection_after_the_timeout():
    """The option is the kernel's; that a cut cable is noticed cannot be tried here."""
    with serving() as (_, address), Client(address, timeout_s=2.5) as client:
        assert client._connection.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2500


def test_a_server_that_was_restarted_for_another_robot_does_not_move_this_one():
    """Its actions have the same shape, and would be executed as if they meant the same."""
    spec = POLICY.action_spec
    absolute = replace(spec, dimensions=tuple(replace(d, mode="absolute") for d in spec.dimensions))
    with serving() as (_, address):
        client = Client(address)
        client.infer(request(0))
    with client:
        with serving(policy=replace(POLICY, action_spec=absolute), port=port_of(address)):
            for _ in range(2):
                with pytest.raises(RequestError, match="another action spec than this client was created with"):
                    client.infer(request(0))
        with serving(port=port_of(address)):
            np.testing.assert_array_equal(client.infer(request(0, seed=3))["actions"], expected(0, 3))
