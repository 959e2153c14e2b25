"""Who waits for whom: the engine's queue, the line before the event loop, and places."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serving import hostile
from tests.serving.live import PLACE, Slow, expected, port_of, request, serving, until
from tests.serving.test_vla_eval import PLACE as VLA_EVAL
from tests.serving.test_vla_eval import Harness, observation
from vlaflow.errors import RequestError
from vlaflow.robot import wire
from vlaflow.robot.client import Client
from vlaflow.serving.engine import EngineConfig
from vlaflow.serving.fair_queue import CREDIT, FairQueue
from vlaflow.serving.places import ClientPlaces
from vlaflow.serving.turns import ALLOWANCE_S, DUTY, MOST_OPENING, RATE, TURN_S, Account, LimitedConnection, Turns, WorkingClock


class Asking:
    """A client that wants something.

    Args:
        cost: of what it wants.
    """

    def __init__(self, cost=1.0):
        self.cost = cost


def served(greedy, rounds, light=None, every=0):
    """Who is served in turn, if some clients always want more and ``light`` asks once in ``every`` rounds."""
    queue, order = FairQueue(100), []
    for client in greedy:
        queue.put(client, client, client.cost)
    for number in range(rounds):
        if light is not None and number % every == 0:
            queue.put(light, light)
        order.append(queue.get_nowait())
        if order[-1] is not light:
            queue.put(order[-1], order[-1], order[-1].cost)
    return order


@given(greedy=st.integers(1, 8), more=st.integers(1, 5))
def test_a_client_that_wants_less_than_its_share_soon_waits_for_no_other(greedy, more):
    """Of n + 1 clients each may have every (n + 1)th inference; one that asks less often gathers credit."""
    every, light = greedy + 1 + more, Asking()
    order = served([Asking() for _ in range(greedy)], 40 * every, light, every)
    waits = [at - every * asked for asked, at in enumerate(at for at, client in enumerate(order) if client is light)]
    assert len(waits) == 40
    assert max(waits) <= greedy
    assert not any(waits[20:])


def test_clients_that_want_more_than_there_is_get_equal_shares_and_costly_ones_less():
    one, other, costly = Asking(), Asking(), Asking(4.0)
    counts = Counter(served([one, other, costly], 900))
    assert counts[one] == pytest.approx(400, abs=2)
    assert counts[other] == pytest.approx(400, abs=2)
    assert counts[costly] == pytest.approx(100, abs=2)


def test_a_client_that_has_rested_is_not_served_for_ever():
    """Its credit is bounded, and a new client has none."""
    rested, greedy = Asking(), Asking()
    queue = FairQueue(100)
    queue.put(rested, rested)
    for _ in range(50):
        queue.put(greedy, greedy)
    for _ in range(40):
        queue.get_nowait()
    for client in (rested, Asking()):
        for _ in range(10):
            queue.put(client, client)
    order = [queue.get_nowait() for _ in range(12)]
    assert CREDIT <= order.index(greedy) <= CREDIT + 2
    assert sum(client is not rested for client in order[: order.index(greedy)]) <= 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30))
def test_nothing_in_the_queue_is_lost_or_given_out_twice_and_each_client_is_served_in_order(puts):
    queue, kept, clients = FairQueue(len(puts) or 1), [], {client: Asking() for client in "abc"}
    for number, (client, leaves) in enumerate(puts):
        queue.put(clients[client], (client, number))
        if leaves:
            queue.remove((client, number))  # an equal one, but not the same
        kept.append((client, number))
    assert len(queue) == len(kept)
    order = [queue.get_nowait() for _ in kept]
    assert sorted(order, key=lambda item: item[1]) == kept
    for client in "abc":
        assert [n for c, n in order if c == client] == [n for c, n in kept if c == client]


def test_a_full_queue_takes_no_more_and_a_removed_item_leaves_room():
    queue, items = FairQueue(2), [object() for _ in range(3)]
    one, other = Asking(), Asking()
    queue.put(one, items[0])
    queue.put(one, items[1])
    with pytest.raises(asyncio.QueueFull):
        queue.put(other, items[2])
    queue.remove(items[0])
    queue.put(other, items[2])
    assert {queue.get_nowait(), queue.get_nowait()} == {items[1], items[2]}


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self):
        return self.now


@given(period=st.floats(0.01, 0.3))
def test_a_client_that_spends_no_more_than_its_rate_never_stands_in_line(period):
    clock = Clock()
    account = Account(clock)
    for _ in range(50):
        account.spend(0.99 * RATE * period)
        assert not account.in_debt
        assert not account.paced
        clock.now += period


def test_a_client_that_spends_more_stands_in_line_until_its_turn_or_until_it_has_rested():
    clock = Clock()
    account = Account(clock)
    account.spend(2 * ALLOWANCE_S)
    assert account.in_debt
    account.forgive()
    assert not account.in_debt
    assert account.paced
    account.spend(1.01 * TURN_S)
    assert account.in_debt
    clock.now += (ALLOWANCE_S + TURN_S) / RATE
    assert not account.in_debt
    account.spend(0)
    assert not account.paced


def test_while_the_server_computes_only_the_time_counts_in_which_it_has_a_processor():
    clock, processor, computing = Clock(), Clock(), [False]
    working = WorkingClock(lambda: computing[0], clock, processor)
    clock.now = 5
    assert working() == 5
    computing[0], clock.now, processor.now = True, 15, 1
    assert working() == 6
    clock.now, processor.now = 16, 4  # several threads
    assert working() == 7


class InLine:
    """A connection that does something costly at every turn, and wants another."""

    def __init__(self, turns, order, costs):
        self.turns, self.order, self.costs = turns, order, costs

    def take_turn(self):
        self.order.append(self)
        self.turns.spend(self.costs)
        self.turns.join(self)


def test_those_in_line_take_turns_and_together_no_more_than_their_part_of_the_time():
    async def run():
        loop, turns, order = asyncio.get_running_loop(), Turns(), []
        clients = [InLine(turns, order, 0.004) for _ in range(3)]
        began = loop.time()
        for client in clients:
            turns.join(client)
        while len(order) < 9:
            await asyncio.sleep(0.01)
        assert order[:9] == clients * 3
        assert loop.time() - began >= 8 * 0.004 / DUTY

    asyncio.run(run())


def test_a_client_that_has_been_in_line_is_read_in_smaller_pieces(monkeypatch):
    """The event loop does nothing else while a piece is parsed, and 16 KiB may hold 2300 frames."""
    sizes, received = [], LimitedConnection.data_received
    monkeypatch.setattr(LimitedConnection, "data_received", lambda self, data: (sizes.append(len(data)), received(self, data)))
    flood = b"\x02\x81\0\0\0\0\xc0" + b"\x00\x81\0\0\0\0\xc0" * 3900  # fragments of a message without an end
    with serving() as (_, address), hostile.Raw(port_of(address)) as client:
        client.read()
        sizes.clear()
        client.socket.sendall(flood)
        assert until(lambda: sum(sizes) == len(flood))
    assert max(sizes) > 2**12
    assert max(sizes[2:]) == 2**12


class Seat:
    """A connection that notes why it was closed."""

    closed = None

    async def close(self, code, why):
        self.closed = code, why


def test_the_client_that_has_been_idle_for_longest_gives_its_place_and_no_client_that_is_busy():
    async def run():
        clock = Clock()
        places, (unused, idle, busy) = ClientPlaces(3, unused_s=10, idle_s=60, clock=clock), (Seat(), Seat(), Seat())
        with places.taken(unused), places.taken(idle), places.taken(busy):
            with places.busy(idle):
                pass
            with places.busy(busy):
                clock.now = 9
                assert not places.make_room()
                clock.now = 11
                assert places.make_room()
                newcomer = Seat()
                with places.taken(newcomer), places.busy(newcomer):
                    await asyncio.sleep(0)
                    assert unused.closed
                    assert not idle.closed
                    assert not places.make_room()
                    clock.now = 1000
                    assert places.make_room()
                    await asyncio.sleep(0)
            assert idle.closed
            assert not busy.closed
            assert not newcomer.closed

    asyncio.run(run())


@pytest.mark.parametrize("place", [PLACE, VLA_EVAL], ids=["openpi", "vla-eval"])
def test_a_client_that_never_asks_gives_its_place_to_one_that_does(place):
    def asks(address):
        if place is VLA_EVAL:
            with Harness(address) as harness:
                return harness.act(observation())
        with Client(address) as client:
            return client.infer(request())["actions"]

    with serving(place=place, connections=1, open_s=0.5) as (server, address), hostile.Raw(port_of(address)) as silent:
        assert until(lambda: len(server.request_log.clients) == 1)
        with hostile.Raw(port_of(address)) as early:
            assert b" 503 " in early.head
        assert until(lambda: server._places._until and min(server._places._until.values()) < server._places._clock())
        assert asks(address).shape[-1] == 4
        found = (0, b"")
        while found[0] != 8:
            found = silent.read()
        assert b"Another client needed the place" in found[1]
        silent.close()


def test_a_client_that_asks_keeps_its_place():
    with serving(connections=1) as (_, address), Client(address) as client:
        client.infer(request())
        with pytest.raises(RequestError, match="1 clients are connected already"):
            Client(address)
        assert client.infer(request(1, seed=1))["actions"].tobytes() == expected(1, 1).tobytes()
        assert not client.reconnected


def test_sockets_that_say_nothing_make_room_for_clients_and_for_each_other():
    """The oldest goes; a client sends its headers at once, so it is never the oldest."""
    with serving() as (_, address):
        sockets = [hostile.Raw(port_of(address), hello=b"") for _ in range(MOST_OPENING + 20)]
        with Client(address) as client:
            assert client.infer(request(1, seed=1))["actions"].tobytes() == expected(1, 1).tobytes()
        for each in sockets[:20]:
            each.drained()
        for each in sockets[20:]:
            each.socket.setblocking(False)
        assert sum(alive(each) for each in sockets[20:]) >= MOST_OPENING - 1
        for each in sockets:
            each.close()


def alive(connection):
    """Whether a connection that does not block is open."""
    try:
        return bool(connection.socket.recv(1))
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def test_a_request_of_a_client_that_has_left_takes_no_room_in_the_queue():
    frame = hostile.frame(wire.pack(request()))
    with (
        serving(compute=Slow(0.4), engine=EngineConfig(batch=1, queue=1)) as (server, address),
        hostile.Raw(port_of(address)) as first,
        hostile.Raw(port_of(address)) as second,
    ):
        first.read()
        second.read()
        first.socket.sendall(frame)
        assert until(lambda: server.engine.counts.requests == 1 and not server.engine.waiting)
        second.socket.sendall(frame)
        assert until(lambda: server.engine.waiting == 1)
        second.close()
        assert until(lambda: not server.engine.waiting)
        assert not server.engine.counts.answered  # the first is still being computed
