"""The slow first chunks are made before the first client is let in."""

import asyncio
import threading

import numpy as np
import pytest

from tests.serving.live import PLACE, POLICY, Slow, expected, request, serving
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.dense import Dense
from vlaflow.errors import ConfigError
from vlaflow.robot.client import Client
from vlaflow.serving.engine import EngineConfig
from vlaflow.serving.server import PolicyServer, ServerConfig


class Watched(ComputePolicy):
    """A compute policy that notes who computes how many, and continuing what."""

    name, needs = "watched", Dense().needs

    def __init__(self):
        self.seen = []

    def decode(self, model, prefix, generators, watch, conditioning=None):
        self.seen.append((threading.current_thread().name, len(generators), conditioning is not None))
        return Dense(1).decode(model, prefix, generators, watch, conditioning)


def test_the_first_chunks_are_made_before_the_first_client_is_let_in():
    """In the thread that computes, alone and as many as are batched, new and continued; nothing of it is counted."""
    watched = Watched()
    with serving(compute=watched, warm_up=2, engine=EngineConfig(batch=4)) as (server, _):
        assert {name for name, *_ in watched.seen} == {"inference_0"}
        assert sorted(rest for _, *rest in watched.seen) == [[1, False]] * 2 + [[1, True]] * 2 + [[4, False], [4, True]]
        assert server.engine.counts.requests == server.engine.counts.answered == 0


def test_a_server_that_is_stopped_while_it_warms_up_takes_nobody_in(caplog):
    async def run():
        server = PolicyServer(POLICY, Slow(0.2), ServerConfig(**PLACE, port=0, warm_up=50))
        task = asyncio.create_task(server.serve())
        await asyncio.sleep(0.3)
        server.stop()
        await asyncio.wait_for(task, 5)

    with caplog.at_level("INFO"):
        asyncio.run(run())
    said = [record.getMessage() for record in caplog.records]
    assert any("warming up" in line for line in said)
    assert not any("serving:" in line for line in said)


class TooLarge(ComputePolicy):
    """A compute policy whose memory holds two observations."""

    name, needs = "too large", Dense().needs

    def decode(self, model, prefix, generators, watch, conditioning=None):
        if len(generators) > 2:
            raise MemoryError("out of memory")
        return Dense(3).decode(model, prefix, generators, watch, conditioning)


def test_a_batch_that_does_not_fit_keeps_no_server_from_serving(caplog):
    """Requests of one batch are then computed one by one, as they are when one of them is bad."""
    with serving(compute=TooLarge(), warm_up=1, engine=EngineConfig(batch=4)) as (_, address), Client(address) as client:
        assert np.array_equal(client.infer(request(0, seed=3))["actions"], expected(0, 3))
    assert "4 requests at once cannot be computed together" in caplog.text


def test_by_default_there_is_a_warm_up():
    assert ServerConfig(**PLACE).warm_up > 0
    with pytest.raises(ConfigError, match="warm_up at least 0"):
        ServerConfig(**PLACE, warm_up=-1)
