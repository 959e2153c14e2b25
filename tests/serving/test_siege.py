"""The attacks of ``make siege``, all at once and for a moment: a client's answers stay the same to the bit.

How long it waits is measured by ``make siege`` and stated nowhere here, because a test shares its processors.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.latency import make_observation
from tests.serving import attacks
from tests.serving.live import POLICY, port_of, serving
from tests.serving.siege import CLIENTS, KEYS
from vlaflow.serving.engine import EngineConfig
from vlaflow.serving.observation_keys import choose


@pytest.mark.parametrize("protocol", list(CLIENTS))
def test_a_client_is_answered_the_same_during_every_attack(protocol, monkeypatch):
    monkeypatch.setattr(attacks, "SILENT", 40)
    monkeypatch.setattr(attacks, "CONNECTIONS", 1)
    place = choose(KEYS[protocol], tuple(POLICY.views))
    with serving(place=place, engine=EngineConfig(batch=1), dashboard=True) as (server, address):
        client = CLIENTS[protocol](address, [make_observation(POLICY)] * 2)
        known = [client.ask(number) for number in range(2)]
        with ThreadPoolExecutor(len(attacks.ATTACKS)) as pool:
            running = [pool.submit(attacks.attack, name, port_of(address), protocol, 0.3) for name in attacks.ATTACKS]
            while not all(each.done() for each in running):
                assert [client.ask(number) for number in range(2)] == known
        assert sum(each.result()["connected"] > 0 for each in running) > len(running) / 2  # not all at once in so short a time
        assert not server.request_log.outcomes["failed"]
        assert [client.ask(number) for number in range(2)] == known
        client.close()
