"""Whatever is sent, the server stays up, stays small, and answers everybody else as if nothing had happened."""

import asyncio
import logging
import socket
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.serving import hostile
from tests.serving.fuzz import fuzz
from tests.serving.live import PLACE, POLICY, Slow, expected, port_of, request, serving, until
from vlaflow.compute.dense import Dense
from vlaflow.errors import RequestError
from vlaflow.robot import wire
from vlaflow.robot.client import Client
from vlaflow.serving.engine import EngineConfig
from vlaflow.serving.request_log import OneLine
from vlaflow.serving.server import PolicyServer, ServerConfig

AT_THE_CODEC, OVER_THE_WIRE = 98_000, 2_000


def test_hostile_frames_over_the_wire_change_nothing_for_anybody_else():
    """``make fuzz`` sends a hundred thousand of them."""
    seen = fuzz(OVER_THE_WIRE, seed=0)
    assert sum(seen.told.values()) == OVER_THE_WIRE
    assert seen.told["refused"] > 0.9 * OVER_THE_WIRE
    assert not seen.wrong


def test_hostile_frames_at_the_codec_are_refused_or_sound():
    """The rest of a hundred thousand: what the codec lets pass takes no more memory than it has bytes."""
    decoded = 0
    for data in hostile.frames(AT_THE_CODEC, seed=2):
        found = None
        with suppress(RequestError):
            found = wire.unpack(data)
            decoded += 1
        for value in found.values() if isinstance(found, dict) else ():
            if isinstance(value, np.ndarray):
                assert value.nbytes <= len(data)
    assert 0.1 * AT_THE_CODEC < decoded < 0.5 * AT_THE_CODEC


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\x00\x98\x96\x80" + b"\x80" * 10_000_000,
        b"\xdc\xff\xff" * 1000,
        b"\xdd\x00\xff\xff\xff" * 200_000,
        b"\x91" * 1000 + b"\xc0",
        b"\xdb\x00\x98\x96\x80" + "é".encode() * 5_000_000,
        b"\xdc\x27\x0f" + b"\x90" * 9_999,
    ],
    ids=["ten million maps", "lists of lists", "large lists of lists", "deep", "a long text", "as many as may be"],
)
def test_decoding_takes_little_more_memory_than_the_message(data):
    """An empty map is one byte of msgpack and 64 of Python; ten million of them must not be made."""
    tracemalloc.start()
    try:
        with suppress(RequestError):
            wire.unpack(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(data) + 2**20


values = st.recursive(
    st.sampled_from([None, True, -1, 0, 2**63, 0.5, float("nan"), float("inf"), "", "infer", "reset", "x" * 300, b"", b"\xff"])
    | st.sampled_from(
        [np.zeros((2, 2, 3), np.uint8), np.zeros((0, 0, 3), np.uint8), np.zeros(4), np.ones((), bool), np.int8(3)]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.binary(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def answer():
    """What the server answers to a frame, without a socket."""
    with asyncio.Runner() as runner:
        server = PolicyServer(POLICY, Dense(1), ServerConfig(**PLACE, engine=EngineConfig(batch=1)))
        conversation = server.config.observation_keys.protocol.begin(server)

        async def ask(frame):
            working = asyncio.ensure_future(server.engine.run())
            try:
                return await server._reply(frame, conversation, "test")
            finally:
                working.cancel()

        yield lambda frame: runner.run(ask(frame))
        server.engine.close()


@settings(max_examples=100)
@given(changes=st.dictionaries(st.sampled_from([*hostile.KEYS, "other"]), values, max_size=4))
def test_any_value_under_any_key_is_answered_by_a_sentence_or_a_chunk(answer, changes):
    said = answer(wire.pack({**request(), **changes}))
    if isinstance(said, str):
        assert "server failed" not in said
        assert "\n" not in said
        assert len(said) < 500
    else:
        assert isinstance(wire.unpack(said), dict)


def test_a_frame_beyond_the_limit_ends_its_connection_and_no_other():
    with serving(most_bytes=10_000) as (_, address), Client(address) as good, hostile.Raw(port_of(address)) as bad:
        bad.read()
        bad.socket.sendall(hostile.frame(bytes(20_000))[:200])  # its head says enough
        opcode, why = bad.read()
        assert (opcode, int.from_bytes(why[:2], "big")) == (8, 1009)
        np.testing.assert_array_equal(good.infer(request(0, seed=1))["actions"], expected(0, 1))


@pytest.mark.parametrize(
    "data",
    [
        b"\x82\x05abcde",
        hostile.frame(b"x", opcode=3),
        hostile.frame(b"x", opcode=0),
        b"\xf2\x80\0\0\0\0",
        hostile.frame(b"\xff\xfe", opcode=1),
        hostile.frame(b"x" * 200, opcode=9),
        hostile.frame(b"\0", opcode=8),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["unmasked", "unknown", "continues nothing", "reserved bits", "no text", "a long ping", "a short close", "no frame"],
)
def test_what_is_no_websocket_frame_ends_its_connection_and_no_other(data):
    with serving() as (server, address), Client(address) as good:
        with hostile.Raw(port_of(address)) as bad:
            bad.read()
            bad.socket.sendall(data)
            assert bad.read()[0] == 8
        np.testing.assert_array_equal(good.infer(request(0, seed=1))["actions"], expected(0, 1))
        assert until(lambda: len(server.request_log.clients) == 1)


@pytest.mark.parametrize(
    "hello",
    [b"", b"GET / HTTP/1.1\r\nHost: a\r\n", b"G" * 100_000, b"\x16\x03\x01\x02\x00\x01", b"GET / \xff\r\n\r\n"],
    ids=["silence", "half the headers", "an endless line", "TLS", "no text"],
)
def test_a_client_that_does_not_finish_its_headers_is_dropped(hello):
    with serving(open_s=0.3) as (_, address), hostile.Raw(port_of(address), hello=b"") as slow:
        slow.socket.settimeout(5)
        with suppress(ConnectionError):
            slow.socket.sendall(hello)
        slow.drained()
        with Client(address) as good:
            np.testing.assert_array_equal(good.infer(request(0, seed=1))["actions"], expected(0, 1))


def test_headers_that_trickle_in_are_dropped_all_the_same():
    """The limit is on the whole of the headers, not on the pause between two bytes."""
    with serving(open_s=0.5) as (_, address), hostile.Raw(port_of(address), hello=b"") as slow:
        slow.socket.settimeout(0.1)

        def dropped():
            try:
                slow.socket.sendall(b"G")
                return not slow.socket.recv(4096)
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        assert until(dropped, 3)


def test_a_half_open_connection_is_let_go():
    """It answers no ping, and does not close either; nor does a frame that was begun and never ended keep it."""
    with serving(idle_s=0.3) as (server, address), hostile.Raw(port_of(address)) as dead:
        dead.read()
        dead.socket.sendall(hostile.frame(bytes(1000))[:100])
        assert len(server.request_log.clients) == 1
        assert until(lambda: not server.request_log.clients)


def test_a_client_that_never_reads_holds_up_nobody_and_is_let_go():
    with (
        serving(idle_s=0.5, engine=EngineConfig(deadline_ms=2000)) as (server, address),
        Client(address) as good,
        hostile.Raw(port_of(address)) as deaf,
    ):
        deaf.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.socket.settimeout(0.5)
        with suppress(TimeoutError, ConnectionError):
            for _ in range(200):
                deaf.socket.sendall(hostile.frame(b"\xc1") * 1000)
        for number in range(5):
            np.testing.assert_array_equal(good.infer(request(0, seed=number))["actions"], expected(0, number))
        assert until(lambda: len(server.request_log.clients) == 1)


FLOOD = """
import select, sys, time
from tests.serving import hostile

flood = hostile.Raw(int(sys.argv[1]))
flood.socket.setblocking(False)
until = time.monotonic() + float(sys.argv[2])
while time.monotonic() < until:
    readable, writable, _ = select.select([flood.socket], [flood.socket], [], 1)
    readable and flood.socket.recv(1 << 20)
    writable and flood.socket.send(hostile.frame(b"\\xc1") * 5000)
"""


def test_a_flood_of_requests_from_one_client_keeps_no_other_waiting():
    """Thousands of frames come in one piece from the socket; they are not answered in one go."""
    with serving() as (server, address), Client(address) as good:
        waits = []
        with subprocess.Popen([sys.executable, "-c", FLOOD, str(port_of(address)), "60"]) as flood:
            assert until(lambda: server.request_log.outcomes["refused"], 20)
            while len(waits) < 10 or server.request_log.outcomes["refused"] <= 1000:
                began = time.monotonic()
                np.testing.assert_array_equal(good.infer(request(0, seed=1))["actions"], expected(0, 1))
                waits.append(time.monotonic() - began)
            assert flood.poll() is None  # it lasted all the while
            flood.kill()
        assert max(waits) < 1.0


def test_more_connections_than_the_limit_are_turned_away_with_a_sentence():
    with serving(connections=2) as (server, address):
        with Client(address) as first, Client(address):
            with pytest.raises(RequestError, match="refuses this client: 2 clients are connected already"):
                Client(address)
            with pytest.raises(InvalidStatus, match="503"), connect(address):
                pass
            np.testing.assert_array_equal(first.infer(request(0, seed=1))["actions"], expected(0, 1))
        assert until(lambda: not server.request_log.clients)
        with Client(address) as later:
            np.testing.assert_array_equal(later.infer(request(0, seed=2))["actions"], expected(0, 2))


def test_web_pages_of_other_origins_cannot_reach_a_robot():
    """A browser names the page's origin and would connect to this machine for any page; robots name none."""
    with serving() as (_, address), pytest.raises(InvalidStatus, match="403"), connect(address, origin="http://example.org"):
        pass


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:1", "http://127.0.0.1:1", 101),
        ("localhost", "http://localhost", 101),
        ("127.0.0.1:1", "http://127.0.0.1:2", 403),
        ("127.0.0.1:1", "null", 403),
        ("example.org:1", "http://example.org:1", 403),
    ],
)
def test_an_origin_is_taken_only_where_it_is_the_servers_own_name_on_this_machine(host, origin, status):
    """Some websocket libraries name the server itself; a page with another name for it was pointed here by a stranger."""
    hello = hostile.HELLO.replace(b"127.0.0.1", host.encode()).replace(b"\r\n\r\n", f"\r\nOrigin: {origin}\r\n\r\n".encode())
    with serving() as (_, address), hostile.Raw(port_of(address), hello) as stranger:
        assert f" {status} ".encode() in stranger.head


def test_who_sends_the_token_in_a_header_is_no_web_page_whatever_origin_it_names():
    headers = {"Authorization": "Api-Key secret"}
    with serving(token="secret") as (_, address):
        with connect(address, origin="http://robot.example.org", additional_headers=headers) as robot:
            assert wire.unpack(robot.recv(10))["chunk_size"] == 6
        with pytest.raises(InvalidStatus, match="401"), connect(address, origin="http://robot.example.org"):
            pass


def test_no_more_than_one_request_of_a_client_is_held_while_another_is_answered(monkeypatch):
    """A request may be large; what is not taken stays in the client's socket."""
    connections, take = [], PolicyServer._connection

    async def seen(self, connection):
        connections.append(connection)
        await take(self, connection)

    monkeypatch.setattr(PolicyServer, "_connection", seen)
    frame = hostile.frame(wire.pack(request(0, more=bytes(1_000_000))))
    with (
        serving(compute=Slow(0.4)) as (server, address),
        hostile.Raw(port_of(address)) as eager,
        ThreadPoolExecutor(1) as pool,
    ):
        eager.read()
        pool.submit(eager.socket.sendall, frame * 4)
        assert until(lambda: server.engine.counts.requests == 1)
        time.sleep(0.2)
        assert server.engine.counts.requests == len(connections[0].recv_messages.frames) == 1
        assert [eager.read()[0] for _ in range(4)] == [2] * 4


def test_strangers_headers_leave_no_traceback_in_the_log(caplog):
    hello = hostile.HELLO.replace(b"\r\n\r\n", b"\r\nAuthorization: \xff\xfe\r\n\r\n")
    caplog.set_level("INFO")
    with serving(token="secret") as (_, address):
        with hostile.Raw(port_of(address), hello) as stranger:
            assert b"401" in stranger.head
        for broken in (b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\nA\r\n\r\n"):
            with hostile.Raw(port_of(address), hello=b"") as stranger:
                stranger.socket.sendall(broken)
                stranger.drained()
    assert not [record for record in caplog.records if record.exc_info or record.levelno > logging.INFO]


def test_the_websocket_librarys_log_is_one_line_per_mishap():
    """Its older versions log every broken handshake with a traceback."""
    small_talk = logging.LogRecord("websockets", logging.INFO, "f", 1, "connection %s", ("open",), None)
    assert not OneLine().filter(small_talk)
    error = ValueError("line\nbreak")
    mishap = logging.LogRecord("websockets", logging.ERROR, "f", 1, "opening handshake failed", (), (ValueError, error, None))
    assert OneLine().filter(mishap)
    assert logging.Formatter().format(mishap) == "opening handshake failed (ValueError)"


KILLED = """
import asyncio
from tests.serving.live import PLACE, POLICY, Slow
from vlaflow.serving.request_log import OneLine
from vlaflow.serving.server import PolicyServer, ServerConfig

async def main():
    ready = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(PolicyServer(POLICY, Slow(60), ServerConfig(**PLACE, port=0, warm_up=0)).serve(ready))
    print(await ready, flush=True)
    await serving

asyncio.run(main())
"""


def test_a_server_killed_in_the_middle_of_a_request_leaves_nothing_behind():
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    port = int(process.stdout.readline())
    client = Client(f"ws://127.0.0.1:{port}")
    client._connection.send(wire.pack(request(0)))
    time.sleep(0.3)  # it computes now
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert not family
    with pytest.raises(RequestError, match=f"ws://127.0.0.1:{port} cannot be reached: .* Start the server: vlaflow serve CKPT"):
        client.infer(request(0))
    with serving(port=port):  # the same port, at once
        np.testing.assert_array_equal(client.infer(request(0, seed=3))["actions"], expected(0, 3))
    client.close()
