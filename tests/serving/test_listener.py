"""How many clients may connect within a second, and that those that are connected do not notice the others."""

import asyncio
import logging
import re
import socket
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import helpers
from tests.serving.live import expected, port_of, request, serving
from tests.serving.test_fairness import Clock
from vlaflow.cli.main import main
from vlaflow.robot.client import Client
from vlaflow.serving import listener
from vlaflow.serving.listener import BURST, PER_S, Budget, Listener, log_pauses

gaps = st.lists(st.tuples(st.floats(0, 10), st.integers(0, 200)), max_size=20)


@given(gaps)
def test_within_any_time_no_more_than_a_burst_and_the_rate_are_accepted(gaps):
    clock, at = Clock(), []
    budget = Budget(clock)
    for gap, attempts in gaps:
        clock.now += gap
        for _ in range(attempts):
            if not budget.spent:
                budget.spend()
                at.append(clock.now)
    for first in range(0, len(at), 17):
        assert all(number + 1 <= BURST + PER_S * (then - at[first]) + 1e-6 for number, then in enumerate(at[first:]))


@given(st.lists(st.floats(1 / PER_S, 5), max_size=50))
def test_clients_that_connect_no_faster_than_the_rate_do_not_wait_even_after_a_burst(gaps):
    clock = Clock()
    budget = Budget(clock)
    while not budget.spent:
        budget.spend()
    for gap in gaps:
        clock.now += gap * (1 + 1e-9)
        assert not budget.spent
        budget.spend()


def connected(stack, port, count):
    """Sockets that have connected, closed with the stack."""
    return [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(count)]


def test_during_a_pause_the_event_loop_neither_accepts_nor_spins(monkeypatch, caplog):
    """A socket that could be accepted would keep it busy for as long as it watched the listener."""
    monkeypatch.setattr(listener, "BURST", 3)
    monkeypatch.setattr(listener, "PER_S", 0)
    made, accept, calls = [], Listener.accept, []
    monkeypatch.setattr(Listener, "accept", lambda self: (calls.append(self), accept(self))[1])

    async def run():
        log_pauses(asyncio.get_running_loop())
        listening = Listener("127.0.0.1", 0)
        server = await asyncio.get_running_loop().create_server(
            lambda: (made.append(1), asyncio.Protocol())[1], sock=listening, backlog=2
        )
        with ExitStack() as stack:
            connected(stack, listening.getsockname()[1], 20)
            await asyncio.sleep(0.3)
            server.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert len(made) == 3
    assert len(calls) <= 3 + 2
    assert [record.getMessage() for record in caplog.records] == [
        "Clients cannot connect now (more than 0 a second try); those that are connected are served."
    ]


def test_a_client_that_is_connected_is_answered_during_a_flood_of_connections(monkeypatch):
    monkeypatch.setattr(listener, "BURST", 8)
    monkeypatch.setattr(listener, "PER_S", 0)
    made, accept = [], Listener.accept
    monkeypatch.setattr(Listener, "accept", lambda self: (accept(self), made.append(self))[0])
    known = expected(1, 1)
    with serving() as (_, address), Client(address) as good, ExitStack() as stack:
        connected(stack, port_of(address), 100)
        for _ in range(3):
            assert np.array_equal(good.infer(request(1, seed=1))["actions"], known)
    assert len(made) == 8


def test_a_server_that_stops_during_a_pause_logs_nothing_of_the_closed_socket(monkeypatch, caplog):
    """asyncio accepts again a second after the pause began, if its loop still runs."""
    monkeypatch.setattr(listener, "BURST", 0)
    monkeypatch.setattr(asyncio.constants, "ACCEPT_RETRY_DELAY", 0.05)

    async def run():
        log_pauses(asyncio.get_running_loop())
        listening = Listener("127.0.0.1", 0)
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, sock=listening)
        with ExitStack() as stack:
            connected(stack, listening.getsockname()[1], 1)
            await asyncio.sleep(0.02)
            server.close()
            await asyncio.sleep(0.1)

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (("--host", "203.0.113.7", "--token", "t"), "203.0.113.7:8000 .*; name an address of this machine with --host"),
        (("--port", "BUSY"), "127.0.0.1:[0-9]+ .*; choose another --port"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_before_anything_is_computed(
    address, sentence, tmp_path, monkeypatch, capsys
):
    """The first chunks of a large policy take minutes."""
    helpers.policy().save_pretrained(tmp_path)
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # the log of vlaflow serve is not for the tests after this one
    monkeypatch.setattr("gc.freeze", lambda: None)
    monkeypatch.setattr("vlaflow.serving.engine.Engine.warm_up", lambda *_: pytest.fail("a chunk was computed"))
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        assert main(["serve", str(tmp_path), *(port if each == "BUSY" else each for each in address)]) == 2
    assert re.search(sentence, capsys.readouterr().err)
