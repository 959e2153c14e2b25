"""What one client may cost: every attack is refused or ended, and a well-behaved client is answered as before."""

import json
import logging
import urllib.error
import urllib.request
from contextlib import suppress

import msgpack
import numpy as np
import pytest
from websockets.sync.client import connect

from tests.serving import hostile
from tests.serving.live import PLACE, expected, port_of, request, serving
from vlaflow.errors import RequestError
from vlaflow.robot import wire
from vlaflow.robot.client import Client
from vlaflow.serving.dashboard import STREAM
from vlaflow.serving.limits import most_message_bytes
from vlaflow.serving.listener import log_pauses
from vlaflow.serving.observation_keys import choose
from vlaflow.serving.turns import PINGS_PER_S


@pytest.mark.parametrize("width", [2, 30, 9000])
def test_values_are_counted_over_the_whole_message(width):
    """Each container is small or still open when the next begins: only what all of them announce together is too much."""
    inner = b"\xdc" + (10_000 // width).to_bytes(2, "big") + b"\xc0" * (10_000 // width)
    message = b"\xdc" + width.to_bytes(2, "big") + inner * width
    deep = (b"\xdc\x17\x70" * 2) + b"\xc0" * 5999  # two arrays of 6000, the first of which owes 5999 more
    for sent in (message, deep):
        with pytest.raises(RequestError, match="more than 10000 values"):
            wire.unpack(sent)


def test_costly_clients_are_refused_or_dropped_and_others_are_answered_as_before():
    known = expected(1, 1)
    with serving(dashboard=True) as (_, address), Client(address) as good:
        port, web = port_of(address), address.replace("ws", "http")

        def answered():
            return np.array_equal(good.infer(request(1, seed=1))["actions"], known)

        assert answered()
        with Client(address) as bad:
            image = np.zeros((2048, 2048, 3), np.uint8)
            with pytest.raises(RequestError, match=r"2048 × 2048 pixels, but the policy reads .* Send at most 1920 × 1080"):
                bad.infer(request(0) | {"observation/image": image})
            with pytest.raises(RequestError, match="'action_prefix' has 100000 actions, but a chunk of this policy has"):
                bad.infer(request(0, action_prefix=np.zeros((100_000, 4), np.float32)))
            assert bad.infer(request(0, seed=0))["actions"].shape == known.shape
        with hostile.Raw(port) as flood, suppress(ConnectionError):
            flood.socket.sendall(hostile.frame(b"", opcode=9) * (PINGS_PER_S + 50))
            while flood.socket.recv(1 << 16):
                pass
        assert answered()
        with connect(f"{address}{STREAM}", origin=web, max_size=None) as page:
            page.send(json.dumps([[]] * 5000))
            told = iter(lambda: json.loads(page.recv(timeout=5)), None)
            assert next(m for m in told if m["kind"] == "refused")["sentence"].endswith("at most 4096 bytes.")
        asked = urllib.request.Request(f"{web}/metrics", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(asked)
        assert answered()


@pytest.mark.parametrize("place", [PLACE, choose("vla-eval-simpler", ("image",))], ids=["openpi", "vla-eval"])
def test_metrics_are_for_this_machine_in_every_protocol(place):
    with serving(place=place) as (_, address):
        web = f"{address.replace('ws', 'http')}/metrics"
        assert b"vlaflow_clients" in urllib.request.urlopen(web).read()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(web, headers={"Host": "evil.example"}))


def test_a_message_is_as_large_as_the_policys_images_need():
    """A full-HD image of float32 has 12 bytes per pixel; a policy that reads 4000 pixels a side is bounded by the codec."""
    one = most_message_bytes({"a": 64})
    assert one == 2**20 + 12 * 1920 * 1080
    assert most_message_bytes({"a": 64, "b": None}) - one == one - 2**20
    assert most_message_bytes({"a": 4000}) == wire.MOST_BYTES
    with serving() as (server, address), hostile.Raw(port_of(address)) as bad:
        assert server.most_bytes == one
        bad.read()
        bad.socket.sendall(hostile.frame(bytes(one + 1))[:100])
        opcode, why = bad.read()
        assert (opcode, int.from_bytes(why[:2], "big")) == (8, 1009)


def test_a_moderate_client_may_ping():
    with serving() as (_, address), hostile.Raw(port_of(address)) as calm:
        calm.read()
        calm.socket.sendall(hostile.frame(b"x", opcode=9) * PINGS_PER_S)
        assert [calm.read() for _ in range(PINGS_PER_S)] == [(10, b"x")] * PINGS_PER_S


def test_a_lack_of_sockets_is_logged_once_a_minute_and_other_errors_as_ever(caplog):
    class Loop:
        others = 0

        def set_exception_handler(self, handle):
            self.handle = handle

        def default_exception_handler(self, _):
            self.others += 1

    loop = Loop()
    log_pauses(loop)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            loop.handle(loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many")})
    assert len(caplog.records) == 1
    loop.handle(loop, {"message": "another"})
    assert loop.others == 1


def test_what_is_within_the_limit_is_still_read():
    message = {str(i): [i, i + 1] for i in range(2000)}
    assert wire.unpack(msgpack.packb(message)) == message
